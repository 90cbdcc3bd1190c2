"""Clients that we did not write, unchanged, against our server in a process of its own.

The official SDK and curl run in the usual tests. The others come with the extra `bench`; all of them together:

    pip install -e '.[dev,bench]' && pytest -m 'slow or not slow' tests/test_clients.py
"""
import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import openai
import pytest
from pydantic import BaseModel, Field

from llm_distill import serve
from llm_distill.models import find_model, load_tokenizer

WHY, TIMES = 'Why is the sky blue?', 'What is 12 times 7?'
COPY = 'Say this again, and nothing else: {"even": true, "kind": "small", "digits": [8, 4]}'
FIXED = {'max_tokens': 12, 'temperature': 0}


@pytest.fixture(scope='module')
def server():
    with serve('smollm2', device='cpu', dtype='float32') as running: yield running


@pytest.fixture(scope='module')
def client(server):
    with openai.OpenAI(base_url=server.url, api_key='none', max_retries=0, timeout=600) as client: yield client


@pytest.fixture(scope='module')
def name(client): return client.models.list().data[0].id


def messages(text): return [{'role': 'user', 'content': text}]


class Product(BaseModel):
    "The product of two numbers."
    even: bool
    kind: Literal['small', 'large']
    digits: list[Literal[1, 4, 8]] = Field(min_length=2, max_length=2)


# -- the official SDK: what is plain is in test_serving.py -------------------------------------------------------------

def test_openai_in_a_crowd_and_streaming(server, client, name):
    ask = dict(model=name, messages=messages(WHY), max_tokens=60, temperature=0, stop='.')  # the helper wants an end
    expected = client.chat.completions.create(**ask).choices[0].message.content
    async def streamed(them):
        chunks = [c async for c in await them.chat.completions.create(**ask, stream=True)]
        return ''.join(c.choices[0].delta.content or '' for c in chunks)
    async def whole(them): return (await them.chat.completions.create(**ask)).choices[0].message.content
    async def everything():
        async with openai.AsyncOpenAI(base_url=server.url, api_key='none', max_retries=0, timeout=600) as them:
            async with them.chat.completions.stream(**ask) as stream: final = await stream.get_final_completion()
            said = await asyncio.gather(*[streamed(them), whole(them)]*3)
            models = [m.id async for m in them.models.list()]
            return [*said, final.choices[0].message.content], models, await them.models.retrieve(name)
    said, models, card = asyncio.run(everything())
    assert said == [expected]*7 and models == [card.id] == [name]


def test_openai_stream_helper(client, name):
    ask = dict(model=name, messages=messages(TIMES), max_tokens=80, temperature=0)
    more = {'stop': ['.'], 'logprobs': True, 'stream_options': {'include_usage': True}}
    with client.chat.completions.stream(**ask, **more) as stream: events = list(stream)
    final = stream.get_final_completion()
    content = final.choices[0].message.content
    assert ''.join(e.delta for e in events if e.type == 'content.delta') == content
    assert [e.content for e in events if e.type == 'content.done'] == [content]
    rows = [row for e in events if e.type == 'logprobs.content.delta' for row in e.content]
    assert b''.join(bytes(r.bytes) for r in rows).decode().startswith(content)
    assert final.usage.completion_tokens == len(rows) and final.choices[0].finish_reason == 'stop'
    with client.chat.completions.stream(**ask, response_format=Product) as stream: list(stream)
    parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Product) and len(parsed.digits) == 2


def test_openai_tools(client, name):
    ask = dict(model=name, messages=messages(TIMES), max_tokens=120, temperature=0)
    tools = [openai.pydantic_function_tool(Product, name='multiply')]
    with client.chat.completions.stream(**ask, tools=tools, tool_choice='required') as stream:
        events = [e for e in stream if e.type.startswith('tool_calls')]
    choice = stream.get_final_completion().choices[0]
    call, = choice.message.tool_calls
    assert choice.finish_reason == 'tool_calls' and isinstance(call.function.parsed_arguments, Product)
    assert ''.join(e.arguments_delta for e in events if e.type.endswith('delta')) == call.function.arguments
    one = {'type': 'function', 'function': {'name': 'multiply'}}
    whole = client.chat.completions.parse(**ask, tools=tools, tool_choice=one).choices[0].message
    assert whole.tool_calls[0].function.arguments == call.function.arguments and whole.content is None
    told = [*ask['messages'], whole, {'role': 'tool', 'tool_call_id': whole.tool_calls[0].id, 'content': '84'}]
    last = client.chat.completions.create(model=name, messages=told, **FIXED, tools=tools, tool_choice='none')
    assert last.choices[0].message.content and not last.choices[0].message.tool_calls


