"Every family has every method, plain and awaited, with the same results; and says honestly what it gives."
import asyncio
import base64
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT
from families import FAMILIES, posts, server, teacher
from llm_distill import Price, create_teacher
from llm_distill.teachers import openai as openai_teachers
from llm_distill.types import BadInput, BadReply, NotGiven, TokenLogprobs
from servers import Fault, Provider, toy

ASK, SYSTEM = [{'role': 'user', 'content': 'Name a thing in the world.'}], 'Be short.'
PROMPTS = ['What do you see?', ASK, 'Which animal may it be?']
TEXT = 'Make the sun small'
GIVES = {'openai': {'top_logprobs'}, 'deepseek': {'top_logprobs'}, 'anthropic': set(),
         'openai-compatible': {'top_logprobs'}, 'vllm': {'top_logprobs', 'prompt_logprobs'},
         'sglang': {'top_logprobs', 'prompt_logprobs'},
         'llama.cpp': {'top_logprobs'}, 'ollama': {'top_logprobs'}, 'custom': {'logits'},
         'local': {'top_logprobs', 'prompt_logprobs', 'logits'}}
pytestmark = pytest.mark.filterwarnings('ignore:claude.*takes no such parameter')


class Words:
    "What `as_model` needs of a tokenizer, with the tokens of the test servers."
    def get_vocab(self): return {f'{i}': i for i in range(len(toy.PIECES))}
    def decode(self, ids): return toy.untokenise(ids)


def plain(found):
    "A result without what differs from call to call, ready to be compared."
    if isinstance(found, list): return [plain(f) for f in found]
    if isinstance(found, Exception): return type(found).__name__, str(found)
    if isinstance(found, torch.Tensor): return found.shape, found.as_subclass(torch.Tensor).numpy().tobytes()
    if isinstance(found, np.ndarray): return np.nan_to_num(found.astype(float)).round(5).tolist()
    if isinstance(found, TokenLogprobs): return {k: plain(v) for k, v in vars(found).items()}
    if hasattr(found, 'latency_s'):
        return {k: plain(v) for k, v in vars(found).items() if k not in ('latency_s', 'request_id')}
    return found


def calls(t):
    "Each method with arguments that its teacher understands, by the names of its two forms."
    samples = {} if t.gives - {'text'} else {'estimate': 'samples', 'n': 1}
    logprobs = {'logprobs': 3} if 'top_logprobs' in t.gives else {}
    short = {'temperature': 0., 'max_tokens': 3 if hasattr(t, 'llm') else 12}
    return [('generate', 'agenerate', (ASK, SYSTEM), short | logprobs),
            ('generate_text', 'generate_text_async', ('Where is it?', 3, 0.), {}),
            ('generate_batch', 'agenerate_batch', (PROMPTS, SYSTEM), short),
            ('score', 'ascore', (TEXT, 3), {}), ('get_logits', 'aget_logits', (TEXT,), samples),
            ('get_logits_batch', 'aget_logits_batch', (['Take a book', TEXT],), samples), ('probe', 'aprobe', (), {})]


def plainly(t, skip=()):
    "All methods, without await."
    found = {}
    for name, _, args, more in calls(t):
        try: found[name] = plain(getattr(t, name)(*args, **more)) if name not in skip else None
        except NotGiven as e: found[name] = 'NotGiven', str(e).partition(')')[2]
    return found


async def awaited(t, skip=()):
    "All methods, awaited."
    found = {}
    for name, other, args, more in calls(t):
        try: found[name] = plain(await getattr(t, other)(*args, **more)) if name not in skip else None
        except NotGiven as e: found[name] = 'NotGiven', str(e).partition(')')[2]
    return found


async def inside(t, skip=()): return plainly(t, skip)


def check(found, gives):
    "What every family answers."
    assert found['generate']['text'] and found['generate_text'] and len(found['generate_batch']) == 3
    assert found['generate']['finish_reason'] in ('stop', 'length')
    assert ('top_logprobs' in gives) == (found['generate']['logprobs'] is not None)
    assert ('prompt_logprobs' in gives) == isinstance(found['score'], dict)
    assert found['get_logits'][0][0] == 1 and len(found['get_logits_batch']) == 2


