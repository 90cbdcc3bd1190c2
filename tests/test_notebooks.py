"Every notebook runs, one case each, by nbdev's own engine; tutorials in a real kernel."
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import NOTEBOOKS, ROOT

TUTORIALS = [p for p in NOTEBOOKS if p.parent.name == 'tutorials']


def run(notebook) -> subprocess.CompletedProcess:
    test, env = Path(sys.executable).with_name('nbdev-test'), os.environ | {'OMP_NUM_THREADS': '1'}
    return subprocess.run([test, notebook], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize('notebook', [p for p in NOTEBOOKS if p not in TUTORIALS], ids=lambda p: p.stem)
def test_notebook(notebook):
    done = run(notebook)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('tutorial', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_in_a_real_kernel(tutorial, tmp_path):
    import nbformat
    from nbclient import NotebookClient
    notebook = nbformat.read(tutorial, 4)
    NotebookClient(notebook, timeout=900, kernel_name='python3', resources={'metadata': {'path': tmp_path}}).execute()
