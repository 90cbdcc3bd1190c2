"The batch APIs of the providers to test against, through the official clients."
import asyncio
import json
import os
import urllib.request
from datetime import timedelta
from pathlib import Path

import anthropic
import openai
import pytest
from servers import Fault, Limiter, Provider

ASK = [{'role': 'user', 'content': 'What is it that you like to see near the water?'}]
NAMES = [f'row-{n}' for n in range(6)]


def client(p, key='k'):
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(api_key=key, base_url=p.url, max_retries=0, timeout=10, http_client=http)


def claude(p, key='k'):
    http = anthropic.DefaultHttpxClient(trust_env=False)
    return anthropic.Anthropic(api_key=key, base_url=p.url, max_retries=0, timeout=10, http_client=http)


def line(custom_id, url='/v1/chat/completions', **body):
    "A line of an input file."
    return {'custom_id': custom_id, 'method': 'POST', 'url': url,
            'body': {'model': 'gpt-4o', 'messages': ASK, 'max_tokens': 4} | body}


def sent(c, rows, name='in.jsonl', **more):
    "A file of rows, which may be bytes already, uploaded."
    data = rows if isinstance(rows, bytes) else b''.join(json.dumps(r).encode() + b'\n' for r in rows)
    return c.files.create(file=(name, data), purpose='batch', **more)


def begin(c, rows, endpoint='/v1/chat/completions', **more):
    "A batch of rows."
    return c.batches.create(input_file_id=sent(c, rows).id, endpoint=endpoint, completion_window='24h', **more)


def polled(get, own, count=3):
    "What a batch is after so many polls."
    for _ in range(count): found = get(own)
    return found


def done(c, rows, *args, **more): return polled(c.batches.retrieve, begin(c, rows, *args, **more).id)


def lines(c, own): return [json.loads(row) for row in c.files.content(own).text.splitlines()] if own else []
def names(rows): return [r['custom_id'] for r in rows]


def params(**more): return {'model': 'claude-sonnet-5', 'max_tokens': 4, 'messages': ASK} | more


def asked(*custom_ids, **more):
    "Requests of a message batch."
    return [{'custom_id': i, 'params': params(**more)} for i in custom_ids]


def results(c, own): return {r.custom_id: r.result for r in c.messages.batches.results(own)}


def test_a_batch_of_openai_from_file_to_files():
    with Provider('openai') as p, client(p) as c:
        rows = [line(n) for n in NAMES] + [line('bad', top_k=3), line('streamed', stream=True)]
        made = begin(c, rows, metadata={'for': 'me'})
        assert made.status == 'validating' and made.request_counts.total == 0 and made.metadata == {'for': 'me'}
        polls = [c.batches.retrieve(made.id) for _ in range(4)]
        assert [b.status for b in polls] == ['in_progress', 'finalizing', 'completed', 'completed']
        assert [b.request_counts.completed for b in polls] == [4, 6, 6, 6] and polls[0].request_counts.total == 8
        last = polls[-1]
        assert (last.model, last.request_counts.failed) == ('gpt-4o', 2) and polls[1].output_file_id is None
        assert last.created_at <= last.in_progress_at <= last.finalizing_at <= last.completed_at < last.expires_at
        out, wrong = lines(c, last.output_file_id), lines(c, last.error_file_id)
        assert sorted(names(out)) == NAMES != names(out) and {r['error'] for r in out} == {None}
        assert {r['response']['status_code'] for r in out} == {200}
        bodies = [r['response']['body'] for r in out]
        assert len({b['id'] for b in bodies}) == 6 == len({r['response']['request_id'] for r in out})
        assert all(b['choices'][0]['message']['content'] for b in bodies)
        assert last.usage.total_tokens == sum(b['usage']['total_tokens'] for b in bodies) > 24
        assert sorted(names(wrong)) == ['bad', 'streamed'] and {r['error'] for r in wrong} == {None}
        assert {r['response']['status_code'] for r in wrong} == {400}
        assert {r['response']['body']['error']['param'] for r in wrong} == {'top_k', 'stream'}
        state = p.batches[made.id]
        assert state.requests == [(r['custom_id'], r['body']) for r in rows]
        assert (state.status, state.polls) == ('completed', 4)


