"Is the house in step: notebooks, modules, README, layers, dependencies."
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT/'llm_distill'
BIN = Path(sys.executable).parent
# From the ground up; a module imports only from names to the left of its own.
# The engine of the server also writes for local teachers, so it lies below them.
LAYERS = ['types', 'folders', 'pricing', 'models', 'device', 'serving', 'teachers', 'packing', 'database', 'tables',
          'query', 'browse', 'cache', 'prompts', 'records', 'answers', 'batch', 'run', 'collect', 'align', 'turns',
          'targets', 'sequences', 'shards', 'losses', 'liger', 'fused', 'objective', 'capture', 'attention',
          'activations', 'rollout', 'importance', 'student', 'saving', 'train', 'evaluate', 'details', 'distill',
          'recipe', 'judge', 'plots', 'report', 'compare', 'tuning', 'progress', 'panels', 'demo', 'cli']
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def modules(folder):
    "Exported modules by their path; packages' own files are written by hand."
    return {p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8')
            for p in folder.rglob('*.py') if p.name != '__init__.py'}


@pytest.fixture
def copy(tmp_path):
    "A copy of what git would carry, for commands that write."
    unwanted = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for name in ('nbs', 'llm_distill', 'pyproject.toml', 'settings.ini'):
        source = ROOT/name
        if source.is_dir(): shutil.copytree(source, tmp_path/name, ignore=unwanted)
        else: shutil.copy(source, tmp_path)
    return tmp_path


def test_modules_are_what_notebooks_export(copy):
    for path in modules(copy/'llm_distill'): (copy/'llm_distill'/path).unlink()
    subprocess.run([BIN/'nbdev-export'], cwd=copy, check=True, capture_output=True)
    exported, kept = modules(copy/'llm_distill'), modules(PACKAGE)
    assert sorted(exported) == sorted(kept), 'a module without a notebook, or the other way round'
    assert [p for p in kept if kept[p] != exported[p]] == [], 'run nbdev-export'


def test_notebooks_are_clean(copy):
    subprocess.run([BIN/'nbdev-clean'], cwd=copy, check=True, capture_output=True)
    dirty = [p.name for p in NOTEBOOKS if (copy/p.relative_to(ROOT)).read_bytes() != p.read_bytes()]
    assert dirty == [], 'run nbdev-clean'


def test_readme_is_made_from_the_index():
    subprocess.run([sys.executable, ROOT/'.ci/readme.py', '--check'], check=True)


def test_notebooks_store_no_widgets_nor_heavy_outputs():
    for path in NOTEBOOKS:
        text = path.read_text(encoding='utf-8')
        assert 'application/vnd.jupyter.widget' not in text, path.name
        outputs = [o for c in json.loads(text)['cells'] for o in c.get('outputs', [])]
        assert 'site-packages' not in json.dumps(outputs), f'{path.name}: a warning with a path of somebody'
        images = [o['data']['image/png'] for o in outputs if 'image/png' in o.get('data', {})]
        assert all(len(image) < 70_000 for image in images), f'{path.name}: an image over 50 kB'


def imported(tree):
    "Names of the modules that a syntax tree imports, wherever in it."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = '.'*node.level + (node.module or '')
            yield home
            if home.strip('.') in ('', 'llm_distill'):  # what is imported may itself be a module
                yield from (f'{home}{"" if home.endswith(".") else "."}{alias.name}' for alias in node.names)


def absolute(name, path):
    "An imported name as if it were not relative to the module at `path`."
    if not name.startswith('.'): return name
    dots = len(name) - len(name.lstrip('.'))
    rooms = ['llm_distill', *path.split('/')[:-1]][:None if dots == 1 else 1 - dots]
    return '.'.join(rooms + [name.lstrip('.')]).rstrip('.')


