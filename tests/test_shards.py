"Distributions on disk: what is read is what was written, nothing damaged is, and a kill costs no more than a buffer."
import ast
import os
import random
import resource
import signal
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from llm_distill.capture import capture, draw_uniforms, sampled_rows
from llm_distill.device import trim_memory
from llm_distill.losses import topk_tail_kl
from llm_distill.models import load_tokenizer
from llm_distill.shards import Shards, ShardWriter, example_key, pack_example, unpack_example
from llm_distill.targets import collate
from llm_distill.teachers.base import Teacher
from llm_distill.teachers.local import LocalTeacher
from llm_distill.types import BadInput, CacheError, Completion, Usage

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "A forked process has no others, and sums shall be rounded alike."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Made-up examples ----------------------------------------------------------------------------------------------------
def made_up(number, k=20, longest=40, extras=False) -> dict:
    "Rows of 1 to k entries with tails from none to nearly all, a hard row now and then."
    rng = np.random.default_rng(number)
    length, vocab = int(rng.integers(1, longest)), int(rng.choice([50_000, 150_000]))
    prompt = int(rng.integers(0, length))
    ids = rng.integers(0, vocab, length)
    soft = np.arange(length) >= prompt
    top_ids, logprobs = np.zeros((length, k), np.int64), np.full((length, k), -np.inf, np.float32)
    for t in range(prompt, length):
        n = int(rng.integers(1, k + 1))
        top_ids[t, :n] = rng.choice(vocab, n, replace=False)
        logprobs[t, :n] = np.sort(np.log(rng.dirichlet(np.full(n, .3))*(1 - 10**rng.uniform(-7, -.1)) + 1e-30))[::-1]
        if rng.random() < .1: soft[t], top_ids[t], logprobs[t, 0], logprobs[t, 1:] = False, ids[t], 0., -np.inf
    labels = np.where(np.arange(length) < prompt, -100, ids)
    if rng.random() < .1 and prompt < length: labels[prompt] = 7  # not the token itself
    more = {'weight': np.float32(rng.integers(1, 5)), 'span': rng.integers(-1, 99, length).astype(np.int32),
            'span_logprob': np.where(rng.random(length) < .5, np.nan, -rng.random(length)).astype(np.float32)}
    return {'input_ids': ids, 'labels': labels, 'top_ids': np.where(np.isfinite(logprobs), top_ids, 0),
            'top_logprobs': logprobs, 'soft': soft} | (more if extras else {})


def kl(p, q):
    "Of the entries and the tail, in nats, from the definition; the tail is clamped as the losses do."
    p, q = (np.exp(x.astype(np.float64)) for x in (p, q))
    p, q = (np.concatenate([x, np.maximum(1 - x.sum(-1, keepdims=True), 1e-7)], -1) for x in (p, q))
    return (p*np.log(np.maximum(p, 1e-300)/np.maximum(q, 1e-300))).sum(-1)


def check_same(got, wanted):
    for name in set(wanted) - {'top_logprobs'}:
        np.testing.assert_array_equal(got[name], wanted[name], name)
        assert got[name].dtype == wanted[name].dtype, name
    used = np.isfinite(wanted['top_logprobs'])
    assert (np.isfinite(got['top_logprobs']) == used).all() and set(got) == set(wanted)
    if used.any(): assert np.abs(kl(wanted['top_logprobs'], got['top_logprobs'])[used.any(1)]).max() < 1e-4


def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


def write(folder, numbers, **options):
    with ShardWriter(folder, **options) as out:
        for i in numbers: out.append(made_up(i))


# Reading and writing -------------------------------------------------------------------------------------------------
def test_what_is_read_is_what_was_written(tmp_path):
    with ShardWriter(tmp_path/'s', k=64, shard_bytes=20_000, buffer_bytes=5000) as out:
        for i in range(300): assert out.append(made_up(i, 64, extras=i % 2)) == i
    shards = Shards(tmp_path/'s')
    assert len(list((tmp_path/'s').glob('*.bin'))) > 10 and len(shards) == 300 and shards.k == 64
    for i in random.Random(0).sample(range(300), 300): check_same(shards[i], made_up(i, 64, extras=i % 2))
    check_same(shards[-1], made_up(299, 64, extras=True))
    assert shards.lengths.tolist() == [len(e['labels']) for e in shards]
    with pytest.raises(IndexError): shards[300]


