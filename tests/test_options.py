"What can be set about a server, by flag, by environment and in Python, seen from outside; tiny models of every kind."
import io
import json
import os
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
from conftest import ROOT, SCRIPT
from llm_distill import serve
from llm_distill.models import find_model, load_model, load_tokenizer
from llm_distill.types import NoSuchModel

sys.path.insert(0, str(ROOT/'tests/benchmarks'))
from load import tiny_model  # noqa: E402

PROMPT = [504, 2632, 314, 260, 1234, 99]


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny_model(tmp_path_factory.mktemp('tiny'))


def sdk(url, **how): return openai.OpenAI(base_url=url, api_key='none', max_retries=0, timeout=120, **how)


@contextmanager
def command(*words, **environ):
    "The URL of a server that was started by the command; it must end well when it is told to."
    process = subprocess.Popen([SCRIPT, 'serve', *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | environ)
    try:
        said = process.stdout.readline()
        assert ' answers at ' in said, process.communicate(timeout=30)
        yield said.split(' answers at ')[1].split()[0]
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def slowly(model, **how) -> list[list[int]]: # What `generate` writes
    ids = torch.tensor([PROMPT])
    with torch.no_grad(): out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **how)
    return out[:, len(PROMPT):].tolist()


def completed(url, **how) -> list[str]:
    with sdk(url) as client:
        model = client.models.list().data[0].id
        said = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, **how)
    return [c.text for c in said.choices]


def test_the_environment_sets_a_server_up(folder):
    told = dict(HF_MODEL=str(folder), PORT='0', TORCH_DTYPE='fp32', BATCH_SIZE='2', MAX_MODEL_LEN='128',
                MODEL_NAME='mine')
    with command('--max-model-len', 96, **told) as url, sdk(url) as client:
        assert client.models.list().data[0].id == 'mine'
        with urllib.request.urlopen(url.removesuffix('/v1') + '/metrics') as reply: figures = reply.read().decode()
        assert 'llm_distill_slots 2' in figures and 'llm_distill_capacity_tokens 192' in figures, 'a flag goes first'
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model='mine', prompt=PROMPT*16, max_tokens=1)
        assert error.value.code == 'context_length_exceeded'


@pytest.mark.parametrize('words, said', [
    (['--dtype', 'int3'], 'dtype is one of'), (['--batch-size', '0'], 'batch_size'),
    (['--task', 'sing'], 'task is one of'), (['--port', '-1'], 'port must be 0 or more'),
    (['--lora', 'nowhere'], 'nowhere'),
    (['--prompt-template', 'no.jinja'], 'no.jinja')])
