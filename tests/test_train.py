"The trainer as its users run it: several processes, checkpoints, interrupts, and the traps that others fell into."
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from llm_distill import (Answer, Completion, DistillConfig, DistillTrainer, Shards, ShardWriter, create_teacher,
                         make_examples)
from llm_distill.capture import capture
from llm_distill.cli import main
from llm_distill.models import load_model, load_tokenizer
from llm_distill.targets import collate
from llm_distill.types import TokenLogprobs, as_messages
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope='module')
def tokenizer(): return load_tokenizer('smollm2')


def tiny(seed=0, **more):
    torch.manual_seed(seed)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    usual = {'vocab_size': 49152, 'tie_word_embeddings': True, 'eos_token_id': 2}
    return LlamaForCausalLM(LlamaConfig(**usual | size | more))


def example(n, k=5, weight=1.):
    lots, length = np.random.default_rng(n), 4 + n
    ids = lots.integers(3, 999, length)
    top = np.sort(np.log(lots.dirichlet(np.ones(k + 1), length)[:, :k]))[:, ::-1].astype(np.float32)
    return {'input_ids': ids, 'labels': np.where(np.arange(length) < 3, -100, ids), 'top_logprobs': top,
            'top_ids': np.stack([lots.permutation(999)[:k] for _ in ids]), 'soft': np.arange(length) >= 3,
            'weight': np.float32(weight)}


EXAMPLES = [example(n) for n in range(8)]
PLAIN = dict(learning_rate=1e-2, optim='sgd', max_grad_norm=0., seed=1, precision='float32', use_cpu=True)


def trainer(folder, tokenizer, model=None, examples=EXAMPLES, **config):
    config = DistillConfig(str(folder), **PLAIN | config)
    return DistillTrainer(tiny() if model is None else model, config, examples, tokenizer)


def apart(a, b): return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))


def batch_loss(t, examples):
    with torch.no_grad(): return t.compute_loss(t.model, collate(examples, 0)).item()


# Peers' bugs ----------------------------------------------------------------------------------------------------------
def test_trl_6006_and_axolotl_2692_accumulated_batches_are_one_batch(tmp_path, tokenizer):
    "Of very different lengths and weights, so a mean of means would show."
    lots = [example(n, weight=w) for n, w in zip((1, 30, 2, 25, 3, 9, 1, 40), (1, 2, 1, 1, 5, 1, 1, 1))]
    big = trainer(tmp_path, tokenizer, examples=lots, per_device_train_batch_size=8, max_steps=2)
    small = trainer(tmp_path, tokenizer, examples=lots, per_device_train_batch_size=1, gradient_accumulation_steps=8,
                    max_steps=2)
    for t in (big, small): t.train()
    assert apart(big.model, small.model) < 1e-6


def test_axolotl_3271_the_evaluation_has_the_scale_of_the_training(tmp_path, tokenizer):
    t = trainer(tmp_path, tokenizer, per_device_eval_batch_size=8)
    t.eval_dataset = EXAMPLES
    assert t.evaluate()['eval_loss'] == pytest.approx(batch_loss(t, EXAMPLES), rel=1e-4)


def test_atropos_456_the_targets_reach_the_loss(tmp_path, tokenizer):
    "Columns that the model does not know are not dropped on the way."
    t = trainer(tmp_path, tokenizer, per_device_train_batch_size=8)
    batch = next(iter(t.get_train_dataloader()))
    assert {'top_ids', 'top_logprobs', 'soft', 'weight'} <= set(batch)
    other = [e | {'top_logprobs': e['top_logprobs'] - 1} for e in EXAMPLES]
    assert abs(batch_loss(t, other) - batch_loss(t, EXAMPLES)) > 1e-3


