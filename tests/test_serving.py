"The server with real weights: what the official SDK sees, who disturbs whom, and what is left behind."
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch
from conftest import SCRIPT
from llm_distill import serve
from llm_distill.models import encode_chat, load_model, load_tokenizer
from llm_distill.serving.engine import Engine, _widely
from llm_distill.serving.sampling import Sampling
from llm_distill.types import ServerBusy
from pydantic import BaseModel
from small_student import small_student

QUESTIONS = ['Why is the sky blue?', 'Name a planet.', 'What is 12 times 7?', 'Write a poem about rain.',
             'Who was Ada Lovelace?', 'Hi', 'word '*150, 'List three fruits.']


@pytest.fixture(scope='module')
def server():
    with serve('smollm2', device='cpu', batch_size=8, dtype="float32") as running: yield running


@pytest.fixture(scope='module')
def client(server):
    with openai.OpenAI(base_url=server.url, api_key='none', max_retries=0, timeout=120) as client: yield client


@pytest.fixture(scope='module')
def name(client): return client.models.list().data[0].id


def post(server, path, **body):
    request = urllib.request.Request(server.url.removesuffix('/v1') + path, json.dumps(body).encode(),
                                     {'content-type': 'application/json'})
    with urllib.request.urlopen(request, timeout=120) as reply: return json.loads(reply.read())


def load(server) -> dict:
    with urllib.request.urlopen(server.url.removesuffix('/v1') + '/metrics', timeout=20) as reply:
        lines = reply.read().decode().splitlines()
    return {k: float(v) for k, v in (line.rsplit(' ', 1) for line in lines if not line.startswith('#'))}


def idle(server, seconds=20) -> bool:
    until = time.monotonic() + seconds
    while True:
        now = load(server)
        if not any(now[f'llm_distill_{what}'] for what in ('running', 'waiting', 'tokens')): return True
        if time.monotonic() > until: return False
        time.sleep(.05)


def messages(text): return [{'role': 'user', 'content': text}]


# -- the engine --------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != 'linux' or sys.version_info < (3, 11), reason='frames in pieces, and counted')
def test_no_call_of_the_engines_thread_maps_memory():
    import resource  # not on Windows
    def nothing(): pass
    def faults(depth):
        if depth: return faults(depth - 1)
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(500): nothing()
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
    def worst(): return max(faults(depth) for depth in range(300))
    with ThreadPoolExecutor(1) as pool: assert pool.submit(worst).result() >= 500  # what it is against
    with ThreadPoolExecutor(1) as pool: assert pool.submit(_widely, worst).result() < 100


@pytest.fixture(scope='module')
def local(): return load_model('smollm2', 'cpu', torch.float32), load_tokenizer('smollm2')


def test_greedy_is_what_generate_says_with_random_arrivals(local):
    model, tokenizer = local
    prompts, rng = [encode_chat(tokenizer, messages(q)) for q in QUESTIONS], random.Random(0)
    slow = []
    for p in prompts:
        with torch.no_grad(): out = model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False)
        slow.append(out[0, len(p):].tolist())
    own = load_model('smollm2', 'cpu', torch.float32)
    engine = Engine(own, tokenizer, slots=3, max_context=1024, budget=64, fused=True)
    def ask(i):
        time.sleep(rng.random()*2)
        done = threading.Event()
        said = []
        engine.submit(prompts[i], Sampling(12, 0.), lambda pieces: (said.extend(pieces), done.set()), stream=False)
        assert done.wait(120)
        return [p.id for p in said if p.id >= 0]
    with ThreadPoolExecutor(16) as pool: answers = list(pool.map(ask, [*range(len(prompts))]*2))
    engine.close()
    assert answers == slow*2


