"Dockerfile and compose.yaml without Docker: each line is done here, up to the server that starts, answers and ends."
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SCRIPT
from llm_distill.models import load_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

# What `llm-distill serve` reads from its environment.
OPTIONS = {'HF_MODEL', 'HOST', 'PORT', 'LOGLEVEL', 'TORCH_DTYPE', 'DEVICE', 'BATCH_SIZE', 'MAX_CONCURRENT',
           'MAX_MODEL_LEN', 'LLM_DISTILL_API_KEY', 'LLM_DISTILL_API_KEY_FILE'}
# What others read: Python, pip, torch, the NVIDIA runtime, and our cache.
OTHERS = {'PATH', 'PYTHONUNBUFFERED', 'USER', 'HOME', 'LLM_DISTILL_HOME', 'HF_HOME', 'NVIDIA_VISIBLE_DEVICES',
          'NVIDIA_DRIVER_CAPABILITIES', 'PIP_NO_CACHE_DIR', 'PIP_DISABLE_PIP_VERSION_CHECK'}


def instructions(text):
    "(line number, word, rest) of each instruction of a Dockerfile; comments go, continued lines are joined."
    start, whole = 0, ''
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith('#') or not line.strip(): continue
        start = start if whole else number
        whole += line.strip()
        if whole.endswith('\\'):
            whole = whole[:-1]
            continue
        word, _, rest = whole.partition(' ')
        yield start, word, rest.strip()
        whole = ''
    assert not whole, 'the last line goes on nowhere'


def ignored(path, patterns=None):
    "Whether .dockerignore keeps a path, relative to the root, out of the build."
    lines = (ROOT/'.dockerignore').read_text().splitlines() if patterns is None else patterns
    out = False
    for line in (x.strip() for x in lines):
        if not line or line.startswith('#'): continue
        pattern = line.removeprefix('!').strip('/')
        places = r'[^/]*'.join(re.escape(x) for x in pattern.replace('**/', '\0').split('*')).replace('\0', '(.*/)?')
        if re.fullmatch(f'{places}(/.*)?', path): out = not line.startswith('!')
    return out