def test_ms_swift_8436_each_row_teaches_the_token_it_stands_at(tmp_path, tokenizer):
    "A student that is trained on rows which say 'token i' at place i comes to say them, not their neighbours."
    ids = np.arange(3, 11)
    e = {'input_ids': ids, 'labels': np.where(np.arange(8) < 2, -100, ids), 'top_ids': ids[:, None],
         'top_logprobs': np.zeros((8, 1), np.float32), 'soft': np.arange(8) >= 2, 'weight': np.float32(1)}
    t = trainer(tmp_path, tokenizer, examples=[e]*4, max_steps=40, optim='adamw_torch', learning_rate=.05, alpha=1.,
                beta=0.)
    t.train()
    with torch.no_grad(): said = t.model(torch.tensor(ids)[None]).logits[0].argmax(-1)
    assert said[1:-1].tolist() == ids[2:].tolist()


def test_padding_prompts_and_company_do_not_count(tmp_path, tokenizer):
    t = trainer(tmp_path, tokenizer)
    alone = [batch_loss(t, [e]) for e in EXAMPLES]
    taught = [(e['labels'] != -100).sum() for e in EXAMPLES]
    assert batch_loss(t, EXAMPLES) == pytest.approx(np.average(alone, weights=taught), rel=1e-5)
    noise = [e | {'top_ids': np.where(e['labels'][:, None] < 0, 7, e['top_ids'])} for e in EXAMPLES]
    assert batch_loss(t, noise) == batch_loss(t, EXAMPLES)


def test_bf16_is_not_silently_ignored(tmp_path, tokenizer):
    seen, t = [], trainer(tmp_path, tokenizer, precision='bf16', max_steps=1)
    t.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    t.train()
    assert seen[0] == torch.bfloat16 and next(t.model.parameters()).dtype == torch.float32


def test_the_teacher_is_not_saved(tmp_path, tokenizer):
    config = DistillConfig(str(tmp_path), max_steps=1, save_strategy='steps', save_steps=1, **PLAIN)
    DistillTrainer(tiny(), config, EXAMPLES, tokenizer, teacher=tiny(1, hidden_size=32)).train()
    size = (tmp_path/'checkpoint-1'/'model.safetensors').stat().st_size
    assert size < 1.2*sum(p.numel()*4 for p in tiny().parameters())


# What a Trainer's users know ------------------------------------------------------------------------------------------
@pytest.mark.parametrize('more', [{'gradient_checkpointing': True}, {'precision': 'bf16'}, {'packing': True},
                                  {'divergence': 'jsd', 'mix': .3, 'temperature': 2.}, {'freeze_embeddings': True}],
                         ids=lambda more: '-'.join(more))
def test_it_learns(tmp_path, tokenizer, more):
    t = trainer(tmp_path, tokenizer, max_steps=25, optim='adamw_torch', logging_steps=1, **more)
    t.train()
    assert t.curve[-1]['loss'] < .99*t.curve[0]['loss']


def test_a_dataset_of_shards_is_read_where_it_lies(tmp_path, tokenizer):
    with ShardWriter(tmp_path/'shards', k=5) as out:
        for e in EXAMPLES: out.append(e)
    shards = Shards(tmp_path/'shards')
    t = trainer(tmp_path, tokenizer, examples=shards, max_steps=2)
    assert t.train_dataset is shards
    t.train()
    usual = trainer(tmp_path, tokenizer, max_steps=2)
    usual.train()
    assert apart(t.model, usual.model) < 1e-4  # what is stored is rounded


def test_a_teacher_that_scores_corrects_what_the_student_writes(tmp_path, tokenizer):
    "On-policy through the interface that remote teachers have."
    answers = [{'role': 'user', 'content': 'Hi'}]
    examples = make_examples([Answer(answers, Completion('Hello there', finish_reason='stop'), {}, 0)]*2, tokenizer)
    config = DistillConfig(str(tmp_path), max_steps=2, lmbda=1., rollout_tokens=4, logging_steps=1, **PLAIN)
    t = DistillTrainer(tiny(), config, examples, tokenizer, teacher=create_teacher('local', 'smollm2'))
    t.train()
    assert t.curve[-1]['kl'] > 0


