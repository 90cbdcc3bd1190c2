"One job in one process: what it learns, how it ends, and what a second worker finds."
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from llm_distill import Answer, Completion, load_model
from llm_distill.demo import demo_prompts
from llm_distill.records import as_record
from llm_distill.recipe import is_whole_checkpoint
from llm_distill.tables import write_jsonl
from llm_distill.tuning.forms import JobError
from llm_distill.tuning.worker import run_job
from llm_distill.types import TokenLogprobs

WORKER = [sys.executable, '-m', 'llm_distill.tuning.worker']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Two models, and files to learn from."
    folder, tokenizer = tmp_path_factory.mktemp('home'), small.byte_tokenizer()
    for name, seed in (('model', 0), ('teacher', 1)):
        small.llama(tokenizer, seed).save_pretrained(folder/name)
        tokenizer.save_pretrained(folder/name)
    # real text: the questions of the demo, by subject
    rows = [{'prompt': f'Ask question {i} on {p["topic"]}.', 'completion': p['prompt'], 'split': p['split']}
            for i, p in enumerate(demo_prompts())]
    write_jsonl(folder/'questions.jsonl', [r for r in rows if r['split'] == 'train'][:160])
    write_jsonl(folder/'others.jsonl', [r for r in rows if r['split'] == 'heldout'][:30])
    write_jsonl(folder/'even.jsonl', [{'prompt': f'{i} and {i}?', 'completion': f'{2*i:03}.'} for i in range(100, 116)])
    write_jsonl(folder/'thoughts.jsonl', [as_record(thought(i), details=True) for i in range(16)])
    return folder


def thought(i, alternatives=True):
    "An answer of which a teacher told what it thought of each byte."
    said = [bytes([b]) for b in f'{i:02}.'.encode()]
    tops = [[b, b'?'] if alternatives else [] for b in said]
    return Answer([{'role': 'user', 'content': f'Number {i}?'}], Completion(f'{i:02}.', 'stop', logprobs=TokenLogprobs(
        said, np.log([.7]*3), tops, [np.log([.7, .2][:len(t)]) for t in tops])))


@pytest.fixture
def job(tmp_path, home):
    "Make a job's folder."
    def make(training_file='questions.jsonl', model='model', teacher=None, validation_file=None, method='sft', seed=7,
             name='job', **hyperparameters):
        folder = tmp_path/name
        folder.mkdir()
        request = {'model': model, 'training_file': training_file, 'method': method, 'seed': seed,
                   'hyperparameters': {'precision': 'float32', 'learning_rate': .01} | hyperparameters}
        if teacher: request['teacher'] = 'tuning:tune-0'
        (folder/'job.json').write_text(json.dumps({
            'id': 'tune-1', 'request': request, 'model': str(home/model), 'teacher': teacher and str(home/teacher),
            'training_file': str(home/training_file),
            'validation_file': validation_file and str(home/validation_file)}))
        return folder
    return make


def events(folder, kind=None):
    "Of a job; a line that was torn by a kill is none."
    found = []
    for line in (folder/'events.jsonl').read_text().splitlines():
        try: found.append(json.loads(line))
        except ValueError: pass
    return [e for e in found if kind in (None, e['type'])]


def end(folder):
    "What the last event says; there is one such."
    last, = events(folder, 'end')
    assert events(folder)[-1] == last
    return last['data']


def failed(folder):
    assert run_job(folder) == 1 and end(folder)['status'] == 'failed'
    assert 'Traceback' not in (folder/'events.jsonl').read_text()
    error = JobError(**end(folder)['error'])
    assert str(folder.parent) not in error.message
    return error