@pytest.mark.parametrize('family', [f for f in FAMILIES if f not in ('ollama', 'llama.cpp')])
def test_all_methods_are_the_same_plain_and_awaited(family):
    results = []
    for way in (plainly, lambda t: asyncio.run(awaited(t)), lambda t: asyncio.run(inside(t))):
        with server(family, key='k') as p, teacher(family, p) as t:
            assert t.gives == {'text'} | GIVES[family]
            results.append(way(t))
            assert t.stats.total == t.stats.successful + t.stats.failed == len(posts(p)) and t.stats.retried == 0
    check(results[0], GIVES[family])
    assert results[0] == results[1] and results[0] == results[2]


def test_a_plain_script():
    code = ('import sys; sys.path.insert(0, "tests")\nfrom families import *\n'
            'for family in FAMILIES:\n'
            '    with server(family) as p, teacher(family, p) as t:\n'
            '        print(family, len(t.generate_text("Hello", 5)) > 0)\n')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [w for f in FAMILIES for w in (f, 'True')], done.stderr
    assert 'Traceback' not in done.stderr and 'never' not in done.stderr, done.stderr


@pytest.fixture(scope='module')
def local():
    with create_teacher(config={'use_api': False, 'model': 'smollm2', 'api_type': 'openai'}) as t: yield t


def test_a_local_model(local):
    found = plainly(local, skip=('probe',))
    check(found, GIVES['local'])
    assert found == asyncio.run(awaited(local, ('probe',))) == asyncio.run(inside(local, ('probe',)))
    ids = local.tokenizer(TEXT, return_tensors='pt')['input_ids']
    with torch.inference_mode(): exact = local.llm(input_ids=ids).logits.float()
    logits, scored = local.get_logits(TEXT), local.score(TEXT, 5).logprobs
    assert not logits.estimated and torch.allclose(logits.as_subclass(torch.Tensor), exact, atol=1e-3)
    logp = exact.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0].numpy()
    assert np.allclose(scored.logprobs[1:], logp, atol=1e-3) and np.isnan(scored.logprobs[0])
    assert b''.join(scored.tokens).decode() == TEXT and all(len(r) == 5 for r in scored.top_logprobs[1:])
    assert plain(local.score(ids[0].tolist(), 5)) == plain(local.score(TEXT, 5))
    model, batch = local.as_model(local.tokenizer), local.tokenizer([TEXT, 'Hi'], return_tensors='pt', padding=True)
    out = model(**batch).logits
    assert isinstance(model, torch.nn.Module) and not model.estimated
    assert out.shape == (*batch['input_ids'].shape, 49_152)
    row = [i for i, n in enumerate(batch['attention_mask'].sum(1)) if n == ids.shape[1]][0]
    assert torch.allclose(out[row].as_subclass(torch.Tensor)[-ids.shape[1]:], exact[0], atol=1e-3)


def test_a_local_model_counts_what_it_was_asked(local):
    before = local.stats.total
    local.generate('Hi', max_tokens=1, temperature=0)
    local.score(TEXT)
    local.get_logits(TEXT)
    assert local.stats.total == before + 3


@pytest.mark.parametrize('family', FAMILIES)
def test_closing_leaves_no_connection(family):
    async def everything(t):
        await t.agenerate_batch(PROMPTS)
        t.generate('Hello')
    async def closed_by_itself():
        async with teacher(family, p) as t: await everything(t)
    async def closed_plainly():
        with teacher(family, p) as t: await everything(t)
    with server(family) as p:
        with teacher(family, p) as t: t.generate_batch(PROMPTS)
        assert p.until(lambda p: p.open == 0), 'with'
        asyncio.run(closed_by_itself())
        assert p.until(lambda p: p.open == 0), 'async with'
        asyncio.run(closed_plainly())
        assert p.until(lambda p: p.open == 0, 2), 'with, in a running loop'


def test_loops_that_ended_leave_nothing():
    with server('openai') as p:
        with teacher('openai', p) as t:
            for _ in range(4): asyncio.run(t.agenerate('Hello'))
        assert p.until(lambda p: p.open == 0, 2), 'connections outlived their loops and the teacher'
        assert len(t.wire._open) == 0