class Build:
    "Does what a Dockerfile says, each stage in a folder; without `real`, pip only says what it would install."
    def __init__(self, place, args=None, real=False):
        self.place, self.args, self.real = place, args or {}, real
        self.stages, self.images, self.said = [], set(), []

    def __call__(self, text):
        for number, word, rest in instructions(text):
            do = getattr(self, word, None) if word.isupper() else None
            assert do, f'line {number}: {word} is not tried by any test; write how, or leave it out'
            if word != 'RUN': assert '$' not in rest, f'line {number}: only RUN has a shell here'
            do(rest)
        return self

    def here(self, path):
        "A path of the image in the folder of the stage."
        path = Path(path) if path.startswith('/') else Path(self.cwd)/path
        return self.root/path.relative_to('/')

    def mapped(self, text):
        "Words with paths of the image in them, as paths of the folder."
        return re.sub(r'(?<![\w.])/(opt|src|cache|model)(?=[/:\s"]|$)', lambda m: f'{self.root}{m[0]}', text)

    def environment(self):
        found = {k: self.mapped(v) for k, v in self.env.items()}
        base = f'{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin'  # with a python, as in the base image
        return found | {'PATH': f'{found["PATH"]}:{base}' if 'PATH' in found else base}

    def FROM(self, rest):
        form = r'python:(\d+\.\d+)\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}(?: AS ([a-z]+))?'
        found = re.fullmatch(form, rest)
        assert found, f'{rest}: a version, down to the digest'
        tested = re.search(r'on Python (\d+\.\d+)', (ROOT/'constraints.txt').read_text())[1]
        assert found[1] == tested, 'the Python for which constraints.txt was made'
        self.images.add(rest.split(' AS ')[0])
        assert len(self.images) == 1, 'an environment moves only between equal Pythons'
        self.root = self.place/f'{len(self.stages)}-{found[2] or "last"}'
        self.root.mkdir(parents=True)
        self.stages.append((found[2], self.root))
        self.cwd, self.env, self.scope = '/', {}, {}
        self.user = self.stop = self.health = self.cmd = None

    def ARG(self, rest):
        name, _, default = shlex.split(rest)[0].partition('=')
        self.scope[name] = self.args.get(name, default)

    def ENV(self, rest):
        pairs = [x.partition('=') for x in shlex.split(rest)]
        assert all(equals for _, equals, _ in pairs)
        self.env |= {k: v for k, _, v in pairs}
        assert set(self.env) <= OPTIONS | OTHERS, f'nobody reads {set(self.env) - OPTIONS - OTHERS}'

    def WORKDIR(self, rest):
        assert rest.startswith('/')
        self.cwd = rest
        self.here(rest).mkdir(parents=True, exist_ok=True)

    def RUN(self, rest):
        (self.root/'opt').mkdir(exist_ok=True)
        words = rest if self.real else rest.replace('pip install', 'pip install --dry-run --no-deps')
        # Where pip finds its index is the user's own.
        own = {k: v for k, v in os.environ.items() if k.startswith('PIP_') or k.lower().endswith('_proxy')}
        env = {'HOME': os.environ.get('HOME', '/')} | own | self.environment() | self.scope
        done = subprocess.run(['/bin/sh', '-c', self.mapped(words)], cwd=self.here(self.cwd), env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, f'{rest}\n{done.stdout[-3000:]}'
        self.said.append(done.stdout)

    def COPY(self, rest):
        words = shlex.split(rest)
        flags = dict(w.removeprefix('--').split('=', 1) for w in words if w.startswith('--'))
        *sources, to = [w for w in words if not w.startswith('--')]
        assert set(flags) <= {'from', 'chown'} and re.fullmatch(r'[1-9]\d*:[1-9]\d*', flags.get('chown', '1:1'))
        origin = dict(self.stages[:-1])[flags['from']] if 'from' in flags else ROOT
        assert len(sources) == 1 or to.endswith('/'), 'several files need a folder'
        for source in sources:
            found = origin/source.lstrip('/')
            assert found.exists(), f'{source} is not there'
            assert 'from' in flags or not ignored(source), f'.dockerignore leaves out {source}'
            def skip(folder, names):
                inside = [(Path(folder)/n).relative_to(ROOT).as_posix() for n in names]
                return [n for n, p in zip(names, inside) if ignored(p)]
            goal = self.here(to)
            if found.is_dir():
                leave = None if 'from' in flags else skip
                shutil.copytree(found, goal, symlinks=True, dirs_exist_ok=True, ignore=leave)
            else:
                goal = goal/found.name if to.endswith('/') else goal
                goal.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, goal)

    def USER(self, rest):
        assert re.fullmatch(r'[1-9]\d*:[1-9]\d*', rest), 'a number, which is not 0, so that others can check it'
        self.user = rest

    def EXPOSE(self, rest): assert rest == self.env['PORT']

    def STOPSIGNAL(self, rest): self.stop = signal.Signals[rest]

    def HEALTHCHECK(self, rest):
        options, _, command = rest.partition(' CMD ')
        assert all(re.fullmatch(r'--(interval|timeout|start-period)=\d+s|--retries=\d+', o) for o in options.split())
        self.health = json.loads(command)

    def CMD(self, rest): self.cmd = json.loads(rest)  # a list: no shell stands between the server and its signals


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A model that says nothing sensible, at once."
    tokenizer = load_tokenizer('smollm2')
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512)
    place = tmp_path_factory.mktemp('model')/'tiny'
    LlamaForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope='module')
def image(tmp_path_factory): return Build(tmp_path_factory.mktemp('image'))((ROOT/'Dockerfile').read_text())


class Container:
    "What an image starts, with its environment and nothing of ours but what is said."
    def __init__(self, image, model, **env):
        if model and not image.here('/model').exists(): image.here('/model').symlink_to(model)
        installed = Path(image.environment()['PATH'].split(':')[0])/image.cmd[0]
        if not image.real and not installed.exists(): installed.symlink_to(SCRIPT)  # pip was not let
        real = {} if image.real else {'PYTHONPATH': str(ROOT)}
        self.env = image.environment() | real | {'OMP_NUM_THREADS': '1', 'PORT': str(free_port())} | env
        self.image, self.cwd = image, image.here(image.cwd)
        self.process = subprocess.Popen(image.cmd, env=self.env, cwd=self.cwd, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, start_new_session=True)

    def __enter__(self): return self

    def __exit__(self, *_):
        if self.process.poll() is None: self.process.kill()
        self.process.communicate()

    def healthy(self, **env) -> bool:
        done = subprocess.run(self.image.health, env=self.env | env, cwd=self.cwd, capture_output=True, timeout=10)
        return done.returncode == 0

    def wait_until_healthy(self, seconds=90):
        until = time.monotonic() + seconds
        while not self.healthy():
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < until, 'never healthy'
            time.sleep(.2)

    def status(self, key, path='/v1/models'):
        connection = http.client.HTTPConnection('127.0.0.1', int(self.env['PORT']), timeout=10)
        connection.request('GET', path, headers={'authorization': f'Bearer {key}'})
        return connection.getresponse().status

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(self.image.stop)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