def test_samples_are_shown_on_the_way(tmp_path, tokenizer):
    told = [Answer([{'role': 'user', 'content': f'Question {i}?'}], Completion('Yes', finish_reason='stop'), {}, 0)
            for i in range(4)]
    config, seen = DistillConfig(str(tmp_path), max_steps=4, sample_frequency=2, sample_tokens=3, **PLAIN), []
    DistillTrainer(tiny(), config, told, tokenizer, eval_dataset=told, on_event=seen.append).train()
    samples = [e for e in seen if e.job == 'sample']
    assert [e.done for e in samples] == [2, 4]
    assert [row['prompt'] for row in samples[0].metrics['samples']] == ['Question 0?', 'Question 1?', 'Question 2?']
    assert samples[0].metrics['samples'][0]['teacher'] == 'Yes'
    assert [e for e in seen if e.job == 'train'][-1].done == 4


def test_what_cannot_be_is_said_before_it_starts(tmp_path, tokenizer):
    for wrong, words in (({'lmbda': .5, 'packing': True}, 'not packed'), ({'divergence': 'kl'}, 'one of forward_kl'),
                         ({'precision': 'half'}, 'bf16'), ({'temperature': 0.}, 'above 0')):
        with pytest.raises(ValueError, match=words): DistillConfig(str(tmp_path), **PLAIN | wrong)
    with pytest.raises(ValueError, match='collect its answers'):
        DistillTrainer(tiny(), DistillConfig(str(tmp_path), **PLAIN), EXAMPLES, tokenizer, teacher=LlamaForCausalLM(
            LlamaConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)))


def scalars(path, event):
    "Names and (step, value) of what a TensorBoard file holds: length, its sum, an Event, its sum, and so on."
    raw, at, found = path.read_bytes(), 0, {}
    while at < len(raw):
        length = int.from_bytes(raw[at:at + 8], 'little')
        e = event.FromString(raw[at + 12:at + 12 + length])
        at += length + 16
        for v in e.summary.value:
            if v.HasField('simple_value'): found.setdefault(v.tag, []).append((e.step, v.simple_value))
    return found


def test_tensorboard_gets_every_figure(tmp_path, tokenizer):
    events = pytest.importorskip('tensorboardX.proto.event_pb2', reason='needs the extra "dev"')
    t = trainer(tmp_path, tokenizer, max_steps=3, logging_steps=1, report_to='tensorboard')
    t.train()
    path, = tmp_path.rglob('events.out.tfevents.*')
    found = scalars(path, events.Event)
    assert [step for step, _ in found['train/tok/s']] == [1, 2, 3] and min(found['train/tok/s'])[1] > 0
    assert [rate for _, rate in found['train/learning_rate']][0] == 0
    for name in ('loss', 'kl', 'ce'):
        assert found[f'train/{name}'] == [(p['step'], pytest.approx(p[name], rel=1e-4)) for p in t.curve]


def test_wandb_gets_every_figure(tmp_path, tokenizer, monkeypatch):
    wandb = pytest.importorskip('wandb', reason='needs wandb, which no extra installs')
    for name, value in (('MODE', 'offline'), ('DIR', tmp_path), ('SILENT', 'true'), ('DISABLE_CODE', 'true')):
        monkeypatch.setenv(f'WANDB_{name}', str(value))
    t = trainer(tmp_path, tokenizer, max_steps=3, logging_steps=1, report_to='wandb')
    t.train()
    told = dict(wandb.run.summary)
    wandb.finish()
    assert {name: told[f'train/{name}'] for name in ('loss', 'kl', 'ce')} == pytest.approx(
        {name: t.curve[-1][name] for name in ('loss', 'kl', 'ce')}, rel=1e-4)
    assert told['train/global_step'] == 3 and told['train/tok/s'] > 0 and 'train/learning_rate' in told


