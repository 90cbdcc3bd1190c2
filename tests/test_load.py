"Rude clients and broken models: what must not happen to the others, or to the server."
import asyncio
import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import orjson
import pytest
import torch
from conftest import ROOT, SCRIPT
from fastapi.testclient import TestClient

from llm_distill import serve
from llm_distill.models import load_model, load_tokenizer
from llm_distill.serving.app import create_app
from llm_distill.serving.drafts import Draft, Room
from llm_distill.serving.engine import Engine
from llm_distill.serving.process import run_server
from llm_distill.serving.sampling import Sampling
from llm_distill.serving.service import Service
from llm_distill.types import BadInput

sys.path.insert(0, str(ROOT/'tests/benchmarks'))
from load import KEY, LIMIT, Clients, complaints, figures, run_load, show, tiny_model  # noqa: E402

HI = {'model': 'm', 'messages': [{'role': 'user', 'content': 'Hi'}], 'max_tokens': 4}
LONG = HI | {'max_tokens': 900, 'ignore_eos': True, 'stream': True}


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny_model(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='module')
def server(folder):
    with serve(folder, device='cpu', name='m', batch_size=4, api_keys=[KEY], patience=1.5) as running: yield running


def address(server) -> tuple[str, int]:
    host, port = server.url.split('/')[2].split(':')
    return host, int(port)


def head(path='/v1/chat/completions', key=f'Bearer {KEY}', method='POST', **more) -> bytes:
    fields = {'Host': 'here', 'Authorization': key, 'Connection': 'close'}
    fields |= {name.replace('_', '-'): value for name, value in more.items()}
    return (f'{method} {path} HTTP/1.1\r\n' + ''.join(f'{k}: {v}\r\n' for k, v in fields.items()) + '\r\n').encode(
        'latin-1')


@contextmanager
def connection(server, data: bytes = b'', small: bool = False):
    with socket.socket() as s:
        if small: s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(60)
        s.connect(address(server))
        with suppress(BrokenPipeError, ConnectionResetError): s.sendall(data)
        yield s


def reply(server, data: bytes) -> tuple[int, dict]: # Status and error, or whatever was sent
    with connection(server, data) as s:
        text = b''
        with suppress(ConnectionResetError):
            while part := s.recv(65_536): text += part
    top, _, rest = text.partition(b'\r\n\r\n')
    return int(top.split()[1]), json.loads(rest) if rest.startswith(b'{') else rest


def ask(server, body: bytes|dict, **more):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return reply(server, head(Content_Length=len(body), **more) + body)


def metrics(server) -> dict: return figures(reply(server, head('/metrics', method='GET'))[1].decode())


def until(what, seconds=30) -> bool:
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end: time.sleep(.02)
    return found


def idle(server) -> bool:
    return until(lambda: not any(metrics(server)[k] for k in ('running', 'waiting', 'tokens')))


# -- a crowd -----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_fifty_clients_of_all_kinds(folder):
    report = run_load(str(folder), clients=50, seconds=15)
    show(report)
    assert complaints(report) == []
    assert report['seen'].keys() == Clients.KINDS.keys() and report['health']


# -- what is sent ------------------------------------------------------------------------------------------------------