def start(folder, **more):
    return subprocess.Popen([*WORKER, folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {'OMP_NUM_THREADS': '1'}, **more)


def until(seen, worker):
    "Wait for something that a worker does."
    for _ in range(1200):
        if seen(): return
        if worker.poll() is not None: raise AssertionError(worker.stdout.read()[-3000:])
        time.sleep(.05)
    raise AssertionError('nothing happened for a minute')


# What it learns -------------------------------------------------------------------------------------------------------
def test_text_is_learnt_and_judged_by_another_file(job):
    folder = job(validation_file='others.jsonl', n_epochs=2, batch_size=16)
    assert run_job(folder) == 0
    told = end(folder)
    figures = told['metrics']
    assert told['status'] == 'succeeded' and told['error'] is None
    assert figures['loss_after'] < .7*figures['loss_before']  # untaught, it is the logarithm of 260 tokens
    assert (figures['steps'], figures['epochs'], figures['examples']) == (20, 2, 160)
    assert type(figures['trained_tokens']) is int and figures['trained_tokens'] > 160*2*20
    assert 'kl_after' not in figures
    steps = [e['data'] for e in events(folder, 'progress')]
    assert steps[-1]['step'] == steps[-1]['total_steps'] == 20 and 'kl' not in steps[-1]
    assert {'epoch', 'loss', 'learning_rate', 'tokens_per_s', 'eta_s'} <= set(steps[-1])
    assert [e['data']['name'] for e in events(folder, 'checkpoint')] == ['checkpoint-10', 'checkpoint-20']
    assert json.loads((folder/'result'/'metrics.json').read_text())['loss_after'] == figures['loss_after']
    assert load_model(folder/'result'/'model', 'cpu').config.num_hidden_layers == 2
    for name in ('training_args.json', 'metrics.json', 'model/README.md', 'model/config.json'):
        text = (folder/'result'/name).read_text()
        assert str(folder.parent) not in text and str(Path.home()) not in text and sys.prefix not in text, name


def test_what_a_file_tells_of_its_teacher_is_learnt(job):
    folder = job('thoughts.jsonl', method='distill', max_steps=12, heldout=.25, batch_size=4, divergence='jsd')
    assert run_job(folder) == 0
    figures = end(folder)['metrics']
    assert figures['kl_after'] < figures['kl_before'] and figures['loss_after'] < figures['loss_before']
    assert 'kl' in events(folder, 'progress')[-1]['data']
    assert json.loads((folder/'result'/'training_args.json').read_text())['settings']['divergence'] == 'jsd'


def test_likelihoods_alone_are_learnt_by_stretches_of_text(job, home):
    write_jsonl(home/'likely.jsonl', [as_record(thought(i, i < 0), details=True) for i in range(8)])
    folder = job('likely.jsonl', method='distill', max_steps=3)
    assert run_job(folder) == 0 and 'alm' in events(folder, 'progress')[-1]['data']


def test_a_teacher_in_memory_is_learnt(job, home):
    folder = job('even.jsonl', method='distill', teacher='teacher', max_steps=20, heldout=.25, alpha=1., beta=0.)
    assert run_job(folder) == 0
    figures = end(folder)['metrics']
    assert figures['kl_after'] < figures['kl_before']  # over the whole vocabulary: the file has no logprobs
    assert '| tuning:tune-0 |' in (folder/'result'/'model'/'README.md').read_text()


@pytest.mark.skipif(find_spec('peft') is None, reason='needs peft')
def test_an_adapter_goes_on_from_its_checkpoint(job):
    folder = job('even.jsonl', max_steps=6, save_steps=3, lora_rank=4, batch_size=4)
    assert run_job(folder) == 0
    found = {p.name for p in (folder/'result'/'model').iterdir()}
    assert 'adapter_model.safetensors' in found and 'model.safetensors' not in found
    weights = load_model(folder/'result'/'model', 'cpu', torch.float32).state_dict()
    state = folder/'checkpoints'/'checkpoint-6'/'trainer_state.json'
    state.write_text(state.read_text()[:100])
    for line in ('events.jsonl', 'result/metrics.json'): (folder/line).unlink()
    assert run_job(folder) == 0
    assert 'going on from step 3' in next(e['message'] for e in events(folder) if 'going on' in e['message'])
    again = load_model(folder/'result'/'model', 'cpu', torch.float32).state_dict()
    assert all(torch.equal(weights[n], again[n]) for n in weights)


# What cannot be -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('text, words', [
    ('{"prompt": "a", "completion": "b"}\n\n{"prompt": \n', 'bad.jsonl, line 3: not JSON'),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', 'bad.jsonl, line 1: a record'), ('', 'no answers'),
    ('{"prompt": "a", "completion": ["b"]}', 'bad.jsonl, line 1'), ('\udcff', 'cannot read')])
def test_a_file_that_cannot_be_learnt_from_is_named(job, home, text, words):
    (home/'bad.jsonl').write_bytes(text.encode(errors='surrogateescape'))
    error = failed(job('bad.jsonl'))
    assert error.code == 'bad_input' and words in error.message
    assert error.param == (None if words == 'no answers' else 'training_file')


@pytest.mark.parametrize('how, words', [
    ({'model': 'none'}, 'none'), ({'training_file': 'none.jsonl'}, 'nothing at none.jsonl'),
    ({'method': 'distill'}, 'no answer in the training file has logprobs'), ({'alpha': .5}, 'is for method'),
    ({'divergence': 'kl', 'training_file': 'thoughts.jsonl', 'method': 'distill'}, 'one of forward_kl'),
    ({'lora_rank': 4, 'keep_every': 2}, 'needs its base'), ({'no_such_thing': 1}, 'no_such_thing'),
    ({'max_length': 8}, 'no examples')])
def test_what_cannot_be_done_is_said(job, how, words):
    error = failed(job(**how))
    assert error.code == 'bad_input' and words in error.message


def test_code_that_comes_with_a_model_is_never_run(job, home):
    folder = shutil.copytree(home/'model', home/'coded')
    (folder/'config.json').write_text(json.dumps({
        'model_type': 'mine', 'auto_map': {'AutoConfig': 'mine.Config', 'AutoModelForCausalLM': 'mine.Model'}}))
    (folder/'mine.py').write_text(f'open({str(home/"was-run")!r}, "w")')
    worker = start(job(model='coded'), stdin=subprocess.PIPE)
    log = worker.communicate('y\ny\ny\n', timeout=100)[0]
    assert worker.returncode == 1 and 'trust_remote_code' in log and not (home/'was-run').exists()