TRAIN = '''
import json, sys, warnings
sys.path.insert(0, sys.argv[1])
from test_train import DistillConfig, DistillTrainer, EXAMPLES, PLAIN, load_tokenizer, tiny
config = DistillConfig(sys.argv[2], max_steps=4000, **PLAIN)
t = DistillTrainer(tiny(), config, EXAMPLES, load_tokenizer('smollm2'), on_event=lambda e: print(e.done, flush=True))
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    t.train()
t.train_dataset, t.args.max_steps = EXAMPLES, t.state.global_step + 2
before = t.state.global_step
t.train(resume_from_checkpoint=True)
print(json.dumps([before, t.state.global_step]), flush=True)
'''


def test_an_interrupt_keeps_a_checkpoint_and_the_trainer(tmp_path):
    words = [sys.executable, '-c', TRAIN, str(Path(__file__).parent), str(tmp_path)]
    worker = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while worker.stdout.readline().strip() not in ('3', ''): pass
    worker.send_signal(signal.SIGINT)
    out, err = worker.communicate(timeout=120)
    assert worker.returncode == 0, err[-2000:]
    before, after = json.loads(out.splitlines()[-1])
    assert 3 <= before < 4000 and after == before + 2 and (tmp_path/f'checkpoint-{before}').exists()


# Several processes ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def student(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp('student')/'tiny'
    tiny().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
    path = tmp_path_factory.mktemp('answers')/'answers.jsonl'
    texts = ['Yes.', 'A long answer about rivers and the sea.', 'No', 'Perhaps, if it rains.', 'Four', 'I do not know.',
             'It is blue.', 'Because light is scattered by air.']
    rows = [{'messages': [{'role': 'user', 'content': f'Question {i}?'}, {'role': 'assistant', 'content': text}]}
            for i, text in enumerate(texts)]
    path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return path


def train(launcher, answers, student, out, size):
    "The command; gives its curve."
    words = ['train', answers, '--student', student, '--out', out, '--max-steps', 4, '--precision', 'float32',
             '--per-device-train-batch-size', size, '--learning-rate', 0.01, '--use-cpu', '--set', 'logging_steps=1']
    done = subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, timeout=240,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out/'train.json').read_text())['curve']


@pytest.fixture(scope='module')
def curve_of_one(tmp_path_factory, answers, student):
    return train([sys.executable, '-m', 'llm_distill.cli'], answers, student, tmp_path_factory.mktemp('one'), 4)


# Either word alone starts several; train --use-cpu keeps them on the CPU
WAYS = {'whole weights': ['--multi_gpu'],
        'FSDP2': ['--use_fsdp', '--fsdp_version', '2', '--fsdp_auto_wrap_policy', 'TRANSFORMER_BASED_WRAP']}


@pytest.mark.parametrize('way', [way if way != 'FSDP2' else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_two_processes_give_the_curve_of_one(tmp_path, answers, student, curve_of_one, way):
    launch = [sys.executable, '-m', 'accelerate.commands.launch', *WAYS[way], '--num_processes', '2',
              '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0',
              '-m', 'llm_distill.cli']
    two = train(launch, answers, student, tmp_path, 2)
    assert [p['step'] for p in curve_of_one] == [p['step'] for p in two] == [1, 2, 3, 4]
    for a, b in zip(curve_of_one, two):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-4 for k in a), (curve_of_one, two)
    assert (tmp_path/'run'/'whole').exists() == (way == 'FSDP2')  # where the shards were put together
    learnt, before = load_model(tmp_path/'student', 'cpu'), load_model(student, 'cpu')
    assert apart(learnt, before) > 1e-3 and all(p.isfinite().all() for p in learnt.parameters())
    assert 'model' in (tmp_path/'student'/'README.md').read_text().lower()


@pytest.mark.slow
def test_fsdp_1_is_refused_where_it_cannot_shard(tmp_path, answers, student):
    "accelerate, where it takes it at all on CPUs, leaves the weights whole and says nothing."
    words = [sys.executable, '-m', 'accelerate.commands.launch', '--use_fsdp', '--fsdp_sync_module_states', 'false',
             '--fsdp_cpu_ram_efficient_loading', 'false', '--num_processes', '1', '--num_machines', '1',
             '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0', '-m', 'llm_distill.cli',
             'train', answers, '--student', student, '--out', tmp_path, '--use-cpu']
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=240)
    assert done.returncode and '--fsdp_version 2' in done.stderr