def test_the_tail_survives_float16():
    "Rows whose tail is smaller than the rounding of their likeliest token: float16 alone would be off by 1e-3 nats."
    rng, worst, naive = np.random.default_rng(0), 0, 0
    for _ in range(200):
        p = rng.dirichlet(np.full(20, .5), 64)*(1 - 10**rng.uniform(-7, -2, (64, 1)))
        rows = np.log(np.maximum(p, 1e-30)).astype(np.float32)
        example = {'input_ids': np.arange(64), 'labels': np.arange(64), 'top_ids': np.tile(np.arange(20), (64, 1)),
                   'top_logprobs': rows, 'soft': np.ones(64, bool)}
        worst = max(worst, kl(rows, unpack_example(pack_example(example)[0], 20)['top_logprobs']).max())
        naive = max(naive, kl(rows, rows.astype(np.float16)).max())
    assert worst < 1e-5 and naive > 1e-4, (worst, naive)


def test_fewer_columns_leave_more_to_the_tail(tmp_path):
    write(tmp_path/'s', range(20))
    for cut, whole in zip(Shards(tmp_path/'s', k=3), Shards(tmp_path/'s')):
        assert (cut['top_logprobs'] == whole['top_logprobs'][:, :3]).all()
    assert Shards(tmp_path/'s', k=30)[0]['top_ids'].shape[1] == 30