@pytest.mark.parametrize('endpoint, model, body', [
    ('/v1/responses', 'o3', {'input': 'Hello', 'max_output_tokens': 40}),
    ('/v1/completions', 'davinci-002', {'prompt': 'Like it', 'echo': True, 'logprobs': 2, 'max_tokens': 1})])
def test_other_endpoints(endpoint, model, body):
    rows = [{'custom_id': n, 'method': 'POST', 'url': endpoint, 'body': {'model': model, **body}} for n in NAMES]
    with Provider('openai', batch_polls=0) as p, client(p) as c:
        batch = polled(c.batches.retrieve, begin(c, rows, endpoint).id, 1)
        out = lines(c, batch.output_file_id)
        assert batch.status == 'completed' and batch.error_file_id is None and sorted(names(out)) == NAMES
        assert {r['response']['body']['model'] for r in out} == {model} and batch.usage.output_tokens > 0
        assert bool(batch.usage.output_tokens_details.reasoning_tokens) == (model == 'o3')


def test_batches_of_other_flavours():
    with Provider('openai', flavour='vllm', model='m') as p, client(p) as c:
        assert done(c, [line('a', model='m'), line('b', model='m')]).request_counts.completed == 2
    for flavour in ('plain', 'dropper'):
        with Provider('openai', flavour=flavour) as p, client(p) as c:
            with pytest.raises(openai.NotFoundError): sent(c, [line('a')])
            with pytest.raises(openai.NotFoundError): c.batches.list()


def test_files():
    with Provider('openai') as p, client(p) as c:
        data = '{"a": "é\u2028"}\r\n--\r\n{"b": 1}\n'.encode() + bytes(range(256)) + b'\r\n'
        made = sent(c, data)
        assert (made.bytes, made.filename, made.purpose) == (len(data), 'in.jsonl', 'batch')
        assert made.expires_at - made.created_at == 30*86400 and c.files.retrieve(made.id) == made
        assert c.files.content(made.id).content == data
        short = sent(c, b'{}', expires_after={'anchor': 'created_at', 'seconds': 3600})
        other = c.files.create(file=('a.txt', b'x'), purpose='user_data')
        assert short.expires_at - short.created_at == 3600 and other.expires_at is None
        assert [f.id for f in c.files.list()] == [other.id, short.id, made.id]
        assert [f.id for f in c.files.list(purpose='batch', order='asc', limit=1)] == [made.id, short.id]
        assert c.files.delete(made.id).deleted and set(p.memory.files) == {short.id, other.id}
        for call in (c.files.retrieve, c.files.content, c.files.delete):
            with pytest.raises(openai.NotFoundError): call(made.id)
        with pytest.raises(openai.BadRequestError, match='jsonl'): sent(c, data, 'in.txt')
        with pytest.raises(openai.BadRequestError, match='jsonl'): c.files.create(file=data, purpose='batch')
        with pytest.raises(openai.BadRequestError, match='not one of'): c.files.create(file=('a', b''), purpose='fun')
        begun = dict(endpoint='/v1/chat/completions', completion_window='24h')
        for own in (made.id, 'file-none', other.id):
            with pytest.raises(openai.BadRequestError) as e: c.batches.create(input_file_id=own, **begun)
            assert e.value.param == 'input_file_id'
        with pytest.raises(openai.BadRequestError):
            c.batches.create(input_file_id=short.id, **begun | {'completion_window': '1h'})
        assert not p.batches


@pytest.mark.parametrize('rows, code, at', [
    (b'', 'empty_file', None), (b'{"a": 1\n', 'invalid_json_line', 1), (b'{"a": NaN}\n', 'invalid_json_line', 1),
    ([line('a'), line('b'), line('a')], 'duplicate_custom_id', 3),
    ([line('a'), line('b') | {'method': 'GET'}], 'invalid_method', 2),
    ([line('a'), line('b', '/v1/responses')], 'url_mismatch', 2),
    ([line('a'), line('b', model='gpt-4o-mini')], 'model_mismatch', 2),
    ([line('a'), {'custom_id': 'b'}], 'missing_required_parameter', 2), ([line(7)], 'invalid_type', 1),
    ([line(n) for n in 'abcd'], 'too_many_tasks', None), ([line('a', user='u'*900)], 'file_too_large', None)])