@pytest.mark.parametrize('family', ['vllm', 'sglang', 'custom'])
def test_a_teacher_in_place_of_a_local_model(family):
    ids = toy.tokenise(TEXT)
    vocab = 32 if family == 'custom' else len(toy.PIECES)
    with server(family) as p, teacher(family, p) as t:
        model = t.as_model(Words(), vocab)
        out = model(torch.tensor([ids, ids]), torch.tensor([[1]*len(ids), [1]*(len(ids) - 1) + [0]]))
        again = asyncio.run(inside_of(model, ids))
    assert isinstance(model, torch.nn.Module) and model.estimated == (family != 'custom') == out.logits.estimated
    logits = out.logits.as_subclass(torch.Tensor)
    assert logits.shape == (2, len(ids), vocab) and not logits[1, -1].any() and torch.equal(again, logits[:1])
    if family == 'custom': return
    assert torch.allclose(logits[0].exp().sum(-1), torch.ones(len(ids)), atol=1e-4)
    keys = toy.keys('m', ids)
    for place, key in enumerate(keys[1:]):
        best = toy.dist(key).ranked[:20]
        told = torch.tensor([toy.dist(key).logprobs[i] for i in best])
        assert torch.allclose(logits[0, place, best], told, atol=1e-4), place


async def inside_of(model, ids): return model(torch.tensor([ids])).logits.as_subclass(torch.Tensor)


@pytest.mark.parametrize('family', ['openai', 'deepseek', 'anthropic', 'llama.cpp', 'ollama'])
def test_who_cannot_stand_in_for_a_model_says_who_can(family):
    with server(family) as p, teacher(family, p) as t:
        with pytest.raises(NotGiven, match='a local model'): t.as_model(Words())


@pytest.mark.parametrize('family', [f for f, gives in GIVES.items() if gives == {'top_logprobs'}])
def test_a_top_k_becomes_an_estimate_with_a_tail(family):
    with server(family) as p, teacher(family, p) as t: logits = t.get_logits('Hello', top_k=5, max_tokens=6)
    probs = logits.as_subclass(torch.Tensor).exp()
    assert logits.estimated and logits.about == 'answer' and logits.shape[1] <= 6
    assert torch.allclose(probs.sum(-1), torch.ones(logits.shape[:2]), atol=1e-4)
    assert torch.allclose(probs[..., -1], logits.tail.float(), atol=1e-4) and (logits.tail > 0).all()


def test_text_alone_is_sampled_only_when_asked():
    with server('anthropic') as p, teacher('anthropic', p) as t:
        with pytest.raises(NotGiven, match='a local model, a custom REST service') as e: t.get_logits('Hello')
        assert 'estimate="samples"' in str(e.value) and not p.requests
        logits = t.get_logits('Hello', estimate='samples', n=6)
        assert logits.estimated and len(p.requests) == 6
        assert torch.allclose(logits.as_subclass(torch.Tensor).exp().sum(-1), torch.ones(logits.shape[:2]), atol=1e-4)
        for refused in (lambda: t.score('Hello'), lambda: t.generate('Hello', logprobs=3)):
            with pytest.raises(NotGiven): refused()
        assert len(p.requests) == 6


def test_logits_of_a_custom_service():
    with server('custom') as p, teacher('custom', p) as t, server('custom', encoding='base64') as q, \
            teacher('custom', q) as u:
        logits, packed = t.get_logits(TEXT), u.get_logits(TEXT)
        assert not logits.estimated and torch.equal(logits, packed) and logits.shape == (1, len(toy.tokenise(TEXT)), 32)
        assert t.get_logits(TEXT, 8).shape[-1] == 8 and (t.get_logits(TEXT, 40)[..., 32:] < -600).all()
        assert posts(p)[0].body == {'input': TEXT, 'return_logits': True}
        assert p.requests[0].headers['authorization'] == 'Bearer k'
    names = dict(generate='/say', logits='/all', input_field='prompt', text_field='output', logits_field='scores')
    with server('custom', **names) as p:
        fields = {'input': 'prompt', 'logits': 'scores'}
        with teacher('custom', p, generate_path='/say', logits_path='/all', fields=fields) as t:
            assert t.generate_text('Hello', 3, 0.) and torch.equal(t.get_logits(TEXT), logits)
        assert posts(p)[0].body == {'prompt': 'Hello', 'max_tokens': 3, 'temperature': 0.}
        fields = {'input': 'prompt', 'text': 'output'}
        with teacher('custom', p, generate_path='/say', logits_path=None, fields=fields) as t:
            assert t.gives == {'text'} and t.generate('Hello').text
            with pytest.raises(NotGiven): t.get_logits('Hello')
    rows = base64.b64encode(np.zeros((1, 2, 3), '<f2').tobytes()).decode()
    bad = [{'logits': [[['a']]]}, {'logits': rows}, {'logits': rows, 'shape': [1, 3, 3]}, {'logits': []},
           {'logits': 'no base 64'}, {'logits': [[[1., None]]]}, {'logits': [[[[1.]]]]}, {}]
    with server('custom', faults=[Fault('garbled', body=b) for b in bad]) as p, teacher('custom', p) as t:
        for _ in bad:
            with pytest.raises(BadReply): t.get_logits(TEXT)


