"The providers to test against keep to their protocols, and fail as they are told."
import base64
import http.client
import json
import math
import socket
import struct
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest
from servers import Fault, Limiter, Provider, free_port, hanging_port

ASK = [{'role': 'user', 'content': 'What is it that you like to see near the water?'}]


def client(p, key='k', timeout=10):
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(api_key=key, base_url=p.url, max_retries=0, timeout=timeout, http_client=http)


def claude(p, key='k'):
    http = anthropic.DefaultHttpxClient(trust_env=False)
    return anthropic.Anthropic(api_key=key, base_url=p.url, max_retries=0, http_client=http)


def post(url, body, timeout=10, **headers):
    "Status, headers and what the JSON says."
    told = {'Content-Type': 'application/json', **{k.replace('_', '-'): v for k, v in headers.items()}}
    request = urllib.request.Request(url, json.dumps(body).encode(), told)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=timeout) as r: return r.status, r.headers, json.loads(r.read())
    except urllib.error.HTTPError as e:
        with e: return e.code, e.headers, json.loads(e.read())


def chat(p, model='gpt-4o', **more): return client(p).chat.completions.create(model=model, messages=ASK, **more)
def first(reply): "Logprobs of the first token."; return reply.choices[0].logprobs.content[0]


def test_chat_of_openai():
    with Provider('openai') as p:
        assert 'gpt-4o' in [m.id for m in client(p).models.list()]
        greedy = [chat(p, temperature=0, logprobs=True, top_logprobs=20) for _ in range(2)]
        assert greedy[0].choices == greedy[1].choices and greedy[0].id != greedy[1].id
        rows, text = greedy[0].choices[0].logprobs.content, greedy[0].choices[0].message.content
        assert b''.join(bytes(r.bytes) for r in rows).decode() == text and '\ufffd' not in text
        assert any('\ufffd' in r.token for r in rows) and greedy[0].choices[0].finish_reason == 'stop'
        assert all(r.token == r.top_logprobs[0].token and len(r.top_logprobs) == 20 for r in rows)
        assert all(sum(math.exp(c.logprob) for c in r.top_logprobs) <= 1.0001 for r in rows)
        many, again = ([c.message.content for c in chat(p, n=4, seed=1).choices] for _ in range(2))
        assert len(set(many)) == 4 and many == again
        assert chat(p).choices[0].message.content != chat(p).choices[0].message.content
        firsts = [first(chat(p, temperature=t, logprobs=True, top_logprobs=3)) for t in (.1, 2)]
        assert firsts[0].top_logprobs == firsts[1].top_logprobs
        short = chat(p, max_tokens=3)
        assert short.choices[0].finish_reason == 'length' and short.usage.completion_tokens == 3
        assert chat(p, 'gpt-5', max_completion_tokens=500).usage.completion_tokens_details.reasoning_tokens > 0
        assert chat(p, 'gpt-5', max_completion_tokens=10).choices[0].message.content == ''
        assert chat(p, 'gpt-5.1', reasoning_effort='none', logprobs=True, temperature=.5).choices[0].logprobs
        parts = [c.choices[0].delta.content or '' for c in chat(p, temperature=0, stream=True)]
        assert ''.join(parts) == text and len(parts) > 5
        assert p.requests[0].path == '/v1/models' and p.requests[-1].headers['authorization'] == 'Bearer k'
        assert p.requests[-1].status == 200 and p.requests[-1].body['stream'] is True


@pytest.mark.parametrize('status, param, body', [
    (400, 'top_k', {'extra_body': {'top_k': 3}}), (400, 'top_logprobs', {'logprobs': True, 'top_logprobs': 21}),
    (400, 'top_logprobs', {'top_logprobs': 2}), (400, 'logprobs', {'model': 'o3', 'logprobs': True}),
    (400, 'max_tokens', {'model': 'gpt-5-mini', 'max_tokens': 5}),
    (400, 'temperature', {'model': 'o4-mini', 'temperature': 0}),
    (400, 'logprobs', {'model': 'gpt-5.1', 'logprobs': True, 'reasoning_effort': 'low'}),
    (404, 'model', {'model': 'gpt-5-pro'}), (404, 'model', {'model': 'gpt-5.1-codex'}),
    (404, 'model', {'model': 'gpt-3.5-turbo-instruct'}), (404, None, {'model': 'nobody'})])
def test_what_openai_refuses(openai_server, status, param, body):
    with pytest.raises(openai.APIStatusError) as e: chat(openai_server, **body)
    assert (e.value.status_code, e.value.param) == (status, param)


@pytest.fixture(scope='module')
def openai_server():
    with Provider('openai') as p: yield p


