"Handing a model to vLLM: its command line against the documented flags, and a stand-in that is started and stopped."
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import fields

import pytest
from llm_distill.serving.vllm import _NOT_THERE, run_vllm, vllm_command, vllm_environment
from llm_distill.types import BadInput, ServerError

# `vllm serve` of vLLM 0.18 and later, by its published reference: the flags that we use, and how it reads their values.
STAND_IN = f'''#!{sys.executable}
import argparse, http.server, json, os, signal, sys, threading, time
parser = argparse.ArgumentParser('vllm', allow_abbrev=False)
serve = parser.add_subparsers(required=True).add_parser('serve', allow_abbrev=False)
add = serve.add_argument
add('model_tag', nargs='?')
add('--host'), add('--port', type=int, default=8000)
add('--served-model-name', nargs='+')
add('--dtype', choices=['auto', 'bfloat16', 'float', 'float16', 'float32', 'half'], default='auto')
add('--max-model-len', type=int), add('--max-num-seqs', type=int), add('--max-logprobs', type=int, default=20)
add('--tokenizer'), add('--quantization', '-q'), add('--tensor-parallel-size', '-tp', type=int, default=1)
add('--enable-lora', action='store_true')
add('--max-lora-rank', type=int, choices=[1, 8, 16, 32, 64, 128, 256, 320, 512], default=16)
add('--lora-modules', type=json.loads, nargs='+')
add('--allowed-origins', type=json.loads, default=['*'])
add('--uvicorn-log-level', choices=['critical', 'error', 'warning', 'info', 'debug', 'trace'], default='info')
add('--shutdown-timeout', type=int, default=0), add('--chat-template')
args = parser.parse_args()
with open(os.environ['TOLD'], 'w') as f:
    json.dump({{'args': vars(args), 'env': {{k: v for k, v in os.environ.items() if k[:5] in ('VLLM_', 'CUDA_')}}}}, f)
if args.model_tag.endswith('broken'): sys.exit(3)

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200 if self.path == '/health' else 404), self.end_headers()
    def log_message(self, *_): pass

server = http.server.ThreadingHTTPServer((args.host, args.port), Health)
def stop(number, _):
    with open(os.environ['TOLD'] + '.signals', 'a') as f: f.write(signal.Signals(number).name + chr(10))
    threading.Thread(target=server.shutdown).start()
for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, stop)
server.serve_forever()
print('drained', flush=True)
'''