def test_the_commands_judge_what_they_have_not_learnt_from(tmp_path, answers, student):
    cli, out = [sys.executable, '-m', 'llm_distill.cli'], tmp_path/'out'
    words = [*cli, 'train', answers, '--student', student, '--out', out, '--max-steps', '2', '--heldout', '.25',
             '--use-cpu']
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads((out/'train.json').read_text())
    assert told['before']['prompts'] == told['after']['prompts'] == 2
    words = [*cli, 'evaluate', out/'student', answers, '--json', tmp_path/'scores.json']
    subprocess.run(list(map(str, words)), check=True, capture_output=True, timeout=240)
    scores = json.loads((tmp_path/'scores.json').read_text())
    assert scores['prompts'] == 8 and 1 < scores['perplexity'] < 1e6


def test_the_commands_take_captured_examples_and_a_teacher(tmp_path, tokenizer, student):
    folder, out = tmp_path/'shards', tmp_path/'out'
    capture(tiny(3), EXAMPLES, folder, tokenizer, kind='topk', k=5)
    def command(*words): return main(list(map(str, words)))
    assert command('train', folder, '--student', student, '--out', out, '--max-steps', 2, '--use-cpu') == 0
    assert 'topk, 5 a token' in (out/'student'/'README.md').read_text()
    assert command('evaluate', out/'student', folder, '--teacher', student, '--json', tmp_path/'scores.json') == 0
    scores = json.loads((tmp_path/'scores.json').read_text())
    assert scores['exact'] and scores['kl'] > 0
    assert command('train', folder, '--student', student, '--out', out, '--heldout', .5) == 1


def test_likelihoods_alone_teach_in_another_tokenizer(tmp_path, tokenizer):
    "What an API without alternatives gives: the logprob of each token that it said."
    def answer(n):
        text = f'There are {n} rivers.'
        said = [c.encode() for c in text]
        return Answer(as_messages('How many?'), Completion(text, 'stop', logprobs=TokenLogprobs(
            said, np.full(len(said), -.1), [[] for _ in said], [np.zeros(0) for _ in said])))
    t = trainer(tmp_path, tokenizer, examples=[answer(n) for n in range(8)], every_span=True, logging_steps=1,
                learning_rate=.02, optim='adamw_torch', max_steps=12, alpha=1., beta=0.)
    t.train()
    assert 'kl' not in t.curve[0] and t.curve[-1]['alm'] < .7*t.curve[0]['alm']


def in_spans(seed):
    "An example of which only the likelihood of each span of three tokens is known."
    row = example(seed, k=1)
    span = np.where(row['soft'], (np.arange(len(row['soft'])) - 3)//3, -1)
    ends = np.append(span[1:] != span[:-1], True) & (span >= 0)
    return row | {'soft': np.zeros_like(row['soft']), 'span': span, 'top_logprobs': np.zeros_like(row['top_logprobs']),
                  'span_logprob': np.where(ends, -2., np.nan).astype(np.float32)}


@pytest.mark.parametrize('examples', [EXAMPLES, [in_spans(n) for n in range(8)]], ids=['tops', 'spans'])
@pytest.mark.parametrize('more', [{}, {'gradient_checkpointing': True}, {'precision': 'bf16'},
                                  {'gradient_accumulation_steps': 2, 'per_device_train_batch_size': 4}], ids=str)
def test_keeping_less_changes_no_gradient(tmp_path, tokenizer, monkeypatch, examples, more):
    "Of weights that embeddings and head share, and all others."
    def taught():
        how = {'per_device_train_batch_size': 8, 'max_steps': 2, 'learning_rate': .5} | more
        t = trainer(tmp_path, tokenizer, examples=examples, **how)
        t.train()
        return t.model
    lean = taught()
    for name in ('kept_short', 'attends_by_products'):
        monkeypatch.setattr(f'llm_distill.train.{name}', lambda *_: nullcontext())
    plain = taught()
    assert apart(lean, plain) < (.02 if 'precision' in more else 1e-4)*apart(plain, tiny())


def test_a_compiled_student_learns_the_same(tmp_path, tokenizer):
    from torch._dynamo.utils import counters
    def taught(**more):
        t = trainer(tmp_path, tokenizer, max_steps=2, **more)
        t.train()
        return t.model
    plain = taught()
    counters.clear()
    compiled = taught(torch_compile_backend='aot_eager')
    assert counters['frames']['ok'] > 0 and not counters['graph_break']
    assert apart(compiled, plain) < 1e-6
    counters.clear()
    compiled(torch.tensor([[5, 6, 7]]))
    assert not counters['frames'], 'after training it is an ordinary model again'


def test_earlier_turns_are_taught_where_asked(tmp_path, tokenizer):
    talk = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'},
            {'role': 'user', 'content': 'And?'}]
    answers = [Answer(talk, Completion('Yes.', 'stop'))]
    last, every = (trainer(tmp_path, tokenizer, examples=answers, train_on=how).train_dataset[0]
                   for how in ('last', 'all'))
    assert (every['labels'] != -100).sum() == (last['labels'] != -100).sum() + len(tokenizer('Hello.').input_ids) + 1
    with pytest.raises(ValueError, match='train_on is'): DistillConfig(str(tmp_path), train_on='first')