@pytest.mark.parametrize('family, model, flavour', [
    ('vllm', None, 'vllm'), ('sglang', None, 'sglang'), ('openai-compatible', None, 'vllm'),
    ('openai-compatible', None, 'sglang'), ('openai-compatible', 'davinci-002', 'openai'), ('vllm', None, 'echo')])
def test_scoring_a_text(family, model, flavour):
    echo = flavour == 'echo'
    with Provider('openai', flavour='vllm' if echo else flavour) as p, create_teacher(family, model, None, p.url) as t:
        if echo: t.scoring = ('echo',)
        found, ids = t.score(TEXT, 3), toy.tokenise(TEXT)
        rows, keys = found.logprobs, toy.keys(t.model, toy.tokenise(TEXT))
        assert found.text == TEXT and len(rows) == len(ids) and 'prompt_logprobs' in t.gives
        assert b''.join(rows.tokens) == TEXT.encode() and np.isnan(rows.logprobs[0])
        truth = [toy.dist(k).logprobs[i] for i, k in zip(ids, keys)]
        assert np.allclose(rows.logprobs[1:], truth[1:], atol=1e-4)
        for key, tokens, values in list(zip(keys, rows.top_tokens, rows.top_logprobs))[1:]:
            best = toy.dist(key).ranked[:3]
            whole = [(n, toy.PIECES[i]) for n, i in enumerate(best) if '\ufffd' not in toy.piece(i)]
            assert [(n, tokens[n]) for n, _ in whole] == whole
            assert np.allclose(values[:3], [toy.dist(key).logprobs[i] for i in best], atol=1e-4)
        before = len(p.requests)
        again = t.score(ids, 3)
        assert len(p.requests) == before + 1 and np.allclose(again.logprobs.logprobs[1:], rows.logprobs[1:])
        with pytest.raises(BadInput): t.score('')


@pytest.mark.parametrize('flavour', ['vllm', 'sglang', 'openai'])
def test_scored_tokens_are_bytes_of_the_text(flavour):
    text, model = 'Make the café small', 'davinci-002' if flavour == 'openai' else 'm'
    with Provider('openai', flavour=flavour) as p, create_teacher('openai-compatible', model, None, p.url) as t:
        assert b''.join(t.score(text, 2).logprobs.tokens) == text.encode()


@pytest.mark.parametrize('flavour', ['llama.cpp', 'plain', 'dropper'])
def test_servers_that_leave_scores_out_are_caught(flavour):
    with Provider('openai', flavour=flavour) as p, create_teacher('openai-compatible', None, None, p.url) as t:
        with pytest.raises(NotGiven, match='a local model, vLLM'): t.score(TEXT)
        assert 'prompt_logprobs' not in t.gives


def test_more_than_a_server_gives_is_not_the_same_as_nothing():
    with Provider('openai', flavour='vllm', max_logprobs=20) as p, create_teacher('vllm', None, None, p.url) as t:
        with pytest.raises(Exception, match='20|max') as e: t.score(TEXT, 50)
        assert not isinstance(e.value, NotGiven), 'it gives prompt_logprobs, if fewer'


CARDS = {'plain': dict(max_logprobs=5, logprob_space='raw', temperature='honoured', n='honoured',
                       prompt_logprobs=False),
         'vllm': dict(max_logprobs=20, logprob_space='raw', token_bytes=True, n='honoured', seed='honoured',
                      prompt_logprobs=True),
         'sglang': dict(max_logprobs=100, logprob_space='raw', prompt_logprobs=True),
         'llama.cpp': dict(max_logprobs=100, logprob_space='raw', prompt_logprobs=False),
         'dropper': dict(max_logprobs=0, logprob_space='none', temperature='ignored', n='ignored', seed='ignored',
                         usage=True)}


@pytest.mark.parametrize('flavour', CARDS)
def test_the_card_of_a_server(flavour):
    with Provider('openai', flavour=flavour) as p, create_teacher('openai-compatible', None, None, p.url) as t:
        card = t.probe()
        assert {k: getattr(card, k) for k in CARDS[flavour]} == CARDS[flavour]
        sent = len(posts(p))
        assert card.requests == t.stats.total and sent <= 20
        assert t.probe() is card is asyncio.run(t.aprobe()) and len(posts(p)) == sent
        assert flavour in ('dropper',) or 'top_logprobs' in t.gives
        assert t.manifest()['card']['max_logprobs'] == card.max_logprobs and '<table>' in card._repr_html_()


