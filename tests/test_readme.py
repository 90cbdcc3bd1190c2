"The README's Python, as written."
import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_python_runs_as_written(tmp_path):
    code, = re.findall(r'```python\n(.+?)```', (ROOT/'README.md').read_text(encoding='utf-8'), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r'^kl +\d.*\n.*^agreement', done.stdout, re.M | re.S), done.stderr
    assert (tmp_path/'student'/'model.safetensors').exists() and (tmp_path/'answers.db').exists()