def test_what_makes_a_batch_fail(rows, code, at):
    with Provider('openai', batch_max_requests=3, batch_max_bytes=900) as p, client(p) as c:
        made = begin(c, rows)
        assert made.status == 'validating' and made.errors is None
        failed = c.batches.retrieve(made.id)
        assert failed.status == 'failed' and failed.failed_at and failed.output_file_id is failed.error_file_id is None
        assert [(e.code, e.line) for e in failed.errors.data] == [(code, at)] and failed.errors.data[0].message
        assert failed.request_counts.total == 0 and p.batches[made.id].status == 'failed'
        with pytest.raises(openai.ConflictError): c.batches.cancel(made.id)


def test_an_endpoint_that_has_no_batches():
    with Provider('openai') as p, client(p) as c:
        failed = done(c, [line('a', '/v1/embeddings')], '/v1/embeddings')
        assert failed.status == 'failed' and failed.errors.data[0].param == 'endpoint'


def test_lines_that_expire_or_go_wrong_at_openai():
    faults, seen = {'row-1': 'expired', 'row-4': 'error'}, []
    def fault(custom_id, number): seen.append((custom_id, number)); return faults.get(custom_id)
    with Provider('openai', batch_fault=fault) as p, client(p) as c:
        batch = done(c, [line(n) for n in NAMES])
        assert batch.status == 'expired' and batch.expired_at and batch.completed_at is None
        assert seen == [(n, i + 1) for i, n in enumerate(NAMES)]
        assert sorted(names(lines(c, batch.output_file_id))) == [n for n in NAMES if n not in faults]
        wrong = {r['custom_id']: r for r in lines(c, batch.error_file_id)}
        assert wrong['row-1']['response'] is None and wrong['row-1']['error']['code'] == 'batch_expired'
        assert wrong['row-4']['error'] is None and wrong['row-4']['response']['status_code'] == 500
        assert wrong['row-4']['response']['body']['error']['type'] == 'server_error' and len(wrong) == 2
        assert (batch.request_counts.completed, batch.request_counts.failed) == (4, 1)
        del faults['row-1']
        assert done(c, [line(n) for n in NAMES]).status == 'completed'


def test_cancelling_at_openai():
    with Provider('openai') as p, client(p) as c:
        made = begin(c, [line(n) for n in NAMES])
        c.batches.retrieve(made.id)
        for _ in range(2): assert c.batches.cancel(made.id).status == 'cancelling'
        batch = c.batches.retrieve(made.id)
        assert batch.status == 'cancelled' and batch.cancelling_at <= batch.cancelled_at
        assert sorted(names(lines(c, batch.output_file_id))) == NAMES[:3]
        wrong = lines(c, batch.error_file_id)
        assert sorted(names(wrong)) == NAMES[3:] and {r['error']['code'] for r in wrong} == {'batch_cancelled'}
        with pytest.raises(openai.ConflictError): c.batches.cancel(made.id)
        with pytest.raises(openai.NotFoundError): c.batches.cancel('batch_none')
        with pytest.raises(openai.NotFoundError): c.batches.retrieve('batch_none')
        at_once = begin(c, [line('a'), line('b')])
        c.batches.cancel(at_once.id)
        at_once = c.batches.retrieve(at_once.id)
        assert (at_once.status, at_once.output_file_id, at_once.request_counts.total) == ('cancelled', None, 2)


def test_lists_of_openai_batches():
    with Provider('openai') as p, client(p) as c:
        assert c.batches.list().data == []
        made = [begin(c, [line('a')]).id for _ in range(5)]
        first = c.batches.list(limit=2)
        assert [b.id for b in first.data] == made[:2:-1] and first.has_more
        assert [b.id for b in c.batches.list(limit=2)] == made[::-1]
        last = c.batches.list(after=made[2])
        assert [b.id for b in last.data] == made[1::-1] and not last.has_more
        assert {b.polls for b in p.batches.values()} == {0}
        for wrong in ({'limit': 0}, {'limit': 101}, {'after': 'batch_none'}):
            with pytest.raises(openai.BadRequestError): c.batches.list(**wrong)


