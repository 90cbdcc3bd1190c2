"Every notebook runs, one case each: tutorials, which take longest, first and in a real kernel, others by nbdev."
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from test_house import NOTEBOOKS, ROOT
from test_tutorials import EXECUTE, TUTORIALS, promised, stated_seconds, without_network


# What most notebooks import, which takes seconds; a process that has it forks for each of them.
HEAVY = ['torch', 'transformers.trainer', 'transformers.generation', 'transformers.models.auto.modeling_auto',
         'transformers.models.llama.modeling_llama', 'transformers.tokenization_utils_tokenizers', 'nbdev.test']


@pytest.fixture
def room():
    "For what a killed kernel leaves behind. Its name is short, as those of sockets have to be."
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder: yield folder


def in_this_process(notebook: Path, log: Path, room: str):
    "What `nbdev-test NOTEBOOK` does."
    with log.open('w') as file:
        for number in (1, 2): os.dup2(file.fileno(), number)
        os.environ |= {'OMP_NUM_THREADS': '1', 'TMPDIR': room}  # of processes that it starts
        tempfile.tempdir = room
        os.chdir(ROOT)
        import torch
        from nbdev.test import nbdev_test
        torch.set_num_threads(1)
        nbdev_test(str(notebook))


def run(notebook: Path, log: Path, room: str) -> int: # The exit status; 0 where all cells ran
    fork = 'forkserver' in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('forkserver' if fork else 'spawn')
    if fork: context.set_forkserver_preload(HEAVY)
    process = context.Process(target=in_this_process, args=(notebook, log, room))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize('tutorial', TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_in_a_real_kernel(tutorial, tmp_path, room):
    script = [sys.executable, '-c', EXECUTE, str(tutorial), str(tmp_path/'done.ipynb'), str(tmp_path)]
    began, env = os.times(), os.environ | {'OMP_NUM_THREADS': '1', 'TMPDIR': room}
    done = subprocess.run([*without_network(), *script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    ended = os.times()
    took = ended.children_user + ended.children_system - began.children_user - began.children_system
    assert took <= 3*stated_seconds(tutorial), f'{took:.0f} s of work: the line about time is wrong'
    now, stored = (promised(json.loads(p.read_text(encoding='utf-8'))) for p in (tmp_path/'done.ipynb', tutorial))
    assert now == stored


@pytest.mark.parametrize('notebook', [p for p in NOTEBOOKS if p not in TUTORIALS], ids=lambda p: p.stem)
def test_notebook(notebook, tmp_path, room):
    log = tmp_path/'log'
    assert run(notebook, log, room) == 0, log.read_text(errors='replace')