def test_openai_completions(client, name):
    ids = load_tokenizer('smollm2')('The cat')['input_ids']
    ask = dict(model=name, **FIXED)
    text = client.completions.create(**ask, prompt='The cat').choices[0].text
    both = client.completions.create(**ask, prompt=[ids, ids], echo=True, logprobs=3, n=2).choices
    assert [c.text for c in both] == ['The cat' + text]*4 and [c.index for c in both] == [0, 1, 2, 3]
    columns = both[0].logprobs
    assert columns.token_logprobs[0] is None and ''.join(columns.tokens) == both[0].text
    assert all(len(top) == 3 for top in columns.top_logprobs[len(ids):])
    assert all(both[0].text[at:].startswith(t) for at, t in zip(columns.text_offset, columns.tokens))
    chunks = list(client.completions.create(**ask, prompt=ids, stream=True, stream_options={'include_usage': True}))
    assert ''.join(c.choices[0].text for c in chunks[:-1]) == text and chunks[-1].usage.completion_tokens == 12
    inside = text[len(text)//2:][:4]  # begins anywhere in a token
    stopped = client.completions.create(**ask, prompt='The cat', stop=['never', inside]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[:text.index(inside)], 'stop')


def test_openai_embeddings(client, name):
    texts = ['rain', 'It rains in the mountains.']
    def embed(given, **more):
        found = client.embeddings.create(model=name, input=given, **more)
        return np.array([d.embedding for d in found.data], np.float32)
    packed = embed(texts)  # base64, unless one says otherwise
    ids = [load_tokenizer('smollm2')(t)['input_ids'] for t in texts]
    assert packed.shape == (2, 576) and np.array_equal(packed, embed(texts, encoding_format='float'))
    assert np.allclose(packed, embed(ids), rtol=1e-4, atol=1e-4)
    assert np.allclose(packed[:1], embed('rain'), rtol=1e-4, atol=1e-4) and embed('rain', dimensions=8).shape == (1, 8)
    long = load_tokenizer('smollm2')('<|im_start|>Rain; \n\n naïve 日本 🙂 mountaineers, unbelievably, do not care! '*2)
    ids = long['input_ids']
    for own in (ids, ids[1:-1], ids[3:-2], ids[5:]): assert embed([own]).shape == (1, 576)  # wherever a client cuts
    with pytest.raises(openai.BadRequestError, match='check_embedding_ctx_length=False') as foreign:
        embed([ids, [i + 1 for i in ids]])  # some other tokenizer's
    assert foreign.value.param == 'input[1]'


def test_openai_errors(client, name):
    ask = dict(model=name, messages=messages('Hi'))
    with pytest.raises(openai.NotFoundError) as missing: client.chat.completions.create(**ask | {'model': 'gpt-4o'})
    assert (missing.value.code, missing.value.param) == ('model_not_found', 'model')
    with pytest.raises(openai.BadRequestError) as wrong: client.chat.completions.create(**ask, top_p=2)
    assert wrong.value.param == 'top_p'
    with pytest.raises(openai.NotFoundError): client.models.retrieve('gpt-4o')
    with pytest.raises(openai.NotFoundError): client.responses.create(model=name, input='Hi')  # nothing is served there
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**ask, max_tokens=2, response_format=Product)


# -- curl --------------------------------------------------------------------------------------------------------------

def curl(*words) -> tuple[int, str]:
    "Status and body."
    if not shutil.which('curl'): pytest.skip('needs curl')
    done = subprocess.run(['curl', '-sS', '-w', '\n%{http_code}', *words], capture_output=True, text=True, timeout=600)
    body, status = done.stdout.rsplit('\n', 1)
    assert done.returncode == 0, done.stderr
    return int(status), body