def test_the_line_has_an_end_and_a_broken_request_breaks_no_other(local):
    model, tokenizer = local
    engine, told = Engine(load_model('smollm2', 'cpu'), tokenizer, slots=1, max_context=256, queue=2), []
    prompt = encode_chat(tokenizer, messages('Hi'))
    class Stubborn:
        done = False
        def mask(self): raise ValueError('no')
    broken = Sampling(4, constraint=Stubborn())
    first = engine.submit(prompt, Sampling(200, ignore_eos=True), told.extend)
    while not first.said: time.sleep(.01)
    engine.submit(prompt, broken, told.extend)
    other = engine.submit(prompt, Sampling(3, ignore_eos=True), told.extend, stream=False)
    with pytest.raises(ServerBusy) as busy: engine.submit(prompt, Sampling(4), told.extend)
    assert busy.value.retry_after >= 1 and engine.stats.refused == 1
    engine.cancel(first)
    def ends(): return [p.finish for p in told if p.finish]
    until = time.monotonic() + 60
    while len(ends()) < 2 and time.monotonic() < until: time.sleep(.02)
    assert len(other.said) == 3 and ends() == ['error', 'length']
    assert engine.stats.errors == 1 and engine.load == {'running': 0, 'waiting': 0, 'tokens': 0}
    engine.close()


def test_whoever_is_let_in_is_counted_all_the_while(tmp_path):
    folder = small_student(tmp_path)
    engine = Engine(load_model(folder, 'cpu'), load_tokenizer(folder), slots=1, max_context=64)
    told, seen = [], []
    for n in [1]*300 + [50]: last = engine.submit([5, 6, 7], Sampling(n, ignore_eos=True), told.extend, stream=False)
    while len(told) < 300:
        now = engine.load
        seen.append(now['running'] + now['waiting'])
        time.sleep(0)
    engine.close(drain=60)
    assert seen == sorted(seen, reverse=True)  # nobody is away for a moment and comes back
    assert len(last.said) == 50 and told[-1].finish == 'length'


# -- over HTTP ---------------------------------------------------------------------------------------------------------

def test_replies_are_openais(server, name, wrong):  # noqa: F811
    ask = {'model': name, 'messages': messages('Hi'), 'max_tokens': 4, 'temperature': 0}
    chat = ask | {'logprobs': True, 'top_logprobs': 2, 'n': 2}
    text = {'model': name, 'prompt': 'The cat', 'max_tokens': 3, 'logprobs': 2}
    embed = {'model': name, 'input': ['a', 'b']}
    assert not wrong('CreateChatCompletionResponse', post(server, '/v1/chat/completions', **chat))
    assert not wrong('CreateCompletionResponse', post(server, '/v1/completions', **text))
    assert not wrong('CreateEmbeddingResponse', post(server, '/v1/embeddings', **embed))


def test_the_sdk(client, name):
    ask = dict(model=name, messages=messages('What is 12 times 7?'), max_tokens=8, temperature=0)
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=20)
    rows = whole.choices[0].logprobs.content
    assert b''.join(bytes(r.bytes) for r in rows).decode() == whole.choices[0].message.content
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={'include_usage': True}))
    assert ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 8
    first = client.completions.create(model=name, prompt='The cat', max_tokens=1, temperature=0, logprobs=0)
    token, = first.choices[0].logprobs.tokens
    ids = {i: -100 for i in load_tokenizer('smollm2')(token)['input_ids']}
    other = client.completions.create(model=name, prompt='The cat', max_tokens=1, temperature=0, logit_bias=ids)
    assert other.choices[0].text != token
    vectors = client.embeddings.create(model=name, input=['rain', 'It rains.'])
    assert len(vectors.data[0].embedding) == 576 and np.isfinite(vectors.data[1].embedding).all()


def test_the_sdk_parses(client, name):
    class Product(BaseModel): result: int; words: list[str]
    found = client.chat.completions.parse(model=name, messages=messages('What is 12 times 7?'), response_format=Product,
                                          max_tokens=120, seed=3)
    choice = found.choices[0]
    assert choice.finish_reason in ('stop', 'length') and (choice.finish_reason == 'length' or choice.message.parsed)
    tool = {'type': 'function', 'function': {'name': 'look', 'parameters': {
        'type': 'object', 'properties': {'deep': {'type': 'boolean'}}, 'required': ['deep']}}}
    called = client.chat.completions.create(model=name, messages=messages('Look.'), tools=[tool], max_tokens=60,
                                            tool_choice='required').choices[0]
    assert called.finish_reason == 'tool_calls'
    assert json.loads(called.message.tool_calls[0].function.arguments).keys() == {'deep'}


