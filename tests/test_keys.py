"A key is in the header of a request and nowhere else: a canary is looked for in all that a teacher leaves behind."
import json
import os
import pickle
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from families import FAMILIES, server, teacher
from llm_distill.teachers.keys import ApiKey
from llm_distill.types import DistillError
from nbclient import NotebookClient
from servers import Fault, Provider

CANARY = 'sk-canary-7f3a9c1e5b2d4860'
TRACES = (b'canary', b'7f3a9c1e', b'5b2d4860')  # the whole of it and what a careless cut would leave
VARIABLES = {f'{name}_API_KEY': CANARY for name in ('OPENAI', 'DEEPSEEK', 'ANTHROPIC', 'OPENAI_COMPATIBLE', 'CUSTOM')}

HEAD = '''
import asyncio, json, logging, os, pickle, sys, traceback, types, warnings
sys.path.insert(0, os.environ['TESTS'])
from pathlib import Path
from families import *
from llm_distill import collect
from servers import Fault
out = Path('.')
logging.basicConfig(level=1, filename='debug.log', format='%(name)s %(message)s', force=True)
logging.captureWarnings(True)
dump = open('dump.txt', 'a', encoding='utf-8')
def say(*what): print(*what, file=dump)

def walk(start):
    "Whatever can be reached by attributes and items, as text."
    seen, queue = set(), [start]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, (types.ModuleType, type, types.FunctionType, types.MethodType)):
            continue
        seen.add(id(thing)); kept.append(thing)
        if isinstance(thing, str): say(thing)
        elif isinstance(thing, (bytes, bytearray)): say(bytes(thing).decode('latin-1'))
        elif isinstance(thing, dict): queue += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set, frozenset)): queue += list(thing)
        else:
            queue += list(getattr(thing, '__dict__', {}).values())
            slots = [c.__slots__ for c in type(thing).__mro__ if isinstance(getattr(c, '__slots__', 0), (tuple, list))]
            queue += [getattr(thing, name, None) for names in slots for name in names]
            try: say(repr(thing))
            except Exception: pass
    say(f'walked {len(seen)} things from {type(start).__name__}')
kept = []

def tell(error):
    "All that an error may be asked for."
    say(''.join(traceback.format_exception(error)))
    say(''.join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
    while error:
        say(repr(error), vars(error), pickle.dumps(error).decode('latin-1'))
        walk(error)
        error = error.__cause__ or error.__context__

async def fail(t, call):
    try: await call(t)
    except Exception as e: tell(e)
    else: raise SystemExit(f'{t} did not fail')
    finally:
        if hasattr(t, 'wire'): walk(t.wire.client())
        walk(t)
        say(repr(t), repr(vars(t)), pickle.dumps(t).decode('latin-1'), json.dumps(t.manifest()), t.stats, t.rate)
'''

REFUSED = HEAD + '''
def given(): return os.environ.get('GIVEN') or None
async def main():
    for family in FAMILIES:
        with server(family, key='right') as p:
            model = FAMILIES[family][2] or 'deepseek-v4-flash'
            t = create_teacher(family, model, given(), p.url, retry_delay=0, max_retries=1)
            await fail(t, lambda t: t.agenerate('Hello'))
            await fail(t, lambda t: t.agenerate('Hello', max_tokens=30_000))
            if 'prompt_logprobs' in t.gives: await fail(t, lambda t: t.ascore('Hello you'))
            assert all(r.headers['authorization'].endswith(os.environ['END']) for r in p.requests), 'it was not sent'
            say(t.wire.key, repr(t.wire.key), f'{t.wire.key!s} {t.wire.key!r}')
            await t.aclose()
asyncio.run(main())
try: create_teacher('vllm', None, given(), server('vllm', key='right').url)
except Exception as e: tell(e)
with server('openai', key='right') as p: create_teacher('openai', 'gpt-4o', given(), p.url).generate('Hello')
'''

PAGES = HEAD + '''
key = lambda: os.environ['OPENAI_API_KEY']
def pages():
    yield f'your key {key()} is odd'
    for room in (60, 300): yield 'w'*(room - 15) + key()
def faults(text):
    for status in (401, 500):
        yield Fault('status', status, body={'error': {'message': text, 'code': text}})
        yield Fault('status', status, {'x-request-id': text, 'www-authenticate': text}, text)
        yield Fault('html', status, body=f'<html>{text}</html>')
    yield Fault('html', body=text)
    yield Fault('garbled', body=text)
    yield Fault('garbled', body={'error': text, text: 1, 'output': [], 'status': 'failed', 'choices': []})
async def main():
    for family, model in (('openai', 'gpt-4o'), ('openai', 'o3-pro'), ('anthropic', 'claude-opus-5'), ('custom', 'm')):
        with server(family) as p:
            t = create_teacher(family, model, base_url=p.url, retry_delay=0, max_retries=0)
            for text in pages():
                for fault in faults(text):
                    p.add(fault)
                    try: await t.agenerate('Hello')
                    except Exception as e: say(repr(e), vars(e), ''.join(traceback.format_exception(e)))
                    else: raise SystemExit(f'{fault} was taken for an answer')
            await t.aclose()
asyncio.run(main())
'''

KEPT = HEAD + '''
for family in FAMILIES:
    with server(family, key=os.environ['OPENAI_API_KEY']) as p:
        with create_teacher(family, FAMILIES[family][2], base_url=p.url) as t:
            answers = collect(['One', 'Two'], t, out/f'{family}.db', max_tokens=4)
            assert answers.asked == 2
            say(json.dumps(answers.manifest), repr(answers), vars(answers[0]))
            (out/f'{family}.pickle').write_bytes(pickle.dumps((t, answers)))
'''