def test_a_body_that_is_too_long(server):
    status, body = reply(server, head(Content_Length=LIMIT + 1) + b'{')
    assert (status, body['error']['code']) == (413, 'too_large')
    chunk = b'10000\r\n' + b' '*0x10000 + b'\r\n'
    with connection(server, head(Transfer_Encoding='chunked', Connection='keep-alive')) as s:
        said = []
        reader = threading.Thread(target=lambda: said.append(s.recv(4096)))
        reader.start()
        for _ in range(LIMIT//0x10000 + 2):
            with suppress(OSError): s.sendall(chunk)
        reader.join(30)
    assert said[0].split()[1] == b'413' and idle(server)


@pytest.mark.parametrize('body', [
    b'{', b'', b'[]', b'"a"', b'\xff\xfe{}', b'{"model": "\xff"}', b'{"model": "\\ud800"}',
    b'{"messages": ' + b'['*90_000, b'{"messages": ' + b'['*500 + b']'*500 + b'}',
    b'{"messages": [' + b'{},'*99_999 + b'{}]}', b'[' + b'{},'*400_000 + b'{}]',
    b'{"model": "m", "prompt": ' + b'9'*5000 + b'}', b'NaN', b'{"n": 1e999}'], ids=range(14))
def test_what_is_no_request(server, body):
    for path in ('/v1/chat/completions', '/v1/completions', '/v1/embeddings', '/generate', '/logits'):
        status, said = ask(server, body, path=path)
        assert status == 400 and said['error']['message'] and said['error']['type'] == 'invalid_request_error'


def deep(n, schema=False):
    inner = {}
    for _ in range(n): inner = {'type': 'object', 'properties': {'a': inner}} if schema else [inner]
    return inner


def schema(what): return {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': what}}
def user(content): return [{'role': 'user', 'content': content}]
def tool(parameters): return {'type': 'function', 'function': {'name': 'f', 'parameters': parameters}}


@pytest.mark.parametrize('more', [
    {'n': 129}, {'n': 10**9}, {'n': 128, 'max_tokens': 900, 'logprobs': True, 'top_logprobs': 20},
    {'model': 'x'*100_000}, {'stop': ['x'*2000]}, {'x'*100_000: 1}, {'seed': 2**63},
    {'logit_bias': {str(i): 1 for i in range(20_000)}}, {'logit_bias': {'x'*100_000: 1}},
    {'messages': user('a')*20_000}, {'messages': user([{'type': 'text', 'text': 'a'}]*20_000)},
    {'messages': user('x'*1_000_000)}, {'response_format': schema(deep(300, True))},
    {'response_format': schema({'const': 'x'*400_000})},
    {'tools': [tool(deep(240, True))], 'tool_choice': 'required'},
    {'tool_choice': {'type': 'function', 'function': {'name': 'x'*100_000}}}], ids=range(16))
def test_what_asks_too_much(server, more):
    status, said = ask(server, HI | more)
    assert status in (400, 404) and len(json.dumps(said)) < 2000


def test_arguments_that_are_nested_deeply_are_text(server):
    call = {'id': 'a', 'type': 'function', 'function': {'name': 'f', 'arguments': '['*100_000}}
    turns = [*HI['messages'], {'role': 'assistant', 'tool_calls': [call]}]
    assert ask(server, HI | {'messages': turns})[1]['error']['code'] == 'context_length_exceeded'
    call['function']['arguments'] = '{"a":'*400 + '1' + '}'*400
    assert ask(server, HI | {'messages': turns})[0] in (200, 400)


def test_many_texts(server):
    for path, name, n in (('/v1/completions', 'prompt', 100_000), ('/v1/embeddings', 'input', 100_000)):
        status, said = ask(server, {'model': 'm', name: ['a']*n}, path=path)
        assert (status, said['error']['param']) == (400, name)
    status, said = ask(server, {'model': 'm', 'input': ['word '*900]*400}, path='/v1/embeddings')
    assert (status, said['error']['code']) == (400, 'max_tokens_per_request')
    scored = {'model': 'm', 'prompt': ['word '*900]*300, 'echo': True, 'logprobs': 5}
    status, said = ask(server, scored, path='/v1/completions')
    assert (status, said['error']['param']) == (400, 'max_tokens')


WELL_FORMED = {  # what a fuzzer that knows no rule between two fields would hardly hit upon
    'ChatMessage': {'role': {'enum': ['system', 'developer', 'user', 'assistant']},
                    'content': {'type': 'string', 'maxLength': 80}},
    'ResponseFormat': {'type': {'enum': ['text', 'json_object']}},
    '_Function': {'name': {'enum': ['look', 'find']}, 'description': {'type': 'string', 'maxLength': 40}}}
SMALL = {'num_beams': 4, 'prompt_logprobs': 20, 'top_logprobs': 20, 'logprobs': 5}
CONTRADICTIONS = 'stream_options', 'tool_choice', 'do_sample', 'max_completion_tokens', 'best_of'


def documented(server, path, well_formed=False):
    "The server's own document, for one model and short answers; `well_formed`: requests that get an answer, mostly."
    document = json.loads(urllib.request.urlopen(server.url.removesuffix('/v1') + '/openapi.json', timeout=20).read())
    for form in document['components']['schemas'].values():
        fields = form.get('properties', {})
        if 'messages' in fields or 'prompt' in fields or 'input' in fields:
            if 'model' in fields: fields['model'] = {'type': 'string', 'enum': ['m']}
            for name in ('max_tokens', 'max_completion_tokens', 'n', 'best_of'):
                if name in fields: fields[name] = {'type': 'integer', 'minimum': 1, 'maximum': 4}
            if not well_formed: continue
            for name in CONTRADICTIONS: fields.pop(name, None)
            for name in {*SMALL} & {*fields}:
                if 'anyOf' in fields[name] and fields[name]['anyOf'][0]['type'] == 'integer':
                    fields[name] = {'type': 'integer', 'minimum': 1, 'maximum': SMALL[name]}
            if 'top_logprobs' in fields: fields['logprobs'] = {'const': True}
    for name, fields in WELL_FORMED.items() if well_formed else ():
        document['components']['schemas'][name] |= {'properties': fields, 'required': [*fields][:2]}
    path.write_text(json.dumps(document))
    return path


CHECKS = ('not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,'
          'unsupported_method,ignored_auth')


@pytest.mark.slow
@pytest.mark.parametrize('more', [(), ('--mode', 'positive', '--include-path-regex', '^/(v1/(chat|comp|emb)|gen|log)')],
                         ids=['anything', 'well-formed'])
def test_a_fuzzer_finds_nothing(server, tmp_path, more):
    pytest.importorskip('schemathesis', reason='needs the extra "bench"')
    document, before = documented(server, tmp_path/'openapi.json', bool(more)), metrics(server)
    done = subprocess.run(
        [sys.executable, '-m', 'schemathesis.cli', 'run', document, *more,
         '--url', server.url.removesuffix('/v1'), '--header', f'Authorization: Bearer {KEY}', '--checks', CHECKS,
         '--max-examples', '50', '--continue-on-failure', '--suppress-health-check', 'all', '--seed', '1',
         '--request-timeout', '60'], capture_output=True, text=True, cwd=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert metrics(server)['requests_total'] - before['requests_total'] > 50, 'few of them got past the first check'
    assert idle(server) and not [name for name in metrics(server) if 'status="5' in name]
    assert 'Traceback' not in server.log.read_text()


# -- who asks ----------------------------------------------------------------------------------------------------------

def test_keys(server):
    def status(key, **more): return ask(server, HI, key=key, **more)[0]
    for key in (f'Bearer {KEY}', f'bearer  {KEY} ', f'BEARER {KEY}'): assert status(key) == 200
    for key in ('', KEY, 'Bearer', 'Bearer ', f'Bearer {KEY[:-1]}', f'Bearer {KEY}x', f'Basic {KEY}',
                f'Bearer {KEY} {KEY}', 'Bearer ' + 'k'*30_000, 'Bearer \xe9'): assert status(key) == 401
    assert reply(server, head('/v1/models', '', 'GET', Host='here/health?'))[0] in (400, 401)
    for path in ('/v1/models', '/metrics', '/nothing', '/health/', '//health', '/%2e/health', '/v1/../health'):
        assert reply(server, head(path, '', 'GET'))[0] == 401
    assert reply(server, head('/health', '', 'GET'))[0] == 200


def test_no_key_is_kept_or_printed(folder):
    model, tokenizer = load_model(folder, 'cpu'), load_tokenizer(folder)
    engine = Engine(model, tokenizer, slots=1)
    app = create_app(Service(engine, tokenizer, 'm'), 'secret-1')
    seen = repr([vars(app), [vars(m) for m in app.user_middleware], app.middleware_stack])
    client = TestClient(app)
    def status(key): return client.get('/v1/models', headers={'authorization': f'Bearer {key}'}).status_code
    assert (status('s'), status('secret-1')) == (401, 200)
    assert 'secret-1' not in seen + repr(vars(app))
    assert client.options('/v1/models').status_code == 405
    for keys in ('', [''], ['a', ''], [' a']):
        with pytest.raises(BadInput, match='a key is'): create_app(Service(engine, tokenizer, 'm'), keys)
    engine.close()
    for host in ('0.0.0.0', '::', '192.168.0.1', 'example.org'):
        with pytest.raises(BadInput, match='give it a key'): run_server(folder, host=host)


def test_pages_from_elsewhere(folder):
    model, tokenizer = load_model(folder, 'cpu'), load_tokenizer(folder)
    engine = Engine(model, tokenizer, slots=1)
    service = Service(engine, tokenizer, 'm')
    def status(app, origin):
        return TestClient(app, 'http://here:80').get('/v1/models', headers={'origin': origin}).status_code
    bare, open_ = create_app(service), create_app(service, cors=['https://b'])
    keyed = create_app(service, ['k'], ['https://b'])
    assert [status(bare, o) for o in ('http://here', 'https://b', 'null')] == [200, 403, 403]
    assert [status(open_, o) for o in ('https://b', 'https://c')] == [200, 403]
    assert status(keyed, 'https://b') == 401
    asked = {'origin': 'https://b', 'access-control-request-method': 'POST',
             'access-control-request-headers': 'authorization'}
    allowed = TestClient(keyed).options('/v1/chat/completions', headers=asked)
    assert allowed.status_code == 200 and allowed.headers['access-control-allow-origin'] == 'https://b'
    refused = TestClient(keyed).options('/v1/chat/completions', headers=asked | {'origin': 'https://c'})
    assert 'access-control-allow-origin' not in refused.headers
    engine.close()


# -- slow clients, and those who leave ---------------------------------------------------------------------------------

def test_who_reads_slowly_blocks_nobody_and_is_let_go(server):
    body = orjson.dumps(LONG | {'n': 16, 'logprobs': True, 'top_logprobs': 20})
    with connection(server, head(Content_Length=len(body)) + body, small=True) as s:
        assert s.recv(12) == b'HTTP/1.1 200'
        assert ask(server, HI)[0] == 200
        assert idle(server)  # all of it is written, read or not
        time.sleep(5)
        with pytest.raises((ConnectionResetError, EOFError)):
            while s.recv(1 << 20): pass
            raise EOFError  # a reply that ends before its end
    assert ask(server, HI)[0] == 200


def test_who_writes_slowly_is_let_go(server):
    with connection(server, head(Content_Length=100)[:30]) as s: assert until(lambda: s.recv(1) == b'')  # in the head
    with connection(server, head(Content_Length=100)) as s:
        for _ in range(12):
            with suppress(OSError): s.sendall(b' ')
            time.sleep(.2)
        assert s.recv(4096).split()[1] == b'408'
    assert idle(server)


def test_who_leaves_frees_the_place(server):
    before = metrics(server)['cancelled_total']
    body = orjson.dumps(LONG)
    data = head(Content_Length=len(body)) + body
    for read in (0, 0, 1, 1, 400):
        with connection(server, data) as s: read and s.recv(read)
    with connection(server, data[:-5]): pass
    whole = orjson.dumps(LONG | {'stream': False, 'messages': [{'role': 'user', 'content': 'word '*100}]})
    with connection(server, head(Content_Length=len(whole)) + whole): time.sleep(.1)
    assert idle(server) and metrics(server)['cancelled_total'] - before >= 3
    assert not [name for name in metrics(server) if 'status="5' in name]
    assert 'Traceback' not in server.log.read_text()


@pytest.fixture(scope='module')
def tiny(folder): return load_model(folder, 'cpu', torch.float32), load_tokenizer(folder)


def test_a_cancelled_answer_ends_within_a_step(tiny):
    engine = Engine(*tiny, slots=1, queue=3)
    told, endless = [], Sampling(900, ignore_eos=True)
    for prompt in ([1], [5]*100):
        job = engine.submit(prompt, endless, told.extend)
        assert until(lambda job=job: len(job.said) > 3)
        waiting = [engine.submit([2], endless, told.extend) for _ in range(3)]
        for other in waiting: engine.cancel(other)
        assert until(lambda: not engine.load['waiting'])  # though the only slot is taken
        assert engine.load['running'] == 1
        engine.cancel(job)
        steps = engine.stats.steps
        assert until(lambda: engine.load == {'running': 0, 'waiting': 0, 'tokens': 0})
        assert engine.stats.steps - steps <= 1
    assert engine.stats.cancelled == 8
    engine.close()


def test_a_stream_that_nobody_begins_is_cancelled(tiny):
    engine = Engine(*tiny, slots=1)
    app = create_app(Service(engine, tiny[1], 'm'))
    body, sent = orjson.dumps(LONG), []
    async def gone():
        messages = iter([{'type': 'http.request', 'body': body, 'more_body': False}])
        async def receive(): return next(messages, {'type': 'http.disconnect'})
        async def send(message): sent.append(message)
        scope = {'type': 'http', 'method': 'POST', 'path': '/v1/chat/completions', 'headers': [], 'query_string': b'',
                 'asgi': {'version': '3.0', 'spec_version': '2.3'}, 'http_version': '1.1', 'scheme': 'http',
                 'server': None}
        await app(scope, receive, send)
    asyncio.run(gone())
    assert until(lambda: not sum(engine.load.values())) and engine.stats.tokens < 100
    engine.close()


# -- how much is kept --------------------------------------------------------------------------------------------------

def test_all_replies_together_have_a_limit(tiny):
    engine, tokenizer = Engine(*tiny, slots=1), tiny[1]
    service = Service(engine, tokenizer, 'm')
    service.room = Room(2000)
    client = TestClient(create_app(service))
    async def held(): return Draft(engine, [([1], Sampling(900, ignore_eos=True))]*2, False, service.room)
    draft = asyncio.run(held())
    busy = client.post('/v1/chat/completions', json=HI | {'max_tokens': 400})
    assert busy.status_code == 429 and int(busy.headers['retry-after']) > 0
    draft.cancel(); draft.cancel()
    assert service.room.taken == 0 and client.post('/v1/chat/completions', json=HI).status_code == 200
    assert service.room.taken == 0
    engine.close()


def test_a_search_is_one_of_the_requests_that_are_answered(tiny):
    engine, tokenizer = Engine(*tiny, slots=1), tiny[1]
    service = Service(engine, tokenizer, 'm', max_concurrent=1)
    client, go = TestClient(create_app(service)), threading.Event()
    search = HI | {'num_beams': 2, 'n': 2}
    engine.alone(lambda: go.wait(60))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, '/v1/chat/completions', json=search)
        assert until(lambda: service.room.inside == 1)
        for asked in (HI, search, search | {'stream': False}):
            busy = TestClient(create_app(service)).post('/v1/chat/completions', json=asked)
            assert busy.status_code == 429 and int(busy.headers['retry-after']) > 0
        go.set()
        assert first.result().status_code == 200
    assert (service.room.inside, service.room.taken) == (0, 0)
    assert client.post('/v1/completions', json={'model': 'm', 'prompt': 'a', 'num_beams': 2}).status_code == 200
    engine.close()


def test_long_texts_are_read_in_pieces_and_come_out_the_same(tiny):
    model, tokenizer = tiny
    engine = Engine(model, tokenizer, slots=1)
    client = TestClient(create_app(Service(engine, tokenizer, 'm')))
    text = ' '.join(f'owl {i} rain' for i in range(70))
    ids = torch.tensor([tokenizer(text)['input_ids']])
    assert ids.shape[1] > 2*128
    with torch.no_grad(): slow, hidden = model(ids).logits[0].numpy(), model.base_model(ids)[0][0]
    packed = client.post('/logits', json={'input': text, 'encoding_format': 'base64'}).json()
    plain = client.post('/logits', json={'input': text}).json()
    assert packed['shape'] == plain['shape'] == [1, *slow.shape]
    sent = np.frombuffer(base64.b64decode(packed['logits']), '<f4').reshape(slow.shape)
    np.testing.assert_allclose(sent, slow, atol=1e-4)
    np.testing.assert_allclose(np.array(plain['logits'][0], np.float32), slow, atol=1e-4)
    rows = client.post('/v1/embeddings', json={'model': 'm', 'input': ['sun', text, 'rain']}).json()
    np.testing.assert_allclose(rows['data'][1]['embedding'], hidden.mean(0), atol=1e-4)
    engine.close()


# -- broken models -----------------------------------------------------------------------------------------------------

POISON, NOTHING = 777, 778


class _Poisoned(torch.nn.Module):
    "An embedding that fails at one token and is no number at another."
    def __init__(self, inner): super().__init__(); self.inner = inner

    @property
    def weight(self): return self.inner.weight

    def forward(self, ids):
        if (ids == POISON).any(): raise RuntimeError('poison')
        return torch.where((ids == NOTHING)[..., None], torch.nan, self.inner(ids))


@pytest.fixture
def poisoned(folder):
    model, tokenizer = load_model(folder, 'cpu', torch.float32), load_tokenizer(folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.set_input_embeddings(_Poisoned(model.get_input_embeddings()))
    engine = Engine(model, tokenizer, slots=3)
    yield engine, TestClient(create_app(Service(engine, tokenizer, 'm')))
    engine.close()


@pytest.mark.parametrize('bad', [POISON, NOTHING])
def test_a_broken_request_breaks_no_other(poisoned, bad):
    engine, client = poisoned
    def text(**more):
        return client.post('/v1/completions', json={'model': 'm', 'prompt': [5, 6], 'max_tokens': 12, 'seed': 1} | more)
    alone = text().json()['choices'][0]['text']
    told = []
    others = [engine.submit([5, 6, 7], Sampling(200, ignore_eos=True), told.extend) for _ in range(2)]
    assert until(lambda: all(len(o.said) > 2 for o in others))
    read, written = text(prompt=[5, bad]), text(logit_bias={str(bad): 100}, temperature=0)
    for reply in (read, written):
        assert reply.status_code == 500 and reply.json()['error']['type'] == 'server_error'
        assert 'poison' not in reply.text
    streamed = text(logit_bias={str(bad): 100}, temperature=0, stream=True).text
    assert '"server_error"' in streamed and streamed.endswith('data: [DONE]\n\n')
    assert text().json()['choices'][0]['text'] == alone
    assert until(lambda: all(len(o.said) == 200 for o in others)) and not any(p.finish == 'error' for p in told)
    assert engine.stats.errors == 3 and engine.ended is None
    if bad == POISON:
        assert client.post('/v1/embeddings', json={'model': 'm', 'input': [[5, bad]]}).status_code == 500
    assert client.get('/health').status_code == 200 and until(lambda: not sum(engine.load.values()))


def test_what_fails_in_choosing_fails_one_answer(tiny, monkeypatch):
    engine, told = Engine(*tiny, slots=2), {0: [], 1: []}
    choose = engine.words.choose
    def careful(jobs, logits):
        if any(job.prompt == [9] for job in jobs): raise RuntimeError('this one')
        return choose(jobs, logits)
    monkeypatch.setattr(engine.words, 'choose', careful)
    engine.submit([5], Sampling(60, ignore_eos=True), told[0].extend)
    engine.submit([9], Sampling(60, ignore_eos=True), told[1].extend)
    assert until(lambda: told[0] and told[0][-1].finish)
    assert (told[0][-1].finish, told[1][-1].finish, engine.ended) == ('length', 'error', None)
    engine.close()


# -- the end -----------------------------------------------------------------------------------------------------------

@contextmanager
def started(command):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try: yield process, next(word for word in process.stdout.readline().split() if word.startswith('http'))
    finally: process.kill(); process.communicate()


def stream(url):
    model = json.loads(urllib.request.urlopen(f'{url}/models', timeout=20).read())['data'][0]['id']
    asked = urllib.request.Request(f'{url}/chat/completions', orjson.dumps(LONG | {'model': model}))
    return urllib.request.urlopen(asked, timeout=60)


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no SIGTERM')
def test_answers_on_their_way_are_finished_and_new_ones_refused(folder):
    with started([SCRIPT, 'serve', str(folder), '--device', 'cpu', '--port', '0']) as (process, url):
        with stream(url) as answer:
            first = answer.readline()
            process.send_signal(signal.SIGTERM)
            def refused():
                try: urllib.request.urlopen(url.removesuffix('/v1') + '/health', timeout=20)
                except urllib.error.HTTPError as e: return e.code == 503
                except OSError: return True
            assert until(refused) and process.poll() is None
            rest = answer.read().decode()
        assert first.startswith(b'data: ') and rest.endswith('data: [DONE]\n\n') and '"length"' in rest
        assert process.wait(30) == 0 and 'Traceback' not in process.stderr.read()


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no SIGTERM')
def test_the_end_does_not_wait_for_ever(folder):
    code = ('import sys; from llm_distill.serving.process import run_server; '
            'run_server(sys.argv[1], port=0, device="cpu", grace=.2, on_ready=lambda url: print(url, flush=True))')
    with started([sys.executable, '-c', code, str(folder)]) as (process, url):
        answers = [stream(url) for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        for answer in answers:
            with suppress(OSError, http.client.HTTPException): assert b'[DONE]' not in answer.read()
            answer.close()