def test_keys_and_faults_of_openai_batches():
    with Provider('openai', key='right') as p, client(p) as c, client(p, 'right') as good:
        for call in (lambda: sent(c, [line('a')]), c.batches.list, c.files.list, lambda: c.batches.retrieve('x'),
                     lambda: c.batches.cancel('x'), lambda: c.files.content('x')):
            with pytest.raises(openai.AuthenticationError): call()
        p.add(None, Fault('status', 503), None, Fault('cut_json'))
        with pytest.raises(openai.InternalServerError): begin(good, [line('a')])
        assert not p.batches and len(p.memory.files) == 1
        with pytest.raises(ValueError): begin(good, [line('a')])
        assert len(p.batches) == 1 == len([*good.batches.list()])
        p.add(None, Fault('empty_answer'))
        out = lines(good, done(good, [line('a')]).output_file_id)
        assert out[0]['response']['body']['choices'][0]['message']['content'] == ''
    with Provider('openai', limiter=Limiter(1, 10**6)) as p, client(p) as c:
        file = sent(c, [line('a')])
        with pytest.raises(openai.RateLimitError):
            c.batches.create(input_file_id=file.id, endpoint='/v1/chat/completions', completion_window='24h')
        assert not p.batches


def schema_errors():
    "A function that tells what is wrong with an object, by its schema's name."
    folder = os.environ.get('LLMD_DATA')
    path = Path(folder or '.')/'openai-openapi.json'
    if not folder or not path.exists(): pytest.skip('LLMD_DATA does not name a folder with openai-openapi.json')
    validators = pytest.importorskip('jsonschema')
    document = json.loads(path.read_text())
    def told(name, made):
        # The document's own examples write null for what there is not, and its schemas leave that out
        made = {k: v for k, v in made.items() if v is not None}
        wanted = {'$ref': f'#/components/schemas/{name}', 'components': document['components']}
        unknown = set(made) - set(document['components']['schemas'][name]['properties'])
        found = validators.Draft202012Validator(wanted).iter_errors(made)
        return [e.message for e in found] + [f'unknown: {n}' for n in unknown]
    return told


def test_openai_objects_keep_to_the_published_schemas():
    wrong = schema_errors()
    with Provider('openai', batch_fault=lambda i, n: 'expired' if i == 'old' else None) as p, client(p) as c:
        c.files.create(file=('a.txt', b'x'), purpose='user_data')
        rows = {'good': [line('a'), line('b', top_k=1)], 'old': [line('a'), line('old')], 'bad': [line('a')]*2}
        statuses = []
        for name, sort in rows.items():
            made = begin(c, sort, metadata={'name': name})
            for b in (made, *(c.batches.retrieve(made.id) for _ in range(3))):
                assert wrong('Batch', b.to_dict()) == []
                statuses.append(b.status)
        made = begin(c, rows['good'])
        for b in (c.batches.cancel(made.id), c.batches.retrieve(made.id)):
            assert wrong('Batch', b.to_dict()) == []
            statuses.append(b.status)
        assert set(statuses) == {'validating', 'in_progress', 'finalizing', 'completed', 'expired', 'failed',
                                 'cancelling', 'cancelled'}
        files = c.files.list().data
        assert len(files) == 10 and [wrong('OpenAIFile', f.to_dict()) for f in files] == [[]]*10
        told = json.loads(c.batches.with_raw_response.list().text)
        told['data'] = [{k: v for k, v in b.items() if v is not None} for b in told['data']]
        told['data'] = [b for b in told['data'] if wrong('Batch', b) == []]
        assert len(told['data']) == 4 and wrong('ListBatchesResponse', told) == []
        assert wrong('DeleteFileResponse', c.files.delete(files[0].id).to_dict()) == []
        assert wrong('Batch', {'id': 7, 'fun': 1})