def run(script, tmp_path, **more):
    "Run a script where the keys are in the environment; gives the finished process."
    env = os.environ | VARIABLES | {'TESTS': str(ROOT/'tests')} | more
    return subprocess.run([sys.executable, '-c', script], capture_output=True, cwd=tmp_path, env=env, timeout=120)


def check(done, tmp_path, *wanted):
    "Nothing in any file, nor on the screen."
    files = {p.name: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    files |= {'stdout': done.stdout, 'stderr': done.stderr}
    found = [(name, data[max(0, data.find(t) - 200):data.find(t) + 60])
             for name, data in files.items() for t in TRACES if t in data]
    assert not found, f'{len(found)} traces, the first: {found[0]}'
    for name in wanted: assert name in files and len(files[name]) > 100, (name, done.stderr[-2000:])


@pytest.mark.parametrize('given', ['', CANARY], ids=['environment', 'argument'])
def test_a_key_that_is_refused_and_repeated(tmp_path, given):
    done = run(REFUSED, tmp_path, GIVEN=given, END=CANARY[-6:], PYTHONWARNINGS='always')
    assert done.returncode == 1 and b'TeacherRefused' in done.stderr and b'***' in done.stderr, done.stderr.decode()
    check(done, tmp_path, 'debug.log', 'dump.txt', 'stderr')
    assert b'httpcore' in (tmp_path/'debug.log').read_bytes(), 'the logs of the HTTP library are not there'


def test_a_key_that_is_repeated_anywhere(tmp_path):
    done = run(PAGES, tmp_path)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    check(done, tmp_path, 'debug.log', 'dump.txt')


def test_a_key_that_is_accepted(tmp_path):
    done = run(KEPT, tmp_path)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    check(done, tmp_path, 'debug.log', 'dump.txt', *(f'{f}.db' for f in FAMILIES))


CELLS = ['%xmode Verbose', 'import logging, os, sys, warnings\nsys.path.insert(0, os.environ["TESTS"])\n'
         'from families import *\nwarnings.simplefilter("ignore"); logging.basicConfig(level=1, stream=sys.stdout)',
         'p = server("openai", key="right"); t = create_teacher("openai", "gpt-4o", base_url=p.url)\nprint(t); t',
         'vars(t), vars(t.wire), t.wire.key, t.manifest()', 't.generate("Hello")', 'await t.agenerate("Hello")',
         't.probe()',
         'import pickle; pickle.dumps(t), pickle.dumps(sys.last_value)', '%tb']


def test_a_notebook(tmp_path, monkeypatch):
    for name, value in (VARIABLES | {'TESTS': str(ROOT/'tests')}).items(): monkeypatch.setenv(name, value)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    NotebookClient(book, timeout=60, allow_errors=True, resources={'metadata': {'path': tmp_path}}).execute()
    text = json.dumps(book)
    errors = [o['ename'] for c in book.cells for o in c.outputs if o.output_type == 'error']
    assert not [t for t in TRACES if t.decode() in text], text[text.find('canary') - 300:][:400]
    assert errors[:3] == ['TeacherRefused']*3, errors


@pytest.mark.parametrize('family, path', [
    ('openai', '/chat/completions'), ('anthropic', '/v1/messages'), ('custom', '/generate')])
@pytest.mark.parametrize('status', [302, 308])
def test_a_redirect_takes_no_key_along(family, path, status):
    with server(family) as elsewhere, server(family) as p:
        p.add(Fault('status', status, {'Location': elsewhere.url + path}))
        with teacher(family, p, CANARY, max_retries=0) as t:
            try: t.generate('Hello')
            except DistillError: pass
        assert not [r for r in elsewhere.requests if CANARY in str(r.headers)], 'another server was given the key'


@pytest.mark.parametrize('bad', [f'{CANARY}\nX-More: 1', f'{CANARY}\u20ac', f'{CANARY}\x00'])
@pytest.mark.parametrize('family', ['openai', 'anthropic'])
def test_a_key_that_cannot_be_sent(family, bad, caplog):
    caplog.set_level(1)
    with server(family) as p:
        try:
            with teacher(family, p, bad) as t: t.generate('Hello')
        except DistillError as e: error = e
        else: pytest.fail('it was sent')
        assert not p.requests and 'key' in str(error) and 'canary' not in str(error) + repr(vars(error)) + caplog.text


def test_the_key_itself(monkeypatch):
    key = ApiKey(CANARY, 'SOME_KEY')
    shown = f'{key} {key!r} {[key]} {dict(k=key)} {key!s:>40}'
    assert 'canary' not in shown and CANARY.encode() not in pickle.dumps(key)
    assert key.scrub(f'a {CANARY} b') == 'a *** b'
    monkeypatch.setenv('SOME_KEY', 'other')
    assert pickle.loads(pickle.dumps(key)).reveal() == 'other' and key.reveal() == CANARY


def test_a_key_is_read_when_it_is_sent(monkeypatch):
    with Provider('openai') as p:
        for first, second in (('one', 'two'), ('three', 'four')):
            monkeypatch.setenv('OPENAI_API_KEY', first)
            with teacher('openai', p, None) as t:
                t.generate('Hello')
                monkeypatch.setenv('OPENAI_API_KEY', second)
                t.generate('Hello')
            assert [r.headers['authorization'] for r in p.requests[-2:]] == [f'Bearer {first}', f'Bearer {second}']
