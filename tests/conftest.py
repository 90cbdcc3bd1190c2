"What several tests need."
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = Path(sys.executable).with_name('llm-distill')
signal.signal(signal.SIGINT, signal.default_int_handler)  # the jobs that a shell runs in the background ignore it


@pytest.fixture
def command():
    "Run `llm-distill`; gives the finished process."
    def run(*words, **kwargs):
        return subprocess.run([SCRIPT, *map(str, words)], capture_output=True, text=True, **kwargs)
    return run