def test_curl(server, client, name):
    ask = {'model': name, 'messages': messages(WHY), **FIXED}
    expected = client.chat.completions.create(**ask).choices[0].message.content
    json_is, url = ('-H', 'Content-Type: application/json'), f'{server.url}/chat/completions'
    status, body = curl(url, *json_is, '-d', json.dumps(ask))
    assert status == 200 and json.loads(body)['choices'][0]['message']['content'] == expected
    assert curl(url, '-d', json.dumps(ask))[0] == 200  # without a header curl says that it is a form
    status, body = curl('-N', url, *json_is, '-d', json.dumps(ask | {'stream': True}))
    events = [e.removeprefix('data: ') for e in body.split('\n\n') if e.strip()]
    assert events[-1] == '[DONE]'
    assert ''.join(json.loads(e)['choices'][0]['delta'].get('content', '') for e in events[:-1]) == expected
    status, body = curl(f'{server.url}/completions', *json_is, '-d', json.dumps({'model': name, 'prompt': 'The cat'}))
    assert status == 200 and json.loads(body)['usage']['completion_tokens'] <= 16
    status, body = curl(f'{server.url}/embeddings', *json_is, '-d', json.dumps({'model': name, 'input': 'rain'}))
    assert status == 200 and len(json.loads(body)['data'][0]['embedding']) == 576
    assert json.loads(curl(f'{server.url}/models')[1])['data'][0]['id'] == name
    assert curl(server.url.removesuffix('/v1') + '/health')[0] == 200


@pytest.mark.parametrize('words, status, param', [
    (['-d', '{"model": '], 400, None), (['-d', '[]'], 400, None), (['-d', '{}'], 400, 'model'), ([], 405, None),
    (['-d', '{"model": "x", "messages": [{"role": "user", "content": "Hi"}]}'], 404, 'model'),
    (['-d', '{"model": "x", "messages": [], "top_k": "1"}'], 400, 'top_k'), (['-X', 'DELETE'], 405, None),
    (['-H', 'Content-Encoding: gzip', '-d', 'junk'], 400, None)])
def test_curl_is_told_what_is_wrong(server, words, status, param):
    found, body = curl(f'{server.url}/chat/completions', *words)
    error = json.loads(body)['error']
    assert found == status and error['message'] and error['param'] == param
    assert error.keys() == {'message', 'type', 'param', 'code'}


# -- LangChain ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def langchain(server, name):
    "`langchain_openai`, and the arguments that say where our server is."
    module = pytest.importorskip('langchain_openai', reason='needs the extra "bench"')
    return module, dict(base_url=server.url, api_key='none', model=name, max_retries=0)


@pytest.mark.slow
def test_langchain_chats(langchain, client, name):
    module, there = langchain
    expected = client.chat.completions.create(model=name, messages=messages(WHY), **FIXED).choices[0].message.content
    chat = module.ChatOpenAI(**there, **FIXED)
    said = chat.invoke(WHY)
    assert said.content == expected and said.usage_metadata['output_tokens'] == 12
    assert ''.join(chunk.content for chunk in chat.stream(WHY)) == expected
    assert [m.content for m in chat.batch([WHY]*3)] == [expected]*3
    assert asyncio.run(chat.ainvoke([('system', 'Be brief.'), ('human', WHY)])).content
    rows = chat.bind(logprobs=True, top_logprobs=3).invoke(WHY).response_metadata['logprobs']['content']
    assert len(rows) == 12 and all(len(r['top_logprobs']) == 3 for r in rows)
    chunk, *rest = chat.stream(WHY, stream_usage=True)
    for more in rest: chunk += more
    assert chunk.usage_metadata['output_tokens'] == 12


@pytest.mark.slow
@pytest.mark.parametrize('method', ['json_schema', 'function_calling', 'json_mode'])
def test_langchain_structures(langchain, method):
    module, there = langchain
    chat = module.ChatOpenAI(**there, max_tokens=150, temperature=0)
    form = chat.with_structured_output(Product, method=method, include_raw=True)
    found = form.invoke(COPY if method == 'json_mode' else TIMES)
    assert isinstance(json.loads(found['raw'].content), dict) if method == 'json_mode' else found['parsed'].kind


@pytest.mark.slow
def test_langchain_calls_tools(langchain):
    module, there = langchain
    from langchain_core.messages import HumanMessage, ToolMessage
    chat = module.ChatOpenAI(**there, max_tokens=120, temperature=0)
    forced, question = chat.bind_tools([Product], tool_choice='any', parallel_tool_calls=False), HumanMessage(TIMES)
    said = forced.invoke([question])
    call, = said.tool_calls
    assert Product(**call['args']) and said.response_metadata['finish_reason'] == 'tool_calls'
    chunk, *rest = forced.stream([question])
    for more in rest: chunk += more
    assert chunk.tool_calls[0]['args'] == call['args']
    told = [question, said, ToolMessage('84', tool_call_id=call['id'])]
    assert isinstance(chat.bind_tools([Product]).invoke(told).content, str)  # it may call again, or say something