def test_a_forced_call_that_is_cut_is_the_beginning_of_a_call(client, name):
    tools = [{'type': 'function', 'function': {'name': n, 'parameters': {
        'type': 'object', 'properties': {'text': {'type': 'string', 'minLength': 200}}, 'required': ['text']}}}
        for n in ('look', 'listen')]
    seen = []
    for forced, most in (('required', 1), ('required', 12), ({'type': 'function', 'function': {'name': 'look'}}, 1),
                         ({'type': 'function', 'function': {'name': 'look'}}, 30)):
        ask = dict(model=name, messages=messages('Look.'), tools=tools, max_tokens=most, tool_choice=forced,
                   temperature=0)
        whole = client.chat.completions.create(**ask).choices[0]
        parts = [c.choices[0] for c in client.chat.completions.create(**ask, stream=True)]
        assert whole.finish_reason == parts[-1].finish_reason == 'length'
        assert not whole.message.content and not any(p.delta.content for p in parts)
        calls = [t for p in parts for t in p.delta.tool_calls or ()]
        assert len(whole.message.tool_calls or ()) == sum(bool(c.id) for c in calls) <= 1
        said = ''.join(c.function.arguments or '' for c in calls)
        if calls: assert whole.message.tool_calls[0].function.arguments == said and calls[0].function.name
        seen.append((len(calls) > 0, said))
    assert [called for called, _ in seen] == [False, True, True, True] and json.loads(seen[-1][1] + '"}')


def test_what_need_not_be_read_again_is_counted(server, client, name):
    def usage(how, **more):
        found = how(model=name, max_tokens=2, temperature=0, **more)
        return (list(found)[-1] if more.get('stream') else found).usage
    def cached(found): return found.prompt_tokens_details.cached_tokens
    chat, complete, asked = client.chat.completions.create, client.completions.create, messages('An owl and a tea. '*40)
    before = load(server)['llm_distill_reused_tokens_total']
    assert cached(usage(chat, messages=asked, n=2)) == 0  # the second answer's prompt is not counted
    assert load(server)['llm_distill_reused_tokens_total'] > before
    again = usage(chat, messages=asked, n=2)
    assert cached(again) == (again.prompt_tokens - 1)//128*128 > 0
    streamed = usage(chat, messages=asked, stream=True, stream_options={'include_usage': True})
    assert cached(streamed) == cached(again) and streamed.prompt_tokens == again.prompt_tokens
    ids = [list(range(1000, 1200)), list(range(1000, 1300))]
    assert cached(usage(complete, prompt=ids)) == 128 and cached(usage(complete, prompt=ids[1])) == 256
    assert cached(usage(complete, prompt=ids[1], stream=True, stream_options={'include_usage': True})) == 256
    assert cached(usage(complete, prompt=ids, echo=True, logprobs=1)) == 0  # all of it is read, to be scored


def test_an_answer_of_a_given_form_is_no_call(client, name):
    arguments = {'type': 'object', 'properties': {}, 'additionalProperties': False}
    tool = {'type': 'function', 'function': {'name': 'look', 'parameters': arguments}}
    form = {'type': 'object', 'properties': {'name': {'const': 'look'}, 'arguments': arguments},
            'required': ['name', 'arguments'], 'additionalProperties': False}
    ask = dict(model=name, messages=messages('Look.'), tools=[tool], max_tokens=60, temperature=0, response_format={
        'type': 'json_schema', 'json_schema': {'name': 'looks', 'schema': form}})
    whole = client.chat.completions.create(**ask).choices[0].message
    parts = [c.choices[0].delta for c in client.chat.completions.create(**ask, stream=True)]
    assert json.loads(whole.content) == {'name': 'look', 'arguments': {}} and whole.tool_calls is None
    assert ''.join(d.content or '' for d in parts) == whole.content and not any(d.tool_calls for d in parts)