def check_that_it_serves(image, model):
    with Container(image, model, LLM_DISTILL_API_KEY='k') as container:
        assert not container.healthy()  # not yet
        container.wait_until_healthy()
        assert container.healthy(http_proxy='http://127.0.0.1:9')  # a proxy of the user's is none for this
        assert (container.status('k'), container.status('other')) == (200, 401)
        code, said = container.stop()
        assert code == 0 and 'Traceback' not in said, (code, said)
        assert not container.healthy()


def test_each_line_of_the_dockerfile_does_what_it_says(image):
    assert [name for name, _ in image.stages] == ['build', None]
    assert image.user and image.stop == signal.SIGTERM and image.health and image.cmd
    assert image.env['HOST'] == '0.0.0.0' and image.env['HF_MODEL'] == '/model'
    assert 'LLM_DISTILL_API_KEY' not in image.env
    assert image.here(image.env['LLM_DISTILL_HOME']).parent.is_dir()  # the volume exists, so that its owner is right
    assert any('Would install' in said and 'torch-2' in said for said in image.said)
    assert any('Would install' in said and 'llm_distill-' in said for said in image.said)


def test_the_container_serves_says_that_it_is_well_and_ends(image, model): check_that_it_serves(image, model)


def test_the_key_of_a_container_comes_in_a_file(image, model, tmp_path):
    (tmp_path/'key').write_text('k-1\nk-2\n')
    with Container(image, model, LLM_DISTILL_API_KEY_FILE=str(tmp_path/'key')) as container:
        container.wait_until_healthy()
        assert [container.status(k) for k in ('k-1', 'k-2', 'k-3', '')] == [200, 200, 401, 401]
        code, said = container.stop()
        assert code == 0 and 'k-1' not in said, (code, said)


@pytest.mark.parametrize('said', [None, '', ' \n'])
def test_a_container_whose_key_file_holds_none_refuses(image, model, tmp_path, said):
    if said is not None: (tmp_path/'key').write_text(said)
    with Container(image, model, LLM_DISTILL_API_KEY_FILE=str(tmp_path/'key')) as container:
        _, heard = container.process.communicate(timeout=60)
        assert container.process.returncode == 1 and f'key file {str(tmp_path/"key")!r}' in heard, heard
        assert 'Traceback' not in heard


def test_without_a_key_the_container_refuses(image, model):
    with Container(image, model) as container:
        _, said = container.process.communicate(timeout=60)
        assert container.process.returncode == 1 and 'LLM_DISTILL_API_KEY' in said and 'Traceback' not in said


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='no /proc to see who listens to signals')
def test_the_container_ends_while_the_model_loads(image, model):
    with Container(image, model, LLM_DISTILL_API_KEY='k') as container:
        def listens():
            caught = re.search(r'SigCgt:\s*(\w+)', Path(f'/proc/{container.process.pid}/status').read_text())[1]
            return int(caught, 16) >> (image.stop - 1) & 1
        while not listens(): assert container.process.poll() is None, container.process.stderr.read()
        code, said = container.stop()
        assert code == 0 and 'Traceback' not in said, (code, said)


@pytest.mark.slow
def test_the_whole_image_built_for_real(tmp_path, model):
    "Gigabytes; with TORCH_INDEX of the environment, fewer."
    args = {k: os.environ[k] for k in ('TORCH_INDEX', 'EXTRAS') if k in os.environ}
    image = Build(tmp_path/'image', args, real=True)((ROOT/'Dockerfile').read_text())
    assert (image.here('/opt/llm_distill/bin')/'llm-distill').is_file()
    check_that_it_serves(image, model)


class Words(Build):
    "Python's modules only say what they would be told."
    def RUN(self, rest): super().RUN(re.sub(r'\S*python -m', 'echo', rest))


def test_build_arguments_reach_pip(tmp_path):
    def said(place, **args):
        first = (ROOT/'Dockerfile').read_text().rsplit('\nFROM', 1)[0]
        lines = ''.join(Words(tmp_path/place, args, real=True)(first).said).splitlines()
        return [line for line in lines if 'install' in line]
    assert said('none') == ['pip install -c constraints.txt torch', 'pip install -c constraints.txt .']
    assert said('both', TORCH_INDEX='file:///my wheels', EXTRAS='lora,quant') == [
        'pip install -c constraints.txt --index-url file:///my wheels torch',
        'pip install -c constraints.txt .[lora,quant]']