def test_what_cannot_be_is_said_in_one_line(folder, words, said):
    done = subprocess.run([SCRIPT, 'serve', folder, '--port', '0', *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and said in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_an_adapter_is_merged_and_a_search_is_generates(folder, tmp_path):
    peft = pytest.importorskip('peft')
    torch.manual_seed(1)
    base = load_model(folder, 'cpu', torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules='all-linear', init_lora_weights=False))
    model.save_pretrained(tmp_path/'adapter')
    merged, tokenizer = model.merge_and_unload(), load_tokenizer(folder)
    def texts(rows): return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    with serve(folder, lora=str(tmp_path/'adapter'), dtype='float32', device='cpu') as server:
        assert completed(server.url) == texts(slowly(merged)) != texts(slowly(load_model(folder, 'cpu')))
        searched = completed(server.url, n=2, extra_body={'num_beams': 3})
    assert searched == texts(slowly(merged, num_beams=3, num_return_sequences=2))
    with pytest.raises(NoSuchModel, match='no adapter'): serve(folder, lora=str(folder), device='cpu')


def test_a_model_without_a_template_gets_one(folder):
    with serve(folder, prompt_template='alpaca', device='cpu') as server, sdk(server.url) as client:
        said = client.chat.completions.create(model=client.models.list().data[0].id, max_tokens=1,
                                              messages=[{'role': 'user', 'content': 'Why?'}])
    from llm_distill.serving.loading import ALPACA
    ids = load_tokenizer(folder)(ALPACA.replace('{instruction}', 'Why?'))['input_ids']
    assert said.usage.prompt_tokens == len(ids)


def test_more_requests_than_allowed_are_told_to_come_again(folder):
    with serve(folder, batch_size=1, max_concurrent=2, max_model_len=1024, device='cpu') as server:
        def ask(_):
            with sdk(server.url) as client:
                try: return len(client.completions.create(model=folder.name, prompt=PROMPT, max_tokens=900,
                                                          extra_body={'ignore_eos': True}).choices)
                except openai.RateLimitError as e: return e.response.headers['retry-after']
        with ThreadPoolExecutor(8) as pool: found = list(pool.map(ask, range(8)))
        assert found.count(1) >= 2 and all(int(x) >= 1 for x in found if x != 1) and found.count(1) < 8
        assert len(completed(server.url, n=64)) == 64, 'one request may want many answers'


def test_a_trace(folder, tmp_path):
    with command(folder, '--port', 0, '--profile', tmp_path/'trace.json') as url: completed(url)
    assert json.loads((tmp_path/'trace.json').read_text())['traceEvents']


def test_other_kinds_of_models_are_known_by_their_config(tmp_path):
    import small
    soundfile, tokenizer = pytest.importorskip('soundfile'), small.tokenizer()
    model = small.t5(tokenizer)
    for part in (model, tokenizer): part.save_pretrained(tmp_path/'t5')
    question, expected = next(iter(small.ANSWERS.items()))
    with serve(tmp_path/'t5', device='cpu', max_model_len=64) as server, sdk(server.url) as client:
        said = client.chat.completions.create(model='t5', messages=[{'role': 'user', 'content': question}],
                                              temperature=0, max_tokens=30)
    assert said.choices[0].message.content == expected
    words = small.whisper_tokenizer()
    for part in (*small.whisper(words), words): part.save_pretrained(tmp_path/'ear')
    hertz, expected = next(iter(small.TONES.items()))
    soundfile.write(wave := io.BytesIO(), small.tone(hertz), small.RATE, format='WAV')
    with serve(tmp_path/'ear', device='cpu') as server, sdk(server.url) as client:
        heard = client.audio.transcriptions.create(model='ear', file=('a.wav', wave.getvalue()))
        with pytest.raises(openai.BadRequestError, match='transcribes'):
            client.chat.completions.create(model='ear', messages=[{'role': 'user', 'content': 'Hi'}])
    assert heard.text == expected.strip()


def test_the_gguf_file_in_a_folder_is_found(tmp_path):
    pytest.importorskip('gguf')
    (tmp_path/'a.gguf').write_bytes(b'not one')
    with pytest.raises(NoSuchModel, match='a.gguf.* is no GGUF file'): find_model(tmp_path)
    (tmp_path/'b.gguf').write_bytes(b'not one')
    with pytest.raises(NoSuchModel, match='several GGUF files.* a.gguf, b.gguf'): find_model(tmp_path)


@pytest.mark.parametrize('units', ['DEFAULT', 'AVX2'])
def test_int8_is_right_on_older_processors(units):
    code = """
import torch
from torch import nn
from llm_distill.serving.quantize import Int8Linear
torch.manual_seed(0)
linear, x = nn.Linear(256, 32), 1 + torch.rand(9, 256)
with torch.no_grad():
    linear.weight.uniform_(.1, .2)  # sums of pairs that 16 bits do not hold
    print(float((Int8Linear(linear)(x) - linear(x)).norm()/linear(x).norm()))"""
    said = subprocess.run([sys.executable, '-c', code], env=os.environ | {'ONEDNN_MAX_CPU_ISA': units}, text=True,
                          capture_output=True, check=True).stdout
    assert float(said) < .02


@pytest.mark.slow
def test_int8_serves(folder):
    with command(folder, '--quantize', 'int8', '--port', 0) as url:
        assert len(completed(url)) == 1


@pytest.mark.slow
def test_int8_may_be_compiled(folder):
    how = {'quantize': 'int8', 'device': 'cpu', 'batch_size': 4, 'max_model_len': 128, 'timeout': 900}
    def likely(url): # Logprobs of the first token
        with sdk(url) as client:
            model = client.models.list().data[0].id
            said = client.completions.create(model=model, prompt=PROMPT, max_tokens=1, logprobs=5)
        return said.choices[0].logprobs.top_logprobs[0]
    with serve(folder, **how) as server: plain = likely(server.url)
    with serve(folder, torch_compile='default', **how) as server, ThreadPoolExecutor(4) as pool:
        alone, fast = completed(server.url), likely(server.url)
        assert [*pool.map(lambda _: completed(server.url), range(8))] == [alone]*8
    both = plain.keys() & fast.keys()
    assert len(both) > 2 and all(abs(plain[k] - fast[k]) < .05 for k in both)


@pytest.mark.slow
@pytest.mark.parametrize('static', [False, True])
def test_a_compiled_model_says_the_same(folder, static):
    with serve(folder, dtype='float32', device='cpu') as server: plain = completed(server.url)
    with serve(folder, dtype='float32', device='cpu', batch_size=2, torch_compile='default', static_cache=static,
               max_model_len=128, timeout=900) as server: assert completed(server.url) == plain