def test_after_the_probe_nothing_is_asked_for_in_vain():
    with Provider('openai', flavour='dropper') as p, create_teacher('openai-compatible', None, None, p.url) as t:
        t.probe()
        sent = len(p.requests)
        with pytest.raises(NotGiven): t.generate('Hello', logprobs=5)
        assert len(p.requests) == sent
    with Provider('openai', flavour='plain') as p, create_teacher('openai-compatible', None, None, p.url) as t:
        t.probe()
        with pytest.raises(BadInput, match='5 likeliest'): t.generate('Hello', logprobs=6)


@pytest.mark.parametrize('family, model, protocol, expected', [
    ('openai', 'gpt-4o', 'openai', dict(max_logprobs=20, temperature='honoured', logprob_space='raw')),
    ('openai', 'gpt-5', 'openai', dict(max_logprobs=0, temperature='left out', usage=True)),
    ('openai', 'gpt-5-pro', 'openai', dict(max_logprobs=0, temperature='left out')),
    ('openai', 'gpt-3.5-turbo-instruct', 'openai', dict(max_logprobs=5, logprob_space='raw', temperature='honoured')),
    ('deepseek', None, 'deepseek', dict(max_logprobs=20, seed='ignored', n='ignored', temperature='honoured')),
    ('anthropic', 'claude-haiku-4-5', 'anthropic', dict(max_logprobs=0, temperature='left out', n='left out')),
    ('custom', None, 'rest', dict(max_logprobs=0, temperature='honoured', usage=False))])
def test_the_card_of_a_family(family, model, protocol, expected):
    with Provider(protocol) as p, create_teacher(family, model, 'k', p.url) as t, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        card = t.probe()
    assert {k: getattr(card, k) for k in expected} == expected


def test_logprobs_after_the_temperature_are_told_from_those_before():
    with server('vllm', logprob_space='processed') as p, teacher('vllm', p) as t:
        assert t.probe().logprob_space == 'processed'


def test_what_goes_to_openai():
    with Provider('openai') as p:
        def sent(model, **params):
            with create_teacher('openai', model, 'k', p.url) as t, warnings.catch_warnings(record=True) as told:
                warnings.simplefilter('always')
                answer = t.generate('Hello', SYSTEM, **params)
            return p.requests[-1].path.rpartition('/v1')[2], p.requests[-1].body, answer, [str(w.message) for w in told]
        path, body, answer, _ = sent('gpt-4o', temperature=0, max_tokens=9, logprobs=4)
        assert path == '/chat/completions' and body['top_logprobs'] == 4 and body['messages'][0]['role'] == 'system'
        assert b''.join(answer.logprobs.tokens).decode() == answer.text and len(answer.logprobs.top_tokens[0]) == 4
        path, body, answer, _ = sent('gpt-5-pro', max_tokens=400)
        assert (path, body['store'], body['max_output_tokens']) == ('/responses', False, 400) and not p.memory.stored
        path, body, answer, told = sent('gpt-5-mini', max_tokens=400, temperature=.3)
        assert body['max_completion_tokens'] == 400 and 'temperature' not in body and 'max_tokens' not in body
        assert len(told) == 1 and 'temperature' in told[0] and not sent('gpt-5-mini', max_tokens=400, temperature=.3)[3]
        path, body, answer, _ = sent('gpt-5.1', reasoning_effort='none', logprobs=2, temperature=.5)
        assert answer.logprobs is not None and body['temperature'] == .5
        path, body, answer, _ = sent('gpt-3.5-turbo-instruct', logprobs=5, max_tokens=4)
        assert path == '/completions' and len(answer.logprobs) == 4
        with create_teacher('openai', 'gpt-4o', 'k', p.url, api='responses') as t:
            assert len(t.generate('Hello', logprobs=2).logprobs.top_tokens[0]) == 2
        for model in ('gpt-5', 'o3', 'gpt-5-pro'):
            with create_teacher('openai', model, 'k', p.url) as t:
                with pytest.raises(NotGiven): t.generate('Hello', logprobs=2)