@pytest.mark.parametrize('line, wrong', [
    ('ADD x y', 'ADD is not tried'), ('VOLUME /x', 'VOLUME is not tried'), ('FROM python:3.11', 'down to the digest'),
    ('COPY tests ./tests', 'leaves out tests'), ('COPY nowhere ./', 'not there'), ('USER root', 'a number'),
    ('USER 0:0', 'a number'), ('ENV COLOUR=red', 'nobody reads'), ('WORKDIR $HOME', 'only RUN has a shell'),
    ('RUN false', 'false'), ('run true', 'is not tried'), ('CMD llm-distill serve', 'Expecting value'),
    ('COPY setup.py LICENSE here', 'several files')])
def test_a_wrong_line_would_be_found(tmp_path, line, wrong):
    start = next(x for x in (ROOT/'Dockerfile').read_text().splitlines() if x.startswith('FROM'))
    with pytest.raises((AssertionError, ValueError), match=wrong): Build(tmp_path/'x')(f'{start}\n{line}')


def test_continued_lines_and_comments_are_read_as_docker_does():
    text = '# c\nRUN a && \\\n  # in between\n  b\n\nCMD ["x"]\n'
    assert list(instructions(text)) == [(2, 'RUN', 'a && b'), (6, 'CMD', '["x"]')]


@pytest.mark.parametrize('path, out', [
    ('llm_distill/cli.py', False), ('llm_distill/__pycache__/cli.pyc', True), ('llm_distill/serving/__pycache__', True),
    ('llm_distill/data/prompts.jsonl', False), ('setup.py', False), ('tests/test_docker.py', True), ('.git', True),
    ('.git/config', True), ('.env', True), ('student/model.safetensors', True), ('llm_distill2', True)])
def test_only_what_is_named_goes_into_the_build(path, out): assert ignored(path) is out


def test_a_linter_finds_nothing():
    linter = shutil.which('hadolint', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    if not linter: pytest.skip('no hadolint here')
    done = subprocess.run([linter, '--no-color', ROOT/'Dockerfile'], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -- compose.yaml ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def compose(): return yaml.safe_load((ROOT/'compose.yaml').read_text())


@pytest.mark.parametrize('name', ['cpu', 'cuda'])
def test_a_service_fits_the_image(compose, image, name):
    service = compose['services'][name]
    assert service['profiles'] == [name] and service['build']['context'] == '.'
    arguments = {n for n in re.findall(r'^ARG (\w+)', (ROOT/'Dockerfile').read_text(), re.M)}
    assert set(service['build']['args']) <= arguments
    assert set(service['environment']) <= OPTIONS
    told = dict(service['environment'])
    secret, = service['secrets']
    assert told.pop('LLM_DISTILL_API_KEY_FILE') == f'/run/secrets/{secret}'
    assert compose['secrets'][secret]['file'].startswith('${KEY_FILE:?')  # no key, no start
    assert not any(told.values()) and 'LLM_DISTILL_API_KEY' not in told  # which `docker inspect` would show
    where = {v['target']: v for v in service['volumes']}
    assert where[image.env['HF_MODEL']]['read_only'] and where['/cache']['source'] in compose['volumes']
    assert all(image.env[n].startswith('/cache') for n in ('HOME', 'LLM_DISTILL_HOME', 'HF_HOME'))
    assert service['ports'][0].endswith(f':{image.env["PORT"]}') and '127.0.0.1' in service['ports'][0]
    assert service['read_only'] and '/tmp' in service['tmpfs'] and service['cap_drop'] == ['ALL']
    assert service['init'] and 'command' not in service and 'privileged' not in service
    devices = service.get('deploy', {}).get('resources', {}).get('reservations', {}).get('devices', [])
    assert [d['capabilities'] for d in devices] == ([['gpu']] if name == 'cuda' else [])
    assert set(service) <= {'profiles', 'image', 'build', 'environment', 'ports', 'volumes', 'secrets', 'read_only',
                            'tmpfs', 'init', 'cap_drop', 'security_opt', 'stop_grace_period', 'restart', 'deploy'}


def test_each_variable_of_compose_is_explained(compose):
    said = (ROOT/'nbs/10_serving.vllm.ipynb').read_text()
    for name in re.findall(r'\$\{(\w+)', (ROOT/'compose.yaml').read_text()): assert name in said, name


# -- names of the environment ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', sorted(OPTIONS - {'LLM_DISTILL_API_KEY'}))
def test_the_command_reads_each_name(model, name, tmp_path):
    "A wrong value is an error that shows it; a name that nobody reads would let the server start."
    env = {k: v for k, v in os.environ.items() if k not in OPTIONS} | {'HF_MODEL': str(model), 'PORT': str(free_port())}
    done = subprocess.run([SCRIPT, 'serve'], env=env | {name: 'nonsense-7'}, capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2) and 'nonsense-7' in done.stderr and 'Traceback' not in done.stderr, done.stderr
