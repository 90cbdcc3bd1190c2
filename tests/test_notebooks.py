"Every notebook runs, one case each: tutorials, which take longest, first and in a real kernel, others by nbdev."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import NOTEBOOKS, ROOT
from test_tutorials import EXECUTE, TUTORIALS, promised, stated_seconds, without_network


def run(notebook) -> subprocess.CompletedProcess:
    test, env = Path(sys.executable).with_name('nbdev-test'), os.environ | {'OMP_NUM_THREADS': '1'}
    return subprocess.run([test, notebook], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize('tutorial', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_in_a_real_kernel(tutorial, tmp_path):
    script = [sys.executable, '-c', EXECUTE, str(tutorial), str(tmp_path/'done.ipynb'), str(tmp_path)]
    began, env = os.times(), os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run([*without_network(), *script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    ended = os.times()
    took = ended.children_user + ended.children_system - began.children_user - began.children_system
    assert took <= 3*stated_seconds(tutorial), f'{took:.0f} s of work: the line about time is wrong'
    now, stored = (promised(json.loads(p.read_text(encoding='utf-8'))) for p in (tmp_path/'done.ipynb', tutorial))
    assert now == stored


@pytest.mark.parametrize('notebook', [p for p in NOTEBOOKS if p not in TUTORIALS], ids=lambda p: p.stem)
def test_notebook(notebook):
    done = run(notebook)
    assert done.returncode == 0, done.stdout + done.stderr