@pytest.mark.slow
def test_langchain_completes(langchain, client, name):
    module, there = langchain
    expected = client.completions.create(model=name, prompt='The cat', **FIXED).choices[0].text
    model = module.OpenAI(**there, **FIXED)
    assert model.invoke('The cat') == ''.join(model.stream('The cat')) == expected
    assert model.batch(['The cat']*2) == [expected]*2


@pytest.mark.slow
def test_langchain_embeds(langchain, client, name):
    module, there = langchain
    model = module.OpenAIEmbeddings(**there, check_embedding_ctx_length=False)
    expected = client.embeddings.create(model=name, input='rain').data[0].embedding
    assert np.allclose(model.embed_query('rain'), expected, rtol=1e-4, atol=1e-4)
    assert np.allclose(model.embed_documents(['rain', 'snow'])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_langchain_embeds_with_the_ids_of_another_model(langchain, monkeypatch):
    tiktoken = pytest.importorskip('tiktoken')
    module, there = langchain
    # The real tables come from the internet; here, ids by characters from 60,000 on, or all below the vocabulary's end.
    def ids_from(start):
        ranks = {bytes([i]): start + i for i in range(256)}
        monkeypatch.setattr(tiktoken, 'get_encoding', lambda _: tiktoken.Encoding(
            'characters', pat_str='.', mergeable_ranks=ranks, special_tokens={}))
        return module.OpenAIEmbeddings(**there)
    with pytest.raises(openai.BadRequestError, match='check_embedding_ctx_length=False'):
        ids_from(60_000).embed_query('rain')
    with pytest.raises(openai.BadRequestError, match='check_embedding_ctx_length=False'):
        ids_from(1000).embed_query('It rains in the mountains, and nobody is there.')


# -- instructor --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize('mode', ['TOOLS', 'JSON', 'JSON_SCHEMA', 'PARALLEL_TOOLS'])
def test_instructor(client, name, mode):
    instructor = pytest.importorskip('instructor', reason='needs the extra "bench"')
    from instructor.core import InstructorRetryException
    patched = instructor.from_openai(client, mode=getattr(instructor.Mode, mode))
    ask = dict(model=name, max_tokens=150, temperature=0, max_retries=0)
    if mode in ('JSON', 'PARALLEL_TOOLS'):  # what the model says is up to it, and this one is small
        model = Product if mode == 'JSON' else Iterable[Product]
        try: assert list(patched.chat.completions.create(**ask, messages=messages(COPY), response_model=model))
        except InstructorRetryException as e: assert 'Error code' not in str(e)  # our server refused nothing
        return
    found = patched.chat.completions.create(**ask, messages=messages(TIMES), response_model=Product)
    parts = list(patched.chat.completions.create_partial(**ask, messages=messages(TIMES), response_model=Product))
    assert isinstance(found, Product) and parts[-1].model_dump() == found.model_dump()


# -- simonw's llm ------------------------------------------------------------------------------------------------------

@pytest.fixture
def llm(server, name, tmp_path):
    "Runs its command."
    pytest.importorskip('llm', reason='needs the extra "bench"')
    (tmp_path/'extra-openai-models.yaml').write_text(json.dumps([  # JSON is YAML too
        {'model_id': 'student', 'model_name': name, 'api_base': server.url, 'supports_schema': True,
         'supports_tools': True}]))
    def run(*words, **env):
        env = os.environ | {'LLM_USER_PATH': str(tmp_path), 'OPENAI_API_KEY': 'none'} | env
        done = subprocess.run([sys.executable, '-m', 'llm', *words], capture_output=True, text=True, timeout=600,
                              env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
    return run


@pytest.mark.slow
def test_llm(llm, server, client, name):
    expected = client.chat.completions.create(model=name, messages=messages(WHY), **FIXED).choices[0].message.content
    fixed = '-o', 'max_tokens', '12', '-o', 'temperature', '0'
    assert llm('-m', 'student', *fixed, WHY) == llm('-m', 'student', *fixed, '--no-stream', WHY) == expected.strip()
    assert llm('openai', 'endpoint', server.url, '-m', name, *fixed, WHY) == expected.strip()
    assert llm('openai', 'endpoint', server.url, '--models') == name
    assert llm('-c', *fixed, 'And at night?')  # goes on with the conversation
    schema = json.dumps(Product.model_json_schema())
    for how in ([], ['--no-stream']):
        Product.model_validate_json(llm('-m', 'student', '-o', 'temperature', '0', '--schema', schema, *how, TIMES))
    assert llm('-m', 'student', *fixed, '--functions', 'def multiply(a: int, b: int) -> int:\n  return a*b', TIMES)
    assert json.loads(llm('logs', '-n', '1', '--json'))


@pytest.mark.slow
def test_llm_embeds(llm, client, name):
    expected = client.embeddings.create(model=name, input='rain').data[0].embedding
    with serve('smollm2', device='cpu', dtype='float32', name='text-embedding-3-small') as other:
        found = llm('embed', '-m', 'text-embedding-3-small', '-c', 'rain', OPENAI_BASE_URL=other.url)
    assert np.allclose(json.loads(found), expected, rtol=1e-4, atol=1e-4)


# -- lm-eval -----------------------------------------------------------------------------------------------------------

FACTS = [('The capital of France is', ['Paris', 'Berlin', 'Rome', 'a river'], 0),
         ('Water freezes at zero degrees', ['Celsius', 'of freedom', 'Kelvin', 'north'], 0),
         ('Two plus two is', ['four', 'five', 'twenty-two', 'a colour'], 0),
         ('Grüße aus München! Das Wetter ist', ['schön 🙂', 'vier', 'the', '日本'], 0),
         ('Owls hunt at', ['breakfast', 'night', 'school', 'sea'], 1),
         ('Bees make', ['honey', 'cars', 'the moon', 'noise, and then they leave the hive in spring'], 0),
         ('The opposite of hot is', ['warm', 'cold', 'stone', 'hotter'], 1),
         ('A triangle has this many sides:', ['one', 'two', 'three', 'seven'], 2)]
CHOICE = '''task: facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
'''
WRITING = '''task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n", ". "], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
'''


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    "Runs both tasks; gives each example's answers, and the scores."
    lm_eval = pytest.importorskip('lm_eval', reason='needs the extra "bench"')
    from lm_eval.tasks import TaskManager
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path/'cache'))
    file = tmp_path/'facts.jsonl'
    file.write_text('\n'.join(json.dumps({'question': q, 'choices': c, 'label': n}) for q, c, n in FACTS) + '\n')
    for task in (CHOICE, WRITING):
        (tmp_path/f'{task.split()[1]}.yaml').write_text(task.format(file=json.dumps(str(file))))
    def run(backend, **args):
        found = lm_eval.simple_evaluate(model=backend, model_args=args, tasks=['facts', 'writing'], log_samples=True,
                                        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
                                        bootstrap_iters=0)
        answers = {task: [s['filtered_resps'] for s in sorted(rows, key=lambda s: s['doc_id'])]
                   for task, rows in found['samples'].items()}
        return answers, {task: {k: v for k, v in row.items() if k.startswith(('acc', 'exact'))}
                         for task, row in found['results'].items()}
    return run


@pytest.mark.slow
def test_lm_eval_scores_as_it_does_in_its_own_process(evaluate, server, name):
    folder = str(Path(find_model('smollm2')))
    expected, scores = evaluate('hf', pretrained=folder, dtype='float32', device='cpu', batch_size=1)
    for tokenized in (True, False): # prompts as token ids, or as text
        there = dict(base_url=f'{server.url}/completions', model=name, tokenizer=folder, max_retries=1, max_length=2048,
                     tokenizer_backend='huggingface', tokenized_requests=tokenized)
        for more in ({}, {'num_concurrent': 4, 'batch_size': 4}):
            found, same = evaluate('local-completions', **there, **more)
            assert same == scores and found['writing'] == expected['writing']
            ours, theirs = np.array(found['facts'], float), np.array(expected['facts'], float)
            assert ours.shape == (len(FACTS), 4, 2)  # the loglikelihood, and whether nothing was likelier
            assert np.abs(ours[..., 0] - theirs[..., 0]).max() < 1e-3 and (ours[..., 1] == theirs[..., 1]).all()
    assert .5 <= scores['facts']['acc,none'] < 1