def test_completions_and_responses(openai_server):
    c = client(openai_server)
    echoed = c.completions.create(model='davinci-002', prompt='Like it', echo=True, logprobs=2, max_tokens=0).choices[0]
    assert echoed.text == 'Like it' == ''.join(echoed.logprobs.tokens) and echoed.logprobs.token_logprobs[0] is None
    with pytest.raises(openai.BadRequestError, match='echo'):
        c.completions.create(model='gpt-3.5-turbo-instruct', prompt='a', echo=True, logprobs=2)
    with pytest.raises(openai.BadRequestError): c.completions.create(model='davinci-002', prompt='a', logprobs=6)
    said = c.responses.create(model='gpt-4o', input='Hello', store=False, include=['message.output_text.logprobs'],
                              top_logprobs=4)
    text = said.output[-1].content[0]
    assert text.text == said.output_text and len(text.logprobs[0].top_logprobs) == 4 and said.usage.output_tokens > 0
    assert not openai_server.memory.stored
    thought = c.responses.create(model='gpt-5-pro', input='Hello')
    assert [i.type for i in thought.output] == ['reasoning', 'message']
    assert list(openai_server.memory.stored) == [thought.id] == [c.responses.retrieve(thought.id).id]
    cut = c.responses.create(model='o3', input='Hello', max_output_tokens=16, instructions='Be short', store=False)
    assert cut.status == 'incomplete' and cut.usage.output_tokens_details.reasoning_tokens == 16 and not cut.output_text
    with pytest.raises(openai.BadRequestError): c.responses.create(model='gpt-4o', input='Hello', max_output_tokens=3)


def test_vllm_scores_prompts():
    with Provider('openai', flavour='vllm', model='m') as p:
        ids = post(f'{p.root}/tokenize', {'model': 'm', 'prompt': 'Make the café small'})[2]['tokens']
        body = {'model': 'm', 'prompt': ids, 'prompt_logprobs': 3, 'max_tokens': 1, 'echo': True, 'logprobs': 3}
        choice = client(p).completions.create(model='m', prompt=ids, extra_body=body).choices[0]
        scores = choice.prompt_logprobs
        assert scores[0] is None and len(scores) == len(ids) and all(str(i) in s for i, s in list(zip(ids, scores))[1:])
        lps = [s[str(i)]['logprob'] for i, s in list(zip(ids, scores))[1:]]
        assert choice.logprobs.token_logprobs[1:-1] == lps and choice.text.startswith('Make the café small')
        assert {s['rank'] for s in scores[1].values()} >= {1, 2, 3}
        assert post(f'{p.url}/completions', body | {'prompt_logprobs': 21})[0] == 400
        whole = ASK + [{'role': 'assistant', 'content': 'That put'}]
        told, said = (post(f'{p.url}/chat/completions', {'model': 'm', 'max_tokens': 1, **more})[2] for more in (
            {'messages': whole, 'prompt_logprobs': 0, 'add_generation_prompt': False, 'unknown': 1}, {'messages': ASK}))
        assert len(told['prompt_logprobs']) == told['usage']['prompt_tokens'] == said['usage']['prompt_tokens'] + 2
        greedy = chat(p, 'm', temperature=0, logprobs=True).choices[0]
        whole[1]['content'] = greedy.message.content
        body = {'model': 'm', 'messages': whole, 'prompt_logprobs': 0, 'max_tokens': 1, 'add_generation_prompt': False}
        told = post(f'{p.url}/chat/completions', body)[2]['prompt_logprobs']
        rows = greedy.logprobs.content
        assert [r.logprob for r in rows] == [list(s.values())[0]['logprob'] for s in told[-len(rows):]]


def test_other_flavours():
    with Provider('openai', flavour='sglang') as p:
        body = {'text': 'Make the sun', 'sampling_params': {'max_new_tokens': 0}, 'return_logprob': True,
                'logprob_start_len': 0, 'top_logprobs_num': 2, 'return_text_in_logprobs': True}
        meta = post(f'{p.root}/generate', body)[2]['meta_info']
        assert ''.join(row[2] for row in meta['input_token_logprobs']) == body['text']
        assert meta['input_token_logprobs'][0][0] is None
        assert meta['input_top_logprobs'][0] is None and len(meta['input_top_logprobs'][1]) == 2
        assert len(meta['input_token_logprobs']) == meta['prompt_tokens'] and meta['finish_reason']['type'] == 'length'
        assert post(f'{p.url}/generate', body)[0] == 404
    echo = {'model': 'm', 'prompt': 'Make the sun', 'echo': True, 'logprobs': 2, 'max_tokens': 2}
    with Provider('openai', flavour='llama.cpp') as p:
        choice = post(f'{p.url}/completions', echo)[2]['choices'][0]
        assert choice['text'].startswith('Make the sun') and len(choice['logprobs']['content']) == 2
    with Provider('openai', flavour='plain') as p:
        assert post(f'{p.url}/completions', echo)[0] == 404
        assert len(first(chat(p, logprobs=True, top_logprobs=20)).top_logprobs) == 5
    with Provider('openai', flavour='dropper') as p:
        both = [chat(p, n=3, temperature=0, seed=1, logprobs=True) for _ in range(2)]
        assert len(both[0].choices) == 1 and both[0].choices[0].logprobs is None
        assert both[0].choices[0].message.content != both[1].choices[0].message.content
    with Provider('openai', flavour='vllm', logprob_space='processed') as p:
        one, two = (first(chat(p, 'm', temperature=t, logprobs=True, top_logprobs=2)) for t in (.5, 2))
        assert one.top_logprobs[0].logprob > two.top_logprobs[0].logprob


