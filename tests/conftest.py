"What several tests need."
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')  # half of two cores each
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(sys.executable).with_name('llm-distill')
signal.signal(signal.SIGINT, signal.default_int_handler)  # the jobs that a shell runs in the background ignore it


def pytest_xdist_make_scheduler(config, log):
    "A file's tests share servers and models, so one worker gets them all; notebooks share nothing."
    from xdist.scheduler import LoadScopeScheduling
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition('::')[0]
            return nodeid if file.endswith('test_notebooks.py') else file
    return ByFile(config, log)


@pytest.fixture
def command():
    "Run `llm-distill`; gives the finished process."
    def run(*words, **kwargs):
        return subprocess.run([SCRIPT, *map(str, words)], capture_output=True, text=True, **kwargs)
    return run


@pytest.fixture(scope='session')
def document():
    "OpenAI's own description of its API."
    folder = os.environ.get('LLMD_DATA')
    path = Path(folder or '.')/'openai-openapi.json'
    if not folder or not path.exists(): pytest.skip('LLMD_DATA does not name a folder with openai-openapi.json')
    return json.loads(path.read_text())


@pytest.fixture(scope='session')
def wrong(document):
    "What is wrong with a reply, by the name of its schema."
    validators = pytest.importorskip('jsonschema')
    def plain(x): # `nullable` is OpenAPI 3.0's; JSON schema has a type for it
        if isinstance(x, list): return [plain(v) for v in x]
        if not isinstance(x, dict): return x
        rest = {k: plain(v) for k, v in x.items() if k != 'nullable'}
        return {'anyOf': [rest, {'type': 'null'}]} if x.get('nullable') is True else rest
    schemas = plain(document['components']['schemas'])
    def told(name, reply):
        wanted = {'$ref': f'#/components/schemas/{name}', 'components': {'schemas': schemas}}
        found = validators.Draft202012Validator(wanted).iter_errors(json.loads(json.dumps(reply)))
        unknown = set(reply) - set(schemas[name]['properties'])
        return [f'{list(e.path)}: {e.message}' for e in found] + [f'unknown: {n}' for n in unknown]
    return told
