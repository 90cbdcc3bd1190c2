"Each call that nbs/coming_from.ipynb gives as ours runs as it is written, in the order of its tables."
import ast
import asyncio
import inspect
import json
import os
import re
import warnings
from contextlib import redirect_stdout
from io import StringIO
from unittest import mock

import pytest
from conftest import ROOT

from llm_distill.teachers.base import Teacher

CELLS = [(c['cell_type'], ''.join(c['source']))
         for c in json.loads((ROOT/'nbs/coming_from.ipynb').read_text(encoding='utf-8'))['cells']]
LINES = [line for kind, text in CELLS if kind == 'markdown' for line in text.splitlines() if line.startswith('|')]
ROWS = [line for line in LINES if not re.match(r'\| theirs \||\|---', line)]
OURS = [re.fullmatch(r'\| [^|]+ \| `([^`|]+)` \| [^|]+ \|', row) for row in ROWS]


def run(code, names, loop):
    "Run a statement or an expression, which may await; gives an expression's value."
    try: whole = compile(code, code, 'eval', ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except SyntaxError: whole = compile(code, code, 'exec', ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    value = eval(whole, names)
    return loop.run_until_complete(value) if whole.co_flags & inspect.CO_COROUTINE else value


@pytest.fixture(scope='module')
def outcomes():
    "The value of each row, or its error; they share their names, as in a notebook."
    names, values, loop = {}, [], asyncio.new_event_loop()
    first_table = next(i for i, (_, text) in enumerate(CELLS) if '|---|' in text)
    clean = {k: v for k, v in os.environ.items() if not re.search('_API_KEY$|^(API_|USE_API)', k)}
    with mock.patch.dict(os.environ, clean, clear=True), warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter('ignore')
        for kind, text in CELLS[:first_table]:
            if kind == 'code': run(text, names, loop)
        for row in OURS:
            try: values.append(run(row[1], names, loop))
            except Exception as e: values.append(e)
    teachers = [v for v in names.values() if isinstance(v, Teacher)]
    yield values, teachers
    for teacher in teachers: teacher.close()
    names['server'].__exit__()
    loop.close()


def test_the_tables_are_there():
    assert all(OURS), [row for row, found in zip(ROWS, OURS) if not found]
    assert len(ROWS) >= 76 and len(LINES) - len(ROWS) == 2*7


@pytest.mark.parametrize('i', range(len(ROWS)), ids=[f'{i}-{m[1][:40] if m else "?"}' for i, m in enumerate(OURS)])
def test_ours_runs_as_written(outcomes, i):
    value = outcomes[0][i]
    assert not isinstance(value, Exception), f'{ROWS[i]}\n{type(value).__name__}: {value}'
    assert not inspect.isawaitable(value) and not inspect.isgenerator(value), f'nobody waits for it: {ROWS[i]}'


def test_nobody_else_was_asked(outcomes):
    urls = [t.url for t in outcomes[1] if t.url]
    assert len(urls) >= 6 and all(url.startswith('http://127.0.0.1:') for url in urls)