def test_deepseek():
    with Provider('deepseek', key='k', faults=[Fault('status', 402)]) as p:
        with pytest.raises(openai.APIStatusError, match='Insufficient Balance'): chat(p, 'deepseek-v4-flash')
        thought = chat(p, 'deepseek-v4-flash', logprobs=True, top_logprobs=3, temperature=0).choices[0]
        assert thought.message.reasoning_content and thought.logprobs is None
        off = {'thinking': {'type': 'disabled'}}
        quick = chat(p, 'deepseek-v4-flash', logprobs=True, top_logprobs=3, extra_body=off)
        assert not hasattr(quick.choices[0].message, 'reasoning_content')
        assert len(first(quick).top_logprobs) == 3 and quick.usage.prompt_cache_hit_tokens == 0
        streamed = [c.choices[0].delta for c in chat(p, 'deepseek-v4-flash', stream=True)]
        assert any(getattr(d, 'reasoning_content', None) for d in streamed) and any(d.content for d in streamed)


def test_anthropic():
    ask = dict(model='claude-sonnet-5', max_tokens=100, messages=ASK)
    with Provider('anthropic') as p:
        c = claude(p)
        said = c.messages.create(**ask, system='Be kind.')
        assert said.content[0].text and said.stop_reason == 'end_turn' and said.usage.output_tokens > 0
        assert said._request_id
        assert c.messages.create(**ask | {'max_tokens': 3}).stop_reason == 'max_tokens'
        with c.messages.stream(**ask | {'max_tokens': 30_000}, thinking={'type': 'adaptive'}) as stream:
            whole = stream.get_final_message()
        assert [b.type for b in whole.content] == ['thinking', 'text'] and whole.stop_reason == 'end_turn'
        for more, word in (({'temperature': 1.}, 'temperature'), ({'logprobs': True}, 'Extra inputs')):
            with pytest.raises(anthropic.BadRequestError, match=word): c.messages.create(**ask, extra_body=more)
        with pytest.raises(anthropic.BadRequestError, match='system'):
            c.messages.create(**ask | {'messages': [{'role': 'system', 'content': 'a'}]})
        p.add(Fault('status', 529))
        with pytest.raises(anthropic.APIStatusError, match='overloaded_error'): c.messages.create(**ask)
        old = {'anthropic_version': '2023-06-01', 'x_api_key': 'k'}
        assert post(f'{p.url}/v1/messages', ask | {'temperature': 0}, **old)[0] == 200
        assert post(f'{p.url}/v1/messages', ask | {'max_tokens': 21_334}, **old)[0] == 400
        assert post(f'{p.url}/v1/messages', ask, x_api_key='k')[2]['error']['type'] == 'invalid_request_error'
        assert post(f'{p.url}/v1/messages', ask, anthropic_version='2023-06-01')[0] == 401


def test_rest():
    with Provider('rest', key='k', encoding='base64', text_field='output', logits='/all') as p, Provider('rest') as q:
        key = {'Authorization': 'Bearer k'}
        assert post(f'{p.url}/generate', {'input': 'Hello', 'max_tokens': 4, 'temperature': 0}, **key)[2]['output']
        ask = {'input': 'Make the sun', 'return_logits': True}
        packed, plain = post(f'{p.url}/all', ask, **key)[2], post(f'{q.url}/logits', ask)[2]['logits']
        flat = struct.unpack(f'<{math.prod(packed["shape"])}e', base64.b64decode(packed['logits']))
        assert list(flat) == [x for row in plain[0] for x in row] and packed['shape'] == [1, len(plain[0]), 32]
        assert post(f'{p.url}/all', ask)[0] == 401 and post(f'{q.url}/all', ask)[0] == 404


@pytest.mark.parametrize('protocol, path', [
    ('openai', '/chat/completions'), ('deepseek', '/chat/completions'), ('anthropic', '/v1/messages'),
    ('rest', '/generate')])