def test_a_seed_says_the_same_in_any_company(client, name):
    def ask(seed): return client.chat.completions.create(model=name, messages=messages('Write a poem.'), max_tokens=10,
                                                         seed=seed).choices[0].message.content
    alone = ask(5)
    with ThreadPoolExecutor(8) as pool: crowd = list(pool.map(ask, [5, 6, 7, 5, 8, 9, 10, 5]))
    assert crowd[0] == crowd[3] == crowd[7] == alone and len(set(crowd)) > 3
    two = client.chat.completions.create(model=name, messages=messages('Write a poem.'), max_tokens=10, seed=5, n=2)
    assert two.choices[0].message.content == alone != two.choices[1].message.content


def test_scores_of_token_ids(server, name, local):
    model, tokenizer = local
    ids = tokenizer('The capital of France is Paris.')['input_ids']
    row, = post(server, '/v1/completions', model=name, prompt=[ids], max_tokens=0, echo=True, logprobs=1,
                temperature=0)['choices']
    with torch.no_grad(): slow = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = slow[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    assert row['logprobs']['token_logprobs'][0] is None
    assert np.allclose(row['logprobs']['token_logprobs'][1:], expected, atol=5e-3)


def test_who_hangs_up_leaves_no_work_behind(server, name):
    async def leave():
        async with openai.AsyncOpenAI(base_url=server.url, api_key='none', max_retries=0) as client:
            async def begin(stream):
                ask = dict(model=name, messages=messages('Tell me everything.'), max_tokens=1500)
                if stream:
                    async for _ in await client.chat.completions.create(**ask, stream=True): break
                else: await asyncio.wait_for(client.chat.completions.create(**ask), .5)
            await asyncio.gather(*(begin(i % 2) for i in range(12)), return_exceptions=True)
    asyncio.run(leave())
    assert idle(server)
    assert load(server)['llm_distill_cancelled_total'] >= 8


def test_what_is_wrong_is_said(client, server, name):
    def refused(**params):
        try: client.chat.completions.create(**dict(model=name, messages=messages('Hi')) | params)
        except openai.APIStatusError as e: return e.status_code, e.body['param']
    assert refused(temperature=9) == (400, 'temperature')
    assert refused(model='gpt-4o') == (404, 'model')
    assert refused(max_tokens=10**6) == (400, 'messages')
    what = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {'type': 'what'}}}
    assert refused(response_format=what)[0] == 400
    assert refused(extra_body={'temprature': 1}) == (400, 'temprature')
    for junk in (b'{', b'\xff\xfe', b'[]', b'"a"'):
        request = urllib.request.Request(server.url + '/chat/completions', junk, {'content-type': 'application/json'})
        with pytest.raises(urllib.error.HTTPError) as error: urllib.request.urlopen(request, timeout=20)
        assert error.value.code == 400 and 'error' in json.loads(error.value.read())


def test_the_command_wants_a_key_beyond_this_machine():
    words = [SCRIPT, 'serve', 'smollm2', '--host', '0.0.0.0', '--port', '0']
    keyed = os.environ | {'LLM_DISTILL_API_KEY': 'k-1,k-2'}
    bare = {k: v for k, v in os.environ.items() if k != 'LLM_DISTILL_API_KEY'}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=bare)
    assert done.returncode == 1 and 'give it a key' in done.stderr and 'Traceback' not in done.stderr
    words += ['--max-model-len', '256', '--dtype', 'bfloat16']
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=keyed)
    try:
        url = process.stdout.readline().split(' answers at ')[1].split()[0].replace('0.0.0.0', '127.0.0.1')
        def status(key):
            with openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
                try: return client.models.list().data[0].id
                except openai.AuthenticationError as e: return e.status_code
        assert (status('k-2'), status('k')) == ('SmolLM2-135M-Instruct', 401)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) is not None