def test_a_student_stops_where_its_answers_end(tmp_path, tokenizer):
    model = tiny(eos_token_id=0)
    t = trainer(tmp_path, tokenizer, model)
    assert model.generation_config.eos_token_id == [0, tokenizer.convert_tokens_to_ids('<|im_end|>')]
    t.save_model(str(tmp_path/'student'))
    assert json.loads((tmp_path/'student'/'generation_config.json').read_text())['eos_token_id'] == [0, 2]


def test_a_batch_that_does_not_fit_says_what_to_lower(tmp_path, tokenizer, monkeypatch):
    t = trainer(tmp_path, tokenizer, per_device_train_batch_size=8, max_steps=1)
    def full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory')
    t.model.model.layers[0].register_forward_hook(full)
    with pytest.raises(MemoryError, match='per_device_train_batch_size=4 .it is 8. and gradient_accumulation_steps=2'):
        t.train()


def test_warnings_do_not_come_from_us(tmp_path, tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        trainer(tmp_path, tokenizer, max_steps=1).train()


SHARDED = '''
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[1])
from test_train import DistillConfig, DistillTrainer, EXAMPLES, PLAIN, collate, load_tokenizer, tiny
from llm_distill.objective import taught_weight
dist.init_process_group('gloo')
n, rank = dist.get_world_size(), dist.get_rank()
config = DistillConfig(sys.argv[2], **PLAIN)
def trainer(model): return DistillTrainer(model, config, EXAMPLES, load_tokenizer('smollm2'))
whole, sharded = tiny(), tiny()
for part in (*sharded.model.layers, sharded): fully_shard(part, mesh=init_device_mesh('cpu', (n,)))
batches = [collate(EXAMPLES[i::n], 0) for i in range(n)]
total = sum(map(taught_weight, batches))
trainer(sharded).compute_loss(sharded, batches[rank], num_items_in_batch=total).backward()
for batch in batches: trainer(whole).compute_loss(whole, batch, num_items_in_batch=total).backward()
for p, q in zip(sharded.parameters(), whole.parameters()):
    ours, theirs = p.grad.full_tensor(), q.grad/n
    assert theirs.abs().max() > 0 and (ours - theirs).abs().max() < 1e-6*theirs.abs().max() + 1e-12, (ours, theirs)
dist.destroy_process_group()
'''


def test_sharded_weights_give_the_gradient_of_whole_ones(tmp_path):
    "FSDP2, on two processes: embeddings and head are shared, and whole only inside of the model's forward."
    script = tmp_path/'sharded.py'
    script.write_text(SHARDED)
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', script,
             Path(__file__).parent, tmp_path]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=240,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