def test_what_goes_to_deepseek():
    with server('deepseek') as p, teacher('deepseek', p) as t, teacher('deepseek', p, thinking=True) as u:
        answer = t.generate('Hello', logprobs=3)
        assert p.requests[-1].body['thinking'] == {'type': 'disabled'} and answer.reasoning is None and answer.logprobs
        assert p.requests[-1].path == '/chat/completions' and t.model == 'deepseek-v4-flash'
        answer = u.generate('Hello', max_tokens=900)
        assert p.requests[-1].body['thinking'] == {'type': 'enabled'} and p.requests[-1].body['max_tokens'] == 900
        assert answer.reasoning.startswith('Let me think') and 'Let me think' not in answer.text and u.gives == {'text'}
        once = t.generate('Hello', thinking={'type': 'enabled'})
        assert once.reasoning and once.text
        with pytest.raises(NotGiven): u.generate('Hello', logprobs=3)


def test_what_goes_to_claude():
    with server('anthropic') as p, create_teacher('claude', 'claude-sonnet-5', 'k', p.url) as t:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            openai_teachers._warned.clear()
            for _ in range(2): t.generate([{'role': 'system', 'content': 'Be kind.'}, *ASK], temperature=.7, top_p=.9)
        assert [str(w.message).count('temperature') for w in told if 'left out' in str(w.message)] == [1]
        body = p.requests[-1].body
        assert body['system'] == 'Be kind.' and body['messages'] == ASK and not {'temperature', 'top_p'} & set(body)
        assert body['max_tokens'] and 'stream' not in body and p.requests[-1].headers['authorization'] == 'Bearer k'
        streamed = t.generate(ASK, max_tokens=30_000)
        assert p.requests[-1].body['stream'] is True and streamed.text and streamed.finish_reason == 'stop'
        assert streamed.usage.prompt_tokens and streamed.usage.completion_tokens and streamed.request_id
        thought = t.generate(ASK, max_tokens=30_000, thinking={'type': 'adaptive'})
        assert thought.reasoning and 'Let me think' not in thought.text
        assert t.generate(ASK, stop='the', max_tokens=500).finish_reason == 'stop'
    for end in ('/v1', '/v1/', '/'):
        with server('anthropic') as p, create_teacher('claude', 'claude-sonnet-5', 'k', p.url + end) as t:
            assert t.generate(ASK).text, end


def test_a_server_without_a_key_gets_none():
    with Provider('openai', flavour='llama.cpp', model='own') as p, create_teacher('llama.cpp', base_url=p.url) as t:
        assert t.model == 'own' and t.generate('Hello').model == 'own'
        assert not any('authorization' in r.headers for r in p.requests)
    with server('custom') as p, teacher('custom', p, None) as t:
        assert t.generate('Hello').text and 'authorization' not in p.requests[0].headers


def test_many_at_once_in_order():
    with server('openai', delay_s=.05) as p, teacher('openai', p) as t:
        prompts = [f'Question {i}' for i in range(60)]
        answers = t.generate_batch(prompts, max_tokens=3, concurrency=20)
        assert [r.usage.completion_tokens for r in answers] and len(answers) == 60 == len(posts(p))
        greedy = [t.generate_text(q, 8, 0.) for q in prompts[:5]]
        assert [a.text for a in t.generate_batch(prompts[:5], max_tokens=8, temperature=0.)] == greedy
        for bad in ('', [], [{'role': 'user'}], 3):
            with pytest.raises(BadInput): t.generate(bad)


def test_threads_that_each_run_a_loop():
    with server('openai') as p, teacher('openai', p, budget=50., price=Price('m', None, 1., 2.), max_tokens=5) as t:
        failed = []
        def ask(i):
            for n in range(8):
                try: asyncio.run(t.agenerate(f'{i} {n}'))
                except Exception as e: failed.append(e)
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(60)
        assert not failed and t.stats.successful == 96 and t.stats.usd_unknown == 0
        assert t.budget.spent == pytest.approx(t.stats.usd) and t.budget.reserved == pytest.approx(0, abs=1e-9)


def test_a_service_without_the_logits_that_were_promised():
    with server('custom', logits='/elsewhere') as p, teacher('custom', p) as t:
        with pytest.raises(NotGiven, match='a local model'): t.get_logits(TEXT)
        assert t.gives == {'text'}
    with server('custom', logits='/elsewhere') as p, teacher('custom', p) as t:
        assert not t.probe().logits and t.gives == {'text'}


def test_a_batch_is_not_a_string_and_somebody_asks():
    with server('openai') as p, teacher('openai', p) as t:
        for call in (lambda: t.generate_batch('hello'), lambda: t.get_logits_batch('abc'),
                     lambda: t.generate_batch(['a'], concurrency=0),
                     lambda: t.generate_batch(['a'], on_error='ignore')):
            with pytest.raises(BadInput): call()
        assert not p.requests