@pytest.mark.parametrize('path', sorted(p for p in modules(PACKAGE) if p != '_modidx.py'))
def test_a_module_imports_only_from_below(path):
    room = path.split('/')[0].removesuffix('.py')
    names = {absolute(n, path) for n in imported(ast.parse((PACKAGE/path).read_text(encoding='utf-8')))}
    ours = {n.split('.')[1] for n in names if n.startswith('llm_distill.')}
    allowed = LAYERS[:LAYERS.index(room) + 1]
    assert ours <= set(allowed), f'{room} imports {ours - set(allowed)} from above'
    if room not in ('panels', 'demo', 'cli'): assert not {n.split('.')[0] for n in names} & {'ipywidgets', 'IPython'}
    if room == 'losses': assert {n.split('.')[0] for n in names} <= {'collections', 'torch'}
    assert len((PACKAGE/path).read_text(encoding='utf-8').splitlines()) <= 400, 'a crowded room: redesign it'


def private_names(tree):
    "Names with an underscore that a syntax tree takes from modules of this package."
    ours = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [(a.name, a.name, a.asname) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('llm_distill')):
            names = [(f'llm_distill {node.module}', a.name, a.asname) for a in node.names]
        else: continue
        for home, name, alias in names:
            if not home.startswith('llm_distill'): continue
            ours.add(alias or name.split('.')[0])
            last = name.rsplit('.')[-1]
            if last.startswith('_') and not last.startswith('__'): yield name
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name): continue
        if node.value.id in ours and node.value.id.islower() and re.match('_[^_]', node.attr): yield node.attr


@pytest.mark.parametrize('code, found', [
    ('from llm_distill.models import find_model, _here', ['_here']), ('from . import _x', ['_x']),
    ('from llm_distill.models import load as _load', []), ('import llm_distill._mine', ['llm_distill._mine']),
    ('from llm_distill.serving import app\napp._answer', ['_answer']),
    ('from torch import _dynamo\nimport numpy as np\nnp._x', [])])
def test_a_private_name_is_seen(code, found): assert list(private_names(ast.parse(code))) == found


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.name)
def test_no_notebook_takes_a_private_name_from_another_room(path):
    found = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'code': continue
        text = re.sub(r'^(\s*)[%!].*', r'\1pass', ''.join(cell['source']), flags=re.M)
        found += private_names(compile(text, path.name, 'exec', ast.PyCF_ONLY_AST|ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
    assert found == [], 'give it a public name and a docstring, or move it'


def test_every_import_is_a_declared_dependency():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT/'settings.ini')
    lists = ('requirements', 'demo_requirements', 'data_requirements', 'eval_requirements', 'lora_requirements',
             'speech_requirements', 'gpu_requirements')
    declared = {re.split(r'[<>=!\[; ]', line)[0].lower().replace('_', '-') for key, value in settings['DEFAULT'].items()
                if key in lists for line in value.split() if line[0].isalpha()}
    used = {n.split('.')[0] for text in modules(PACKAGE).values() for n in imported(ast.parse(text))}
    homes = packages_distributions()
    third = used - sys.stdlib_module_names - {'llm_distill', ''}
    missing = {n for n in third
               if not n.startswith('.') and not {h.lower().replace('_', '-') for h in homes.get(n, [n])} & declared}
    brought = {'pydantic', 'pydantic_core', 'starlette', 'IPython'}  # by FastAPI, and by ipywidgets
    assert missing <= brought | {'google'}, missing  # which Colab has by itself


def test_importing_the_package_loads_nothing_heavy():
    heavy = ('torch', 'transformers', 'openai', 'anthropic', 'numpy')
    code = f'import sys, llm_distill; print([m for m in {heavy} if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def test_every_lazy_name_is_there_and_stays_itself():
    code = '''
import llm_distill, llm_distill.collect, llm_distill.evaluate
for name in llm_distill.__all__: assert callable(getattr(llm_distill, name)) or name == "Message", name
from llm_distill import collect, evaluate
assert callable(collect) and callable(evaluate)
'''
    subprocess.run([sys.executable, '-c', code], check=True)


def test_badges_name_their_own_notebook():
    for path in (ROOT/'nbs/tutorials').glob('*.ipynb'):
        assert f'blob/main/nbs/tutorials/{path.name}' in path.read_text(encoding='utf-8'), path.name