def test_a_batch_of_messages():
    with Provider('anthropic') as p, claude(p) as c:
        wrong = [*asked('bad', temperature=7), *asked('streamed', stream=True), *asked('nobody', model='gpt-4o')]
        made = c.messages.batches.create(requests=asked(*NAMES) + wrong)
        assert made.processing_status == 'in_progress' and made.request_counts.processing == 9
        assert made.results_url is made.ended_at is None and made.expires_at - made.created_at == timedelta(days=1)
        with pytest.raises(anthropic.AnthropicError, match='results_url'): c.messages.batches.results(made.id)
        polls = [c.messages.batches.retrieve(made.id) for _ in range(2)]
        assert [b.processing_status for b in polls] == ['in_progress', 'ended']
        assert polls[0].request_counts == made.request_counts
        last = polls[-1]
        assert last.request_counts.to_dict() == {'processing': 0, 'succeeded': 6, 'errored': 3, 'canceled': 0,
                                                 'expired': 0}
        assert last.results_url == f'{p.root}/v1/messages/batches/{made.id}/results' and last.ended_at
        found = results(c, made.id)
        assert sorted(found)[-6:] != list(found)[-6:] and set(found) == {*NAMES, 'bad', 'streamed', 'nobody'}
        said = [found[n].message for n in NAMES]
        assert len({m.id for m in said}) == 6 and all(m.content[0].text for m in said)
        assert {found[n].error.error.type for n in ('bad', 'streamed')} == {'invalid_request_error'}
        assert found['nobody'].type == 'errored' and found['nobody'].error.error.type == 'not_found_error'
        state = p.batches[made.id]
        assert state.requests[:6] == [(n, params()) for n in NAMES] and state.status == 'ended'
        assert state.polls == 4  # The client asks for the batch itself before its results
        assert p.requests[-1].path == f'/v1/messages/batches/{made.id}/results'
        kind = urllib.request.Request(last.results_url, headers={'x-api-key': 'k', 'anthropic-version': '2023-06-01'})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(kind, timeout=10) as r:
            assert r.headers['content-type'] == 'application/x-jsonl' and len(r.read().splitlines()) == 9


def test_long_answers_need_no_stream_in_a_batch():
    with Provider('anthropic', batch_polls=0) as p, claude(p) as c:
        made = c.messages.batches.create(requests=asked('long', max_tokens=64_000))
        assert results(c, made.id)['long'].type == 'succeeded'


def test_lines_that_expire_or_go_wrong_at_anthropic():
    faults = {1: 'expired', 4: 'error'}
    with Provider('anthropic', batch_fault=lambda i, n: faults.get(n), batch_polls=1) as p, claude(p) as c:
        made = c.messages.batches.create(requests=asked(*NAMES))
        batch = polled(c.messages.batches.retrieve, made.id, 2)
        found = results(c, made.id)
        assert (batch.request_counts.expired, batch.request_counts.errored, batch.request_counts.succeeded) == (1, 1, 4)
        assert found['row-0'].type == 'expired' and found['row-3'].error.error.type == 'api_error'


def test_cancelling_and_deleting_at_anthropic():
    with Provider('anthropic') as p, claude(p) as c:
        own = c.messages.batches.create(requests=asked(*NAMES)).id
        c.messages.batches.retrieve(own)
        with pytest.raises(anthropic.BadRequestError): c.messages.batches.delete(own)
        for _ in range(2): batch = c.messages.batches.cancel(own)
        assert batch.processing_status == 'canceling' and batch.cancel_initiated_at and batch.ended_at is None
        batch = c.messages.batches.retrieve(own)
        assert batch.processing_status == 'ended' and batch.request_counts.canceled == 3
        found = results(c, own)
        assert [found[n].type for n in NAMES] == ['succeeded']*3 + ['canceled']*3
        with pytest.raises(anthropic.BadRequestError): c.messages.batches.cancel(own)
        assert c.messages.batches.delete(own).type == 'message_batch_deleted'
        for call in (c.messages.batches.retrieve, c.messages.batches.cancel, c.messages.batches.delete,
                     c.messages.batches.results):
            with pytest.raises(anthropic.NotFoundError): call(own)
        assert c.messages.batches.list().data == [] and p.batches[own].deleted