def test_workers_read_what_the_loader_reads(tmp_path):
    write(tmp_path/'s', range(40))
    def batches(workers):
        return list(DataLoader(Shards(tmp_path/'s'), 8, num_workers=workers, collate_fn=Pad()))
    for a, b in zip(batches(2), batches(0), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


class Pad:
    def __call__(self, examples): return collate(examples, 0)


def in_child(function, *args) -> tuple[int, str]:
    "Run a function in a forked process; its exit code and what it returned."
    heard, told = os.pipe()
    if not (child := os.fork()):
        code = 1
        try:
            os.write(told, repr(function(*args)).encode())
            code = 0
        except BaseException as e: os.write(told, repr(e).encode())
        finally: os._exit(code)
    os.close(told)
    with os.fdopen(heard) as f: said = f.read()
    return os.waitpid(child, 0)[1], said


def killed(function, *args, after: float):
    "Fork a process that runs a function, which is told a file to write to, and kill it some time after its first word."
    heard, told = os.pipe()
    if not (child := os.fork()):
        try: function(*args, os.fdopen(told, 'w', 1))
        finally: os._exit(1)
    os.close(told)
    with os.fdopen(heard) as f:
        first = f.readline()
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return [first, *f.read().split('\n')[:-1]]  # the last line may be half a number


forks = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks')


def private() -> int: # Bytes of memory that no file backs and somebody uses
    trim_memory()
    with open('/proc/self/status') as f: return int(next(x for x in f if x.startswith('RssAnon')).split()[1])*1024


def memory(folder, n) -> tuple[int, int]:
    "What writing and reading n examples adds to the memory, and the peak of Python's own while reading."
    one = {'input_ids': np.arange(256), 'labels': np.arange(256), 'soft': np.ones(256, bool),
           'top_ids': np.tile(np.arange(20), (256, 1)), 'top_logprobs': np.full((256, 20), -4., np.float32)}
    def fill(n):
        with ShardWriter(folder, shard_bytes=2**22, buffer_bytes=2**20) as out:
            while len(out) < n: out.append(one)
    def read(): return sum(len(e['labels']) for e in Shards(folder))
    fill(100), read()
    before = private()
    fill(n)
    assert read() == 256*n
    grown = private() - before
    tracemalloc.start()
    read()
    return grown, tracemalloc.get_traced_memory()[1]


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_does_not_grow_with_the_number_of_examples(tmp_path):
    for n in (200, 2000):
        code, said = in_child(memory, tmp_path/str(n), n)
        assert code == 0, said
        grown, peak = ast.literal_eval(said)
        assert grown < 2**23 and peak < 2**21, (n, grown, peak)
    assert sum(p.stat().st_size for p in (tmp_path/'2000').iterdir()) > 4e7


# Damage --------------------------------------------------------------------------------------------------------------
def test_a_torn_end_is_cut_off_wherever_it_is_torn(tmp_path):
    write(tmp_path/'whole', range(12))
    whole = contents(tmp_path/'whole')
    index, data = whole['index.bin'], whole['shard-00000.bin']
    rng = random.Random(1)
    for size in [0, 1, 31, 32, 33, *rng.sample(range(len(index)), 20), len(index)]:
        for junk in (b'', b'\0'*64):
            folder = tmp_path/'torn'
            folder.mkdir(exist_ok=True)
            for old in folder.iterdir(): old.unlink()
            for name, content in whole.items(): (folder/name).write_bytes(content)
            (folder/'index.bin').write_bytes(index[:size//32*32] + (junk or index[size//32*32:size]))
            (folder/'shard-00000.bin').write_bytes(data + rng.randbytes(rng.randrange(99)))  # that no index names
            (folder/'shard-00001.bin').write_bytes(b'nor this')
            assert len(Shards(folder)) == size//32
            write(folder, range(size//32, 12))
            assert contents(folder) == whole


def test_no_changed_byte_is_read_and_nothing_damaged_is_touched(tmp_path):
    write(tmp_path/'s', range(6))
    whole, rng = contents(tmp_path/'s'), random.Random(2)
    for name in ('index.bin', 'shard-00000.bin'):
        for at in [0, len(whole[name]) - 1, *rng.sample(range(len(whole[name])), 60)]:
            changed = bytearray(whole[name])
            changed[at] ^= 1 << rng.randrange(8)
            (tmp_path/'s'/name).write_bytes(changed)
            with pytest.raises(CacheError, match='damaged'): list(Shards(tmp_path/'s'))
        (tmp_path/'s'/name).write_bytes(changed[:-1] + bytes([changed[-1] ^ 1]))
        before = contents(tmp_path/'s')
        with pytest.raises(CacheError, match='damaged'): ShardWriter(tmp_path/'s')
        assert contents(tmp_path/'s') == before
        (tmp_path/'s'/name).write_bytes(whole[name])
    (tmp_path/'s/shard-00000.bin').write_bytes(whole['shard-00000.bin'][:-1])
    with pytest.raises(CacheError, match='damaged'): ShardWriter(tmp_path/'s')
    (tmp_path/'s/index.bin').unlink()
    with pytest.raises(CacheError, match='index.bin'): ShardWriter(tmp_path/'s')


@pytest.mark.parametrize('header, says', [('{"format"', 'damaged'), ('[]', 'something else'), ('{}', 'something else'),
                                          ('{"format": "llm_distill shards", "version": 9}', 'version 9')])
def test_a_foreign_folder_is_left_alone(header, says, tmp_path):
    (tmp_path/'header.json').write_text(header)
    (tmp_path/'index.bin').write_bytes(b'x'*99)
    before = contents(tmp_path)
    for opens in (Shards, ShardWriter):
        with pytest.raises(CacheError, match=says): opens(tmp_path)
    assert contents(tmp_path) == before
    (tmp_path/'header.json').unlink()
    with pytest.raises(CacheError, match='something else'): ShardWriter(tmp_path)
    with pytest.raises(BadInput, match='no shards'): Shards(tmp_path)
    assert contents(tmp_path) == {'index.bin': before['index.bin']}


def test_one_writes_at_a_time_and_others_read(tmp_path):
    with ShardWriter(tmp_path) as out:
        out.append(made_up(0)); out.flush(); out.append(made_up(1))
        with pytest.raises(CacheError, match='another process'): ShardWriter(tmp_path)
        assert len(Shards(tmp_path)) == 1
    with ShardWriter(tmp_path) as out: assert len(out) == 2


def test_another_tokenizer_is_refused(tmp_path):
    class Words:
        def get_vocab(self): return {'a': 0}
    class Others:
        def get_vocab(self): return {'a': 1}
    with ShardWriter(tmp_path, tokenizer=Words()) as out: out.append(made_up(0))
    assert len(Shards(tmp_path, tokenizer=Words())) == 1
    with pytest.raises(BadInput, match='another tokenizer'): Shards(tmp_path, tokenizer=Others())
    with pytest.raises(BadInput, match='tokenizer is'): ShardWriter(tmp_path, tokenizer=Others())


# Kills and full disks ------------------------------------------------------------------------------------------------
def write_on(folder, told):
    with ShardWriter(folder, buffer_bytes=3000, shard_bytes=40_000) as out:
        while True:
            out.append(made_up(len(out), longest=12))
            if len(out) % 7 == 0: out.flush()
            print(out.flushed, file=told)


@forks
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_kill_loses_nothing_that_was_flushed(tmp_path):
    rng, told = random.Random(3), 0
    for _ in range(12):
        told = max(told, *map(int, killed(write_on, tmp_path, after=rng.uniform(0, .1))))
        assert len(Shards(tmp_path)) >= told
    shards = Shards(tmp_path)
    assert told > 20
    for i, e in enumerate(shards): check_same(e, made_up(i, longest=12))
    with ShardWriter(tmp_path) as out:
        assert len(out) == len(shards) and example_key(made_up(0, longest=12)) in out
        assert out.append(made_up(0)) == len(shards)


def fill_the_disk(folder) -> tuple[str, int, int]:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    out, said = ShardWriter(folder, buffer_bytes=4000), ''
    while not said:
        try: out.append(made_up(len(out)))
        except CacheError as e: said = str(e)
    n, flushed = len(out), out.flushed
    with pytest.raises(CacheError): out.flush()
    assert len(Shards(folder)) == flushed
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    out.append(made_up(len(out)))
    out.close()
    return said, n, flushed


@forks
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_full_disk_says_so_and_keeps_what_was_written(tmp_path):
    code, told = in_child(fill_the_disk, tmp_path)
    assert code == 0, told
    said, n, flushed = ast.literal_eval(told)
    shards = Shards(tmp_path)
    assert 'free some space' in said and len(shards) == n + 1 > flushed > 5
    for i, e in enumerate(shards): check_same(e, made_up(i))


# Capture -------------------------------------------------------------------------------------------------------------
def llama(vocab=300, seed=0, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, initializer_range=.5, **SIZES, **options)).eval()


def texts(n, vocab=300, longest=30):
    for i in range(n):
        rng = np.random.default_rng(i)
        ids = rng.integers(0, vocab, rng.integers(2, longest))
        yield {'input_ids': ids, 'labels': np.where(rng.random(len(ids)) < .4, -100, ids)}


def expected(model, example, vocab, temperature=1.):
    "Log-probabilities before each taught token, from the model's own forward, and those places."
    ids = torch.tensor(example['input_ids'])[None]
    with torch.no_grad(): logits = model(input_ids=ids).logits[0, :, :vocab].double()
    places = [t for t in range(1, ids.shape[1]) if example['labels'][t] != -100]
    return (logits/temperature).log_softmax(-1)[[t - 1 for t in places]].numpy(), places


def check_topk(shards, model, examples, vocab, k, temperature=1.):
    for got, e in zip(shards, examples, strict=True):
        logp, places = expected(model, e, vocab, temperature)
        rest = [t for t in range(len(e['labels'])) if t not in places]
        assert not got['soft'][rest].any() and np.isinf(got['top_logprobs'][rest]).all()
        assert np.isnan(got['label_logprobs'][rest]).all() and got['soft'][places].all()
        best = -np.sort(-logp, 1)[:, :k]
        np.testing.assert_allclose(np.exp(got['top_logprobs'][places]), np.exp(best), atol=3e-4)
        np.testing.assert_allclose(np.take_along_axis(logp, got['top_ids'][places], 1), best, atol=1e-4)
        if places: assert np.abs(kl(best, got['top_logprobs'][places])).max() < 1e-4
        own = logp[range(len(places)), e['labels'][places]]
        np.testing.assert_allclose(got['label_logprobs'][places], own, rtol=2e-3)


@pytest.mark.parametrize('temperature', [1., 2.5])
def test_capture_is_the_forward_of_the_model(temperature, tmp_path):
    model, examples = llama(), list(texts(40))
    model.train()  # it must be judged without dropout, and be left as it was
    shards = capture(model, iter(examples), tmp_path, kind='topk', k=7, batch_size=3, chunk=5, temperature=temperature)
    assert model.training and shards.header['temperature'] == temperature
    check_topk(shards, model.eval(), examples, 300, 7, temperature)


def test_a_head_that_does_more_than_multiply(tmp_path):
    config = Gemma2Config(vocab_size=300, head_dim=8, final_logit_softcapping=3., initializer_range=.5, **SIZES)
    torch.manual_seed(0)
    model, examples = Gemma2ForCausalLM(config).eval(), list(texts(5))
    check_topk(capture(model, examples, tmp_path, kind='topk', k=5), model, examples, 300, 5)


class Mine(Teacher):
    "Somebody's own teacher, which gives logits and nothing else."
    gives, reads_ids = frozenset({'logits'}), True
    def __init__(self, net):
        super().__init__('mine', 'here')
        self.net = net
    def body(self, messages, **params): return {'messages': messages}
    async def attempt(self, request): return Completion('Hello', 'stop', Usage(1, 1), self.model)
    async def alogits(self, ids): return self.net(input_ids=torch.tensor([ids])).logits.detach()


def test_padded_vocabularies_and_teachers(tmp_path):
    tokenizer = load_tokenizer('smollm2')
    vocab, examples = len(tokenizer), list(texts(4))
    model = llama(vocab + 64)
    for name, teacher, given in [('model', model, tokenizer), ('local', LocalTeacher(model, tokenizer=tokenizer), None),
                                 ('mine', Mine(model), tokenizer)]:
        shards = capture(teacher, examples, tmp_path/name, given, kind='topk', k=4)
        check_topk(shards, model, examples, vocab, 4)
        Shards(tmp_path/name, tokenizer=tokenizer)
    with pytest.raises(BadInput, match='not its own'): capture(llama(300), examples, tmp_path/'a', tokenizer)
    with pytest.raises(BadInput, match='needs tokenizer'): capture(Mine(model), examples, tmp_path/'a')
    with pytest.raises(BadInput, match='lower max_length'):
        capture(llama(max_position_embeddings=8), examples, tmp_path/'a')


class Largest(TorchDispatchMode):
    size = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor): self.size = max(self.size, x.numel())
        return out


@pytest.mark.parametrize('kind', ['topk', 'sampled'])
def test_the_logits_of_a_batch_never_exist_together(kind, tmp_path):
    model, examples = llama(5000), list(texts(16, longest=60))
    with Largest() as seen: capture(model, examples, tmp_path, kind=kind, batch_size=16, chunk=16)
    assert seen.size <= 16*5000 < sum((e['labels'] != -100).sum() for e in examples)*5000/10


# Samples -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('stratified', [True, False])
def test_samples_are_unbiased_and_so_is_their_gradient(stratified, tmp_path):
    model, example, n, draws = llama(24), {'input_ids': np.arange(9), 'labels': np.arange(9)}, 1000, 6
    p = np.exp(expected(model, example, 24)[0])
    torch.manual_seed(1)
    logits = torch.randn(8, 24).requires_grad_()
    found = capture(model, [example]*n, tmp_path, kind='sampled', draws=draws, stratified=stratified, batch_size=64)
    ids, logprobs = (np.stack([e[name][1:] for e in found]) for name in ('top_ids', 'top_logprobs')) # (n, 8, k)
    shares, mean = np.exp(logprobs.astype(float)), np.zeros((8, 24))
    assert np.abs(shares*draws - np.rint(shares*draws)).max() < 1e-5 and np.abs(shares.sum(2) - 1).max() < 1e-6
    np.add.at(mean, (np.arange(8)[None, :, None], ids), shares/n)
    rows = [torch.from_numpy(x).flatten(0, 1) for x in (ids, logprobs)]
    gradient = torch.autograd.grad(topk_tail_kl(logits.repeat(n, 1), *rows).sum()/n, logits)[0].numpy()
    error = 5*np.sqrt(p*(1 - p)/draws/n) + 1e-6  # five standard errors of independent draws
    assert (np.abs(mean - p) < error).all()
    q = logits.detach().softmax(-1).numpy()
    assert (np.abs(gradient - (q - p)) < error + 1e-5).all()
    assert np.abs(q - p).max() > 10*error.max()


def test_a_proposal_is_corrected_up_to_the_order_of_one_over_n():
    z = 2*torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    p, bias = z.double().softmax(-1).numpy()[0], {}
    for draws in (4, 64):
        u = np.concatenate([draw_uniforms(0, i, 1, draws, False) for i in range(4000)])
        ids, logs = sampled_rows(z.expand(4000, -1), u, proposal=.7)
        mean = np.zeros(30)
        np.add.at(mean, ids.ravel(), np.exp(logs.astype(float)).ravel()/4000)
        bias[draws] = np.abs(mean - p).sum()
    assert bias[64] < .02 < bias[4] < .3


def test_draws_depend_on_the_seed_and_the_number_alone(tmp_path):
    model, examples = llama(), list(texts(20))
    def ids(name, n=20, **options):
        return [e['top_ids'] for e in capture(model, examples[:n], tmp_path/name, kind='sampled', **options)]
    first = ids('a')
    for name, n, options in [('b', 20, {'batch_size': 3, 'chunk': 7}), ('c', 5, {})]:
        for x, y in zip(first, ids(name, n, **options)):
            width = min(x.shape[1], y.shape[1])
            assert (x[:, :width] == y[:, :width]).mean() > .99  # batches differ in their rounding
    other = ids('d', seed=1)
    width = min(x.shape[1] for x in first + other)
    assert np.mean([(x[:, :width] != y[:, :width]).mean() for x, y in zip(first, other)]) > .1
    with pytest.raises(BadInput, match='fewer draws'): Shards(tmp_path/'a', k=2)
    with pytest.raises(BadInput, match='made_by'): ids('a', seed=1)


def capture_slowly(folder, told):
    def tell(event): print(event.done, file=told); time.sleep(.03)
    capture(llama(), texts(120), folder, kind='sampled', draws=20, batch_size=1, on_event=tell)


@forks
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_killed_capture_goes_on_and_ends_the_same(tmp_path):
    rng, done = random.Random(4), 0
    for _ in range(4):
        killed(capture_slowly, tmp_path/'killed', after=rng.uniform(0, .05))
        assert done <= (done := len(Shards(tmp_path/'killed'))) < 120
    assert done > 0
    for name in ('killed', 'whole'):
        capture(llama(), texts(120), tmp_path/name, kind='sampled', draws=20, batch_size=1)
    assert contents(tmp_path/'killed') == contents(tmp_path/'whole')


def test_half_a_window_is_finished_as_if_it_had_been_whole(tmp_path):
    model, examples = llama(), list(texts(30))
    def whole(name): return capture(model, examples, tmp_path/name, kind='sampled', draws=20, batch_size=4)
    whole('a'), whole('b')
    index = (tmp_path/'b/index.bin').read_bytes()
    for left in (0, 3, 17, 29):
        (tmp_path/'b/index.bin').write_bytes(index[:32*left + 5])
        whole('b')
        assert contents(tmp_path/'a') == contents(tmp_path/'b')


def test_another_teacher_or_other_examples_are_not_mixed_in(tmp_path):
    examples = list(texts(6))
    capture(llama(), examples, tmp_path, kind='topk')
    before = contents(tmp_path)
    with pytest.raises(BadInput, match='made_by'): capture(llama(seed=1), examples, tmp_path, kind='topk')
    with pytest.raises(BadInput, match='example 0 is another'):
        capture(llama(), examples[1:], tmp_path, kind='topk')
    with pytest.raises(BadInput, match='holds 6 examples, and 3 are given'):
        capture(llama(), examples[:3], tmp_path, kind='topk')
    with pytest.raises(BadInput, match='k is 20 there and 5 here'):
        capture(llama(), examples, tmp_path, kind='topk', k=5)
    with pytest.raises(BadInput, match='a sample has draws'): capture(llama(), examples, tmp_path/'other', k=5)
    assert contents(tmp_path) == before
    assert len(capture(llama(), texts(8), tmp_path, kind='topk')) == 8