@pytest.fixture
def folder(tmp_path):
    place = tmp_path/'student'
    place.mkdir()
    (place/'config.json').write_text(json.dumps({'max_position_embeddings': 512, 'num_attention_heads': 4}))
    return place


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    "A directory with the stand-in, first on the PATH; gives the file where it says what it was told."
    place = tmp_path/'bin'
    place.mkdir()
    (place/'vllm').write_text(STAND_IN)
    (place/'vllm').chmod(0o755)
    monkeypatch.setenv('PATH', f'{place}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.setenv('TOLD', str(tmp_path/'told'))
    return tmp_path/'told'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def told(vllm, folder, **settings):
    "What the stand-in reads from our command line; it ends at once."
    broken = folder.parent/'broken'
    if not broken.exists(): folder.rename(broken)
    assert run_vllm(broken, port=free_port(), **settings) == 3
    return json.loads(vllm.read_text())


def test_every_option_arrives_in_words_that_vllm_knows(vllm, folder):
    found = told(vllm, folder, name='mine', dtype='bfloat16', max_model_len=4096, batch_size=7, max_logprobs=50,
                 tokenizer='owner/words', quantize='int4', gpus='2,3', cors=['https://a.example'], loglevel='WARNING',
                 api_keys=['secret'], grace=9., prompt_template=__file__)
    args = found['args']
    wanted = dict(host='127.0.0.1', served_model_name=['mine'], dtype='bfloat16', max_model_len=512, max_num_seqs=7,
                  max_logprobs=50, tokenizer='owner/words', quantization='bitsandbytes', tensor_parallel_size=2,
                  allowed_origins=['https://a.example'], uvicorn_log_level='warning', shutdown_timeout=9,
                  chat_template=__file__)
    assert {k: args[k] for k in wanted} == wanted
    assert found['env'] == {'VLLM_API_KEY': 'secret', 'VLLM_NO_USAGE_STATS': '1', 'CUDA_VISIBLE_DEVICES': '2,3'}
    assert 'secret' not in json.dumps(args)


def test_defaults_open_no_door(vllm, folder, monkeypatch):
    monkeypatch.delenv('VLLM_API_KEY', raising=False)
    args = told(vllm, folder)['args']
    assert (args['host'], args['allowed_origins'], args['served_model_name']) == ('127.0.0.1', [], ['broken'])
    assert args['shutdown_timeout'] > 0 and args['max_model_len'] is None  # what is running may end; vLLM's own limit
    assert args['dtype'] == 'auto'
    for host in ('0.0.0.0', '::', '192.0.2.1', 'example.org'):
        with pytest.raises(BadInput, match='insecure'): run_vllm(folder.parent/'broken', host, api_keys=['k'])


@pytest.mark.parametrize('more', [{'lora': 'adapter'}, {}])
def test_an_adapter_stands_beside_its_base(vllm, folder, more):
    adapter, base = folder.parent/'adapter', folder.parent/'broken'
    adapter.mkdir()
    config = {'base_model_name_or_path': str(base), 'r': 16, 'rank_pattern': {'q_proj': 40}}
    (adapter/'adapter_config.json').write_text(json.dumps(config))
    folder.rename(base)
    model, more = (base, {'lora': adapter}) if more else (adapter, {})
    assert run_vllm(model, port=free_port(), name='broken', **more) == 3
    args = json.loads(vllm.read_text())['args']
    assert (args['model_tag'], args['enable_lora'], args['max_lora_rank']) == (str(base), True, 64)
    assert args['lora_modules'] == [{'name': 'broken', 'path': str(adapter)}]
    assert args['served_model_name'] == ['broken-base']  # two models, two names


@pytest.mark.parametrize('settings, word', [
    ({'device': 'cpu'}, '--device'), ({'max_concurrent': 5}, '--max-concurrent'),
    ({'torch_compile': 'default'}, 'compiles'), ({'static_cache': True}, '--static-cache'),
    ({'architecture': 'encoder-decoder'}, '--architecture'), ({'task': 'transcribe'}, '--task'),
    ({'prompt_template': 'alpaca'}, 'Jinja'), ({'profile': 'trace.json'}, '--profile'),
    ({'quantize': 'int8'}, '--quantize int8'), ({'api_keys': ['a', 'b']}, 'one key'),
    ({'gpus': '0,1,2'}, '4 attention'), ({'port': 0}, 'port'), ({'dtype': 'int3'}, 'dtype'),
    ({'lora': '.'}, 'no adapter')])
def test_what_it_has_no_word_for_is_refused_before_anything_starts(vllm, folder, settings, word):
    with pytest.raises(BadInput, match=word): run_vllm(folder, **{'port': free_port()} | settings)
    assert not vllm.exists()


@pytest.mark.parametrize('config', [{'use_dora': True}, {'modules_to_save': ['lm_head']}, {'r': 1000}])
def test_adapters_that_it_cannot_add_are_refused(folder, config):
    (folder/'adapter_config.json').write_text(json.dumps({'base_model_name_or_path': 'owner/base', 'r': 8} | config))
    with pytest.raises(BadInput, match='merge it'): vllm_command(folder)


def test_every_option_of_our_server_is_known_here(vllm, folder):
    "So that a new one is either translated or refused, and never dropped."
    with pytest.raises(TypeError, match='no option'): run_vllm('smollm2', colour='red')
    options = pytest.importorskip('llm_distill.serving.options').ServeOptions
    known = {*vllm_command.__annotations__, *run_vllm.__annotations__, *_NOT_THERE, 'engine'}
    assert {f.name for f in fields(options)} <= known
    folder.rename(folder.parent/'broken')
    assert run_vllm(**vars(options(str(folder.parent/'broken'), port=free_port(), engine='vllm', api_keys=['k']))) == 3


def test_without_vllm_it_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setenv('PATH', '')
    with pytest.raises(ImportError, match='-m pip install vllm$'): run_vllm(folder)


def test_the_command_hands_over(vllm, folder, command):
    folder.rename(folder.parent/'broken')
    words = ['serve', folder.parent/'broken', '--engine', 'vllm', '--port', free_port(), '--api-key', 'k']
    done = command(*words)
    assert done.returncode == 3, done.stderr  # the stand-in's
    assert json.loads(vllm.read_text())['env']['VLLM_API_KEY'] == 'k'
    done = command(*words, '--static-cache')
    assert (done.returncode, done.stderr.count('\n')) == (1, 1) and '--static-cache has no counterpart' in done.stderr
    done = command(*words, env=os.environ | {'PATH': ''})
    assert (done.returncode, done.stderr.count('\n')) == (1, 1) and 'pip install vllm' in done.stderr


def test_the_name_vllm_is_not_ours():
    "Nothing here hides the real package, nor is taken for it."
    code = ('import importlib.util, llm_distill.serving.vllm as ours; found = importlib.util.find_spec("vllm"); '
            'assert found is None or found.origin != ours.__file__; import sys; print("vllm" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'


def test_a_port_in_use_is_an_error_at_once(vllm, folder):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0)), taken.listen()
        with pytest.raises(ServerError, match='cannot listen'): run_vllm(folder, port=taken.getsockname()[1])
    assert not vllm.exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_it_starts_answers_and_drains(vllm, folder, number):
    port = free_port()
    code = (f'import sys; from llm_distill.serving.vllm import run_vllm; '
            f'sys.exit(run_vllm({str(folder)!r}, port={port}, on_ready=lambda url: print(url, flush=True)))')
    ours = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                            start_new_session=True)
    assert ours.stdout.readline().strip() == f'http://127.0.0.1:{port}/v1'
    with urllib.request.urlopen(f'http://127.0.0.1:{port}/health') as reply: assert reply.status == 200
    if number == signal.SIGINT: os.killpg(ours.pid, number)  # as a terminal does, to all of its group
    else: ours.send_signal(number)
    assert ours.wait(20) == 0 and 'drained' in ours.stdout.read()
    ours.stdout.close()
    assert (vllm.parent/'told.signals').read_text().split() == [signal.Signals(number).name]  # once