def test_lists_of_message_batches():
    with Provider('anthropic') as p, claude(p) as c:
        made = [c.messages.batches.create(requests=asked('a')).id for _ in range(5)]
        first = c.messages.batches.list(limit=2)
        assert [b.id for b in first.data] == made[:2:-1] and first.has_more and first.last_id == made[3]
        assert [b.id for b in c.messages.batches.list(limit=2)] == made[::-1]
        assert [b.id for b in c.messages.batches.list(after_id=made[1]).data] == [made[0]]
        newer = c.messages.batches.list(before_id=made[0], limit=3)
        assert [b.id for b in newer.data] == made[3:0:-1] and newer.has_more and newer.first_id == made[3]
        with pytest.raises(anthropic.BadRequestError): c.messages.batches.list(limit=1001)


@pytest.mark.parametrize('requests', [
    [], asked('a', 'a'), asked('with space'), asked('x'*65), asked(''), asked('é'), [{'custom_id': 'a'}],
    [{'custom_id': 'a', 'params': params(), 'method': 'POST'}]])
def test_what_anthropic_refuses(requests):
    with Provider('anthropic') as p, claude(p) as c:
        with pytest.raises(anthropic.BadRequestError, match='requests'): c.messages.batches.create(requests=requests)
        assert not p.batches


def test_limits_keys_and_faults_of_message_batches():
    with Provider('anthropic', batch_max_requests=2, batch_max_bytes=900, key='right') as p, claude(p, 'right') as c:
        for requests in (asked(*'abc'), asked('a', system='s'*900)):
            with pytest.raises(anthropic.APIStatusError) as e: c.messages.batches.create(requests=requests)
            assert e.value.status_code == 413 and e.value.body['error']['type'] == 'request_too_large'
        for call in (lambda w: w.messages.batches.create(requests=asked('a')), lambda w: w.messages.batches.list()):
            with pytest.raises(anthropic.AuthenticationError), claude(p) as w: call(w)
        p.add(Fault('status', 529), None, Fault('status', 500))
        with pytest.raises(anthropic.APIStatusError): c.messages.batches.create(requests=asked('a'))
        assert not p.batches
        own = c.messages.batches.create(requests=asked(*'ab')).id
        with pytest.raises(anthropic.InternalServerError): c.messages.batches.cancel(own)
        assert p.batches[own].status == 'in_progress' and [*p.batches] == [own]


def test_the_asynchronous_clients():
    async def both(p, q):
        kept = dict(api_key='k', max_retries=0, timeout=10)
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=p.url, http_client=http, **kept) as c:
            file = await c.files.create(file=('in.jsonl', json.dumps(line('a')).encode()), purpose='batch')
            made = await c.batches.create(input_file_id=file.id, endpoint='/v1/chat/completions',
                                          completion_window='24h')
            made = await c.batches.retrieve(made.id)
            out = (await c.files.content(made.output_file_id)).text
        http = anthropic.DefaultAsyncHttpxClient(trust_env=False)
        async with anthropic.AsyncAnthropic(base_url=q.url, http_client=http, **kept) as c:
            made = await c.messages.batches.create(requests=asked('a'))
            return json.loads(out), [r async for r in await c.messages.batches.results(made.id)]
    with Provider('openai', batch_polls=0) as p, Provider('anthropic', batch_polls=0) as q:
        out, found = asyncio.run(both(p, q))
    assert out['custom_id'] == found[0].custom_id == 'a' and found[0].result.type == 'succeeded'


@pytest.mark.parametrize('protocol', ['openai', 'anthropic'])
@pytest.mark.parametrize('wrong', [{'batch_polls': -1}, {'batch_polls': True}, {'batch_max_requests': 0},
                                   {'batch_max_bytes': 1.5}, {'batch_fault': 'error'}, {'batch_poll': 1}])
def test_options_are_checked(protocol, wrong):
    with pytest.raises((TypeError, ValueError), match='batch'): Provider(protocol, **wrong)