# How it ends ----------------------------------------------------------------------------------------------------------
LONG = dict(training_file='even.jsonl', max_steps=250, save_steps=5, batch_size=8)
TOKENS = 250*8*5  # three digits, a point and the end of the turn


def test_a_stopped_job_goes_on_in_a_second_worker(job):
    folder = job(**LONG)
    worker = start(folder)
    until(lambda: (folder/'events.jsonl').exists() and events(folder, 'progress'), worker)
    assert run_job(folder) == 3  # somebody has it
    assert json.loads((folder/'worker.json').read_text()) == {'pid': worker.pid}
    (folder/'stop').touch()
    log = worker.communicate(timeout=60)[0]
    assert worker.returncode == 0, log
    told = end(folder)
    step = told['metrics']['steps']
    assert told['status'] == 'cancelled' and 1 <= step < 250 and not (folder/'result'/'model').exists()
    assert is_whole_checkpoint(folder/'checkpoints'/f'checkpoint-{step}')
    assert events(folder, 'progress')[-1]['data']['step'] == step == events(folder, 'checkpoint')[-1]['data']['step']
    assert all(e['message'] in log for e in events(folder))
    (folder/'stop').unlink()
    (folder/'events.jsonl').write_text('')
    assert run_job(folder) == 0
    assert (end(folder)['metrics']['steps'], end(folder)['metrics']['trained_tokens']) == (250, TOKENS)
    assert end(folder)['metrics']['seconds'] > told['metrics']['seconds']


def test_a_killed_job_goes_on_from_the_newest_whole_checkpoint(job):
    folder = job(**LONG)
    worker = start(folder)
    until(lambda: (folder/'events.jsonl').exists() and len(events(folder, 'checkpoint')) > 2, worker)
    worker.kill()
    worker.communicate()
    kept = sorted((p for p in (folder/'checkpoints').iterdir() if is_whole_checkpoint(p)),
                  key=lambda p: int(p.name.split('-')[1]))
    with (kept[-1]/'optimizer.pt').open('r+b') as f: f.truncate(1000)
    with (folder/'events.jsonl').open('a') as f: f.write('{"at": 1, "level": "in')
    assert run_job(folder) == 0
    said = [e['message'] for e in events(folder)]
    assert any(m.endswith(f'going on from step {kept[-2].name.split("-")[1]}') for m in said), said
    assert (end(folder)['metrics']['steps'], end(folder)['metrics']['trained_tokens']) == (250, TOKENS)
    assert len(list((folder/'checkpoints').iterdir())) == 2


def test_sigterm_while_it_loads_ends_it_at_once(job):
    folder = job(**LONG)
    worker = start(folder)
    until((folder/'worker.json').exists, worker)
    worker.terminate()
    log = worker.communicate(timeout=60)[0]
    assert worker.returncode == 0, log
    assert end(folder)['status'] == 'cancelled' and not events(folder, 'progress')


def test_a_job_that_was_cancelled_before_is_not_begun(job):
    folder = job(**LONG)
    (folder/'stop').touch()
    assert run_job(folder) == 0
    assert end(folder)['status'] == 'cancelled' and not (folder/'checkpoints').exists()


def test_a_full_disk_fails_the_job_and_says_so(job):
    "No file may be larger than the weights are, and the optimizer's state is twice that."
    folder = job(**LONG)
    worker = start(folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)))
    log = worker.communicate(timeout=100)[0]
    assert worker.returncode == 1 and 'Traceback' in log
    assert (end(folder)['status'], end(folder)['error']['code']) == ('failed', 'disk_full')
    assert 'Traceback' not in (folder/'events.jsonl').read_text()
    assert not list((folder/'checkpoints').glob('checkpoint-*'))  # what was torn makes room


REPORT = '''
import resource, sys
from llm_distill.tuning.telling import Reporter
tell = Reporter(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 100_000))
written = [tell('message', f'number {i}') for i in range(20)]
assert written[0] and not written[-1] and not tell.insist(.3)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
assert tell('end', 'number 20') and not tell('message', 'too late') is None
'''


def test_events_wait_for_room_on_the_disk(tmp_path):
    with (tmp_path/'log').open('w') as log:  # it is full as well
        subprocess.run([sys.executable, '-c', REPORT, tmp_path], check=True, stdout=log, timeout=60)
    assert [e['message'] for e in events(tmp_path)] == [f'number {i}' for i in range(21)]


def test_words_that_are_no_folder(tmp_path):
    done = subprocess.run([*WORKER, tmp_path/'none'], capture_output=True, text=True)
    assert done.returncode == 2 and 'usage' in done.stderr
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # jobs run in this process have left it alone
    assert run_job(tmp_path) == 1 and 'no job.json' in end(tmp_path)['error']['message']
