"The course: what every tutorial has, and that its stored outputs are what it says now."
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TUTORIALS = sorted((ROOT/'nbs/tutorials').glob('*.ipynb'))
TIME = re.compile(r'\*\*Time and cost\.\*\* Two CPU cores: about (\d+) s')
NUMBER = re.compile(r'[-+]?\d+(,\d{3})*\.?\d*(e[-+]?\d+)?')


def cells(path, kind=None):
    "Cells of a notebook."
    found = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    return [c for c in found if kind in (None, c['cell_type'])]


def text(cell): return ''.join(cell['source'])
def prose(path): return '\n'.join(text(c) for c in cells(path, 'markdown'))


def stated_seconds(path) -> int:
    "How long a tutorial says that it takes on two cores."
    found = TIME.findall(prose(path))
    assert len(found) == 1, f'{path.name}: one line "**Time and cost.** Two CPU cores: about N s" is wanted'
    return int(found[0])


def promised(notebook) -> list[str]:
    "The values that cells with an assert end in, less numbers; what a model said in words may differ by machine."
    shown = []
    for cell in notebook['cells']:
        if cell['cell_type'] != 'code' or 'assert ' not in text(cell): continue
        for output in cell['outputs']:
            if output['output_type'] != 'execute_result': continue
            said = ''.join(output.get('data', {}).get('text/plain', ''))
            if said and said[0] not in '\'"': shown.append(''.join(NUMBER.sub('#', said).split()))
    return shown


# Runs in a process of its own: argv is the notebook, where to write it, and the folder to run it in.
EXECUTE = '''
import sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=900, kernel_name='python3', resources={'metadata': {'path': sys.argv[3]}}).execute()
nbformat.write(notebook, sys.argv[2])
'''
# In a fresh network the loopback is down, and nothing else is there.
LOOPBACK_UP = '''
import fcntl, os, socket, sys
with socket.socket() as s: fcntl.ioctl(s, 0x8914, bytes.fromhex(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
'''
NETLESS = ['unshare', '--net', '--map-root-user', sys.executable, '-c', LOOPBACK_UP,
           struct.pack('16sH14x', b'lo', 0x41).hex()]


def without_network() -> list[str]:
    "The words before a command that take its network away; none where that is not allowed."
    try: done = subprocess.run([*NETLESS, sys.executable, '-c', ''], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired): return []
    return NETLESS if done.returncode == 0 else []


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_form(path):
    words, code = prose(path), cells(path, 'code')
    assert text(cells(path)[0]).startswith('# ') and '\n> ' in text(cells(path)[0])
    assert f'/llm-distill/llm_distill/blob/main/nbs/tutorials/{path.name})' in words
    assert words.count('colab-badge.svg') == 1
    for heading in ('## 0. Install', '## Exercises', '## What next'): assert f'\n{heading}\n' in f'\n{words}\n', heading
    assert 1 <= stated_seconds(path) < 90
    install = text(code[0])
    assert install.startswith('#| eval: false') and "'google.colab' in sys.modules" in install
    assert '%pip install -q' in install and not code[0]['outputs']
    assert sum('assert ' in text(c) for c in code) >= 3


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_stored_outputs(path):
    raw = path.read_text(encoding='utf-8')
    outputs = [o for c in cells(path, 'code') for o in c['outputs']]
    assert any(o['output_type'] == 'execute_result' for o in outputs), 'run it, and keep what it shows'
    assert not any(o['output_type'] == 'error' for o in outputs)
    drawn = [c for c in cells(path, 'code') if text(c).splitlines()[-1] == 'figure']
    assert all(c['outputs'] and 'image/png' in c['outputs'][-1]['data'] for c in drawn)
    assert 'application/vnd.jupyter' not in raw and '"widgets"' not in raw
    assert len(raw) < 500_000
    home = re.compile(r'(/root/|/home/|/Users/|[A-Z]:\\\\Users)')
    assert not [o for o in outputs if home.search(json.dumps(o))], 'a path of somebody\'s machine'


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_links_and_pictures(path):
    for target in re.findall(r'\]\(([^)#]+)', prose(path)):
        if not target.startswith('http'): assert (path.parent/target).resolve().exists(), target


@pytest.mark.parametrize('path', TUTORIALS, ids=lambda p: p.stem)
def test_solutions_are_folded(path):
    exercises = prose(path).split('## Exercises')[1].split('## What next')[0]
    asked = re.sub(r'<details>.*?</details>', '', exercises, flags=re.S)
    assert len(re.findall(r'^\d\. ', asked, re.M)) >= 2 and asked != exercises


def test_figures_of_the_study_are_those_of_the_study():
    from llm_distill.evaluate import Scores, difference
    arms = json.loads((ROOT/'nbs/studies/what_to_learn_from.json').read_text(encoding='utf-8'))['arms']
    names = {'top-20 renormalised': 'no_tail', 'top-20 and tail': 'top20', 'top-5 and tail': 'top5'}
    source = next(text(c) for c in cells(ROOT/'nbs/tutorials/04_what_to_learn_from.ipynb', 'code')
                  if text(c).startswith('study = '))
    told = {}
    exec(source.split('\nfigure')[0], told)
    base = Scores.from_dict(arms['text']['scores'])
    for label, arm in names.items():
        gain = difference(Scores.from_dict(arms[arm]['scores']), base)['kl']
        assert told['study'][label] == pytest.approx(gain, abs=6e-4), label


def test_promises_are_compared_without_their_numbers():
    def notebook(said, source='assert x\nx'):
        output = {'output_type': 'execute_result', 'data': {'text/plain': said}}
        return {'cells': [{'cell_type': 'code', 'source': source, 'outputs': [output]}]}
    assert promised(notebook("{'kl': -1.25e-05,\n 'n': 12}")) == promised(notebook("{'kl': 3., 'n': 1,200}"))
    assert promised(notebook("{'kl': 1}")) != promised(notebook("{'ce': 1}"))
    assert promised(notebook("'words of a model'")) == promised(notebook('1', source='x')) == []


def test_the_network_is_off():
    if not (words := without_network()): pytest.skip('no namespaces here')
    code = '''
import socket
with socket.create_server(('127.0.0.1', 0)) as here: socket.create_connection(here.getsockname()).close()
try: socket.create_connection(('192.0.2.1', 80), timeout=2)
except OSError as e: print(e.errno)
'''
    done = subprocess.run([*words, sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '101'  # unreachable, at once