def test_a_killed_engine_is_told_as_shells_do(vllm, folder):
    killed = f'#!{sys.executable}\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n'
    (vllm.parent/'bin/vllm').write_text(killed)
    assert run_vllm(folder, port=free_port()) == 128 + signal.SIGKILL


def test_from_a_thread_it_runs_too_and_handlers_come_back(vllm, folder):
    before, codes = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: codes.append(told(vllm, folder)['args']['host']))
    thread.start(), thread.join(30)
    assert codes == ['127.0.0.1']
    told(vllm, folder)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_key_is_in_no_command_line(vllm, folder):
    port = free_port()
    code = (f'import sys; from llm_distill.serving.vllm import run_vllm; run_vllm({str(folder)!r}, port={port}, '
            'api_keys=sys.stdin.read().split(), on_ready=lambda url: print("ready", flush=True))')
    ours = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ours.stdin.write('sk-hidden'), ours.stdin.close()
    assert ours.stdout.readline() == 'ready\n'
    try: seen = subprocess.run(['ps', '-eo', 'args'], capture_output=True, text=True).stdout
    except FileNotFoundError: seen = ''
    ours.terminate()
    assert ours.wait(20) == 0
    ours.stdout.close()
    assert 'sk-hidden' not in seen
    assert json.loads(vllm.read_text())['env']['VLLM_API_KEY'] == 'sk-hidden'


def test_the_environment_of_the_user_holds(monkeypatch):
    monkeypatch.setenv('VLLM_NO_USAGE_STATS', '0')
    assert vllm_environment() == {'VLLM_NO_USAGE_STATS': '0'}