def test_a_wrong_key_is_repeated(protocol, path):
    with Provider(protocol, key='right') as p:
        status, _, said = post(p.url + path, {}, Authorization='Bearer wrong-secret')
        assert status == 401 and 'wrong-secret' in json.dumps(said)
        assert post(f'{p.url}/nowhere', {}, Authorization='Bearer right')[0] == 404


def test_faults():
    quota = {'error': {'message': 'You exceeded your current quota', 'code': 'insufficient_quota'}}
    with Provider('openai') as p:
        p.add(Fault('status', 429, {'Retry-After': '7'}, quota), Fault('reset'), Fault('cut'), Fault('cut_json'),
              Fault('garbled'), Fault('empty'), Fault('html'), Fault('empty_answer'), Fault('drip', seconds=.4), None)
        with pytest.raises(openai.RateLimitError) as e: chat(p)
        assert e.value.code == 'insufficient_quota' and e.value.response.headers['retry-after'] == '7'
        for _ in ('reset', 'cut'):
            with pytest.raises(openai.APIConnectionError): chat(p)
        url, body = f'{p.url}/chat/completions', {'model': 'gpt-4o', 'messages': ASK}
        for _ in ('cut_json', 'garbled', 'empty', 'html'):
            with pytest.raises(ValueError): post(url, body)
        assert post(url, body)[2]['choices'][0]['message']['content'] == ''
        began = time.monotonic()
        assert chat(p).choices[0].message.content and time.monotonic() - began >= .4
        assert chat(p).choices[0].message.content and [r.status for r in p.requests[:2]] == [429, None]


def test_those_who_hang_up_are_noticed():
    with Provider('openai', faults=[Fault('hang')], delay_s=.5) as p:
        for _ in ('hang', 'slow'):
            with pytest.raises(openai.APITimeoutError): client(p, timeout=.2).responses.create(model='o3', input='a')
        assert p.until(lambda p: len(p.gone) == 2 and p.open == 0) and p.requests[0] is p.gone[0]


def test_many_at_once_over_kept_connections():
    with Provider('openai', delay_s=.2) as p, client(p) as c, ThreadPoolExecutor(100) as pool:
        said = list(pool.map(lambda i: c.chat.completions.create(model='gpt-4o', messages=ASK).id, range(300)))
        assert len(set(said)) == 300 == len(p.requests) and 50 < p.open <= 100


def test_chunked_bodies():
    with Provider('openai') as p:
        connection = http.client.HTTPConnection('127.0.0.1', p.port)
        body = json.dumps({'model': 'gpt-4o', 'messages': ASK, 'max_tokens': 1}).encode()
        for _ in range(2):
            connection.request('POST', '/v1/chat/completions', iter((body[:9], body[9:])), encode_chunked=True,
                               headers={'Transfer-Encoding': 'chunked'})
            assert json.loads(connection.getresponse().read())['usage']['completion_tokens'] == 1
        assert p.open == 1 and p.requests[1].body['max_tokens'] == 1
        connection.close()


def test_limits():
    with Provider('openai', limiter=Limiter(600, 10**6, burst=.005)) as p, client(p) as c:
        began, seen = time.monotonic(), []
        while time.monotonic() - began < 1:
            try: seen.append(c.chat.completions.with_raw_response.create(model='gpt-4o', messages=ASK, max_tokens=2))
            except openai.RateLimitError as e: assert 0 < float(e.response.headers['retry-after']) <= 1
        most, _ = p.limiter.allowed(time.monotonic() - began)
        assert 8 <= p.limiter.admitted == len(seen) <= most and p.limiter.refused
        told = seen[0].headers
        assert told['x-ratelimit-limit-requests'] == '600' and told['x-ratelimit-reset-requests'].endswith('ms')
    with Provider('anthropic', limiter=Limiter(10, 1000, kind='window', retry_after='date', charge='max_tokens')) as p:
        ask = dict(model='claude-sonnet-5', max_tokens=500, messages=ASK)
        told = claude(p).messages.with_raw_response.create(**ask).headers
        assert told['anthropic-ratelimit-requests-remaining'] == '9'
        assert told['anthropic-ratelimit-tokens-reset'].endswith('Z')
        with pytest.raises(anthropic.RateLimitError) as e: claude(p).messages.create(**ask)
        assert e.value.response.headers['retry-after'].endswith('GMT') and p.limiter.allowed(1) == (10, 1000)


def test_ports_where_nobody_answers():
    with pytest.raises(ConnectionRefusedError): socket.create_connection(('127.0.0.1', free_port()), timeout=1)
    with hanging_port() as port, pytest.raises(TimeoutError): socket.create_connection(('127.0.0.1', port), timeout=.3)
