"The client of tuning jobs: what networks do to it, on real sockets, and then the real service."
import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from aiohttp import web

from llm_distill.cli import main
from llm_distill.tuning.aclient import AsyncTuningClient
from llm_distill.tuning.client import TuningClient
from llm_distill.tuning.errors import (APIError, AuthenticationError, ConflictError, ConnectionError, NotFoundError,
                                       RateLimitError, TuningError, TuningFailed, TuningTimeout, ValidationError)

KEY = 'sk-canary-in-the-mine'


class Stub:
    "An HTTP server in a thread, that does what a test's function says; `seen` is what arrived."
    def __init__(self, answer, read=True):
        self.answer, self.read, self.seen, self.gone, self.loop = answer, read, [], [], asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()

    async def _start(self):
        app = web.Application(client_max_size=2**30)
        app.router.add_route('*', '/{any:.*}', self._handle)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, '127.0.0.1', 0)
        await site.start()
        self.url = f'http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}'

    async def _handle(self, request):
        seen = {'method': request.method, 'path': request.path, 'headers': dict(request.headers),
                'query': dict(request.query), 'body': await request.read() if self.read else b''}
        self.seen.append(seen)
        try: answer = await self.answer(request, len(self.seen) - 1)
        except asyncio.CancelledError: self.gone.append(request.path); raise
        return web.json_response(answer) if isinstance(answer, dict) else answer

    def __enter__(self): return self
    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)


def job(status='running', id='tune-1', **more):
    return {'id': id, 'model': 'smollm2', 'training_file': 'file-1', 'created_at': 0., 'status': status} | more


def status(code, message='no', **headers):
    return web.json_response({'error': {'message': message, 'param': 'x', 'code': 'c'}}, status=code, headers=headers)


def hang_up(request):
    "Close the connection, whatever was promised."
    request.transport.abort()
    raise asyncio.CancelledError


def client(stub, **more): return TuningClient(KEY, stub.url, **{'timeout': 5} | more)


def script(*answers):
    "Each request gets the next answer, the last one for good; functions are called with the request."
    async def answer(request, n):
        found = answers[min(n, len(answers) - 1)]
        return found(request) if callable(found) else found
    return answer


# -- retries ---------------------------------------------------------------------------------------------------------

def test_what_may_pass_is_asked_again():
    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=1), usegmt=True)
    faults = [lambda r: status(429, **{'Retry-After': '0'}), lambda r: status(503, **{'Retry-After': later}), hang_up,
              lambda r: status(502)]
    for fault in faults:
        with Stub(script(fault, job())) as stub, client(stub) as c:
            assert c.tunings.retrieve('tune-1').status == 'running'
            assert [s['path'] for s in stub.seen] == ['/v1/tunings/tune-1']*2
            assert stub.seen[0]['headers']['Authorization'] == f'Bearer {KEY}'


def test_attempts_are_counted_and_what_the_service_asks_is_waited_for():
    busy = script(lambda r: status(429, 'eight jobs wait', **{'Retry-After': '1'}))
    with Stub(busy) as stub, client(stub, max_retries=1) as c:
        start = time.monotonic()
        with pytest.raises(RateLimitError, match='asks to wait 1 s') as e: c.tunings.retrieve('tune-1')
        assert time.monotonic() - start >= 1 and len(stub.seen) == 2
        assert (e.value.status, e.value.retry_after, e.value.attempts, e.value.code) == (429, 1., 2, 'c')
    with Stub(script(lambda r: status(429, **{'Retry-After': '86400'}))) as stub, client(stub) as c:
        with pytest.raises(RateLimitError) as e: c.tunings.retrieve('tune-1')
        assert len(stub.seen) == 1 and e.value.retry_after == 86400  # nobody sits through a day


@pytest.mark.parametrize('code, kind', [(400, ValidationError), (401, AuthenticationError), (403, AuthenticationError),
                                        (404, NotFoundError), (409, ConflictError), (422, ValidationError)])
def test_what_will_not_pass_is_asked_once(code, kind):
    with Stub(script(lambda r: status(code))) as stub, client(stub) as c:
        for ask in (lambda: c.tunings.retrieve('tune-1'), lambda: c.tunings.create('smollm2', 'file-1'),
                    lambda: c.tunings.cancel('tune-1'), lambda: c.tunings.delete('tune-1')):
            stub.seen.clear()
            with pytest.raises(kind) as e: ask()
            assert (e.value.status, e.value.param, e.value.attempts, len(stub.seen)) == (code, 'x', 1, 1)


def test_nobody_there_and_nobody_who_answers():
    with Stub(script(job())) as stub: pass
    with client(stub, max_retries=1) as c, pytest.raises(ConnectionError, match='nothing answers') as e: c.health()
    assert isinstance(e.value, OSError) and not e.value.sent and e.value.attempts == 2
    async def never(request, n): await asyncio.sleep(60)
    with Stub(never) as stub, client(stub, timeout=.3, max_retries=1) as c:
        with pytest.raises(TuningTimeout) as e: c.tunings.retrieve('tune-1')
        assert isinstance(e.value, TimeoutError) and len(stub.seen) == 2


def test_a_create_whose_answer_was_lost_makes_one_job():
    made = {}
    def lost(request): made.setdefault(request.headers['Idempotency-Key'], 'tune-1'); hang_up(request)
    def again(request): return job(id=made.setdefault(request.headers['Idempotency-Key'], 'tune-2'))
    with Stub(script(lost, again)) as stub, client(stub) as c:
        assert c.tunings.create('smollm2', 'file-1').id == 'tune-1'
        assert len(made) == 1 and stub.seen[0]['body'] == stub.seen[1]['body']
        assert c.tunings.create('smollm2', 'file-1').id == 'tune-2'  # another call is another job
        c.tunings.create('smollm2', 'file-1', idempotency_key='mine')
        assert stub.seen[-1]['headers']['Idempotency-Key'] == 'mine'


def test_a_cancel_or_delete_whose_answer_was_lost_is_done():
    with Stub(script(hang_up, lambda r: status(409), job('cancelled'))) as stub, client(stub) as c:
        assert c.tunings.cancel('tune-1').status == 'cancelled'
    with Stub(script(hang_up, lambda r: status(409), job('succeeded'))) as stub, client(stub) as c:
        with pytest.raises(ConflictError): c.tunings.cancel('tune-1')
    with Stub(script(hang_up, lambda r: status(404))) as stub, client(stub) as c: c.tunings.delete('tune-1')
    with Stub(script(lambda r: status(429, **{'Retry-After': '0'}), lambda r: status(404))) as stub, client(stub) as c:
        with pytest.raises(NotFoundError): c.tunings.delete('tune-1')  # the first did nothing


# -- replies that are none -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('reply, said', [
    (lambda r: web.Response(text='<html>Sign in'), 'no JSON'), (lambda r: web.Response(body=b'\xff{'), 'no JSON'),
    (lambda r: web.Response(text=''), 'no JSON'), (lambda r: web.json_response([1]), 'no Tuning'),
    (lambda r: web.json_response({'id': 5}), 'no Tuning'), (lambda r: web.json_response(job('paused')), 'status'),
    (lambda r: web.Response(status=404, text='<html>nginx'), 'with no JSON'),
    (lambda r: web.Response(status=302, headers={'Location': 'https://far.example/login'}), 'far.example')])
def test_replies_that_are_none(reply, said):
    with Stub(script(reply)) as stub, client(stub) as c:
        with pytest.raises(APIError, match=said): c.tunings.retrieve('tune-1')
        assert len(stub.seen) == 1


def test_newer_services_are_understood():
    with Stub(script(job(novelty=1))) as stub, client(stub) as c: assert c.tunings.retrieve('tune-1').novelty == 1


def test_the_key_is_nowhere(caplog):
    caplog.set_level('DEBUG')
    def echo(request): return status(401, f'no such key: {request.headers["Authorization"]}')
    def page(request): return web.Response(text=f'<html>{request.headers["Authorization"]}')
    def garbled(request): return web.Response(headers={'Content-Length': '9999'}, text=KEY)
    with Stub(script(echo, page, hang_up, garbled)) as stub, client(stub, max_retries=0, timeout=1) as c:
        errors = []
        for _ in range(4):
            with pytest.raises(TuningError) as e: c.tunings.retrieve('tune-1')
            errors.append(e.value)
        shown = [repr(c), str(vars(c)), str(vars(c._there)), pickle.dumps(c), caplog.text]
    for e in errors:
        shown += [repr(e), str(vars(e)), pickle.dumps(e)]
        context = e.__context__
        while context is not None: shown += [repr(context), str(vars(context))]; context = context.__context__
    assert len(stub.seen) == 4 and all(KEY not in str(s) for s in shown)
    os.environ.pop('LLM_DISTILL_API_KEY', None)
    assert repr(pickle.loads(pickle.dumps(c))) == repr(c)


# -- what is not sent ------------------------------------------------------------------------------------------------

def test_bad_input_is_not_sent(tmp_path):
    empty = tmp_path/'empty.jsonl'
    empty.touch()
    good = tmp_path/'chats.jsonl'
    good.write_text('{"messages": []}\n')
    wrong = [(dict(hyperparameters={'n_epoch': 3}), 'hyperparameters.n_epoch'), (dict(method='rl'), 'method'),
             (dict(hyperparameters={'batch_size': 0}), 'hyperparameters.batch_size'), (dict(teacher='x'), 'teacher'),
             (dict(training_file=tmp_path/'none.jsonl'), 'training_file'), (dict(training_file=empty), 'training_file'),
             (dict(training_file=tmp_path), 'training_file'), (dict(training_file=5), 'training_file'),
             (dict(training_file=None), 'training_file'), (dict(validation_file='x/y'), 'validation_file'),
             (dict(metadata={'a': 1}), 'metadata.a'), (dict(seed=-1), 'seed'),
             (dict(idempotency_key='ä'), 'idempotency_key')]
    told = dict(model='smollm2', training_file=good)
    with Stub(script(job())) as stub, client(stub) as c:
        for more, param in wrong:
            with pytest.raises(ValidationError) as e: c.tunings.create(**told | more)
            assert (e.value.param, e.value.status) == (param, None), e.value
        with pytest.raises(ValidationError): c.tunings.create_many([told, told | {'model': ''}])
        with pytest.raises(TypeError): c.tunings.create_many([told | {'n_epochs': 3}])
        for id in ('', '..', '../files', 'a/b', 'a?b', 'a#b', None, 5, 'ä'):
            for ask in (c.tunings.retrieve, c.tunings.cancel, c.tunings.delete, c.tunings.wait, c.files.content):
                with pytest.raises(ValidationError): ask(id)
        with pytest.raises(ValidationError): list(c.tunings.list(status='done'))
        with pytest.raises(ValidationError): c.tunings.wait_all('tune-1')
        assert c.tunings.wait_all([]) == []
        assert not stub.seen
    for how in (dict(base_url='localhost:8000'), dict(timeout=0), dict(max_retries=-1), dict(api_key='a\nb')):
        with pytest.raises(ValidationError): TuningClient(**how)
    with pytest.raises(TuningError, match='closed'): c.health()


# -- lists, files ----------------------------------------------------------------------------------------------------

def test_lists_are_fetched_page_by_page():
    ids = [f'tune-{i}' for i in range(250)]
    async def answer(request, n):
        start = ids.index(request.query['after']) + 1 if 'after' in request.query else 0
        rows = ids[start:start + int(request.query['limit'])]
        return {'data': [job(id=id) for id in rows], 'last_id': rows[-1], 'has_more': rows[-1] != ids[-1]}
    with Stub(answer) as stub, client(stub) as c:
        assert [t.id for t in c.tunings.list()] == ids and len(stub.seen) == 3
        assert len(list(c.tunings.list('running', limit=120))) == 120
        assert [s['query'] for s in stub.seen[3:]] == [{'status': 'running', 'limit': '100'},
                                                     {'status': 'running', 'limit': '20', 'after': 'tune-99'}]
        assert next(iter(c.tunings.list())).id == 'tune-0'
        assert len(stub.seen) == 6
        assert list(c.tunings.list(limit=0)) == []


def test_uploads_are_sent_twice_only_where_nothing_arrived(tmp_path):
    file = tmp_path/'Grüße.jsonl'
    file.write_bytes(os.urandom(3_000_000))
    async def kept(request, n):
        if n == 0: return status(503, **{'Retry-After': '0'})
        form = await request.post()
        data = form['file'].file.read()
        assert data == file.read_bytes()
        return {'id': 'file-9', 'bytes': len(data), 'created_at': 0, 'filename': form['file'].filename,
                'purpose': form['purpose']}
    with Stub(kept, read=False) as stub, client(stub) as c:
        found = c.files.upload(file)
        assert (found.id, found.bytes, found.filename) == ('file-9', 3_000_000, 'Grüße.jsonl')
        assert len(stub.seen) == 2
    with Stub(script(hang_up)) as stub, client(stub) as c:
        with pytest.raises(ConnectionError): c.files.upload(file)
        assert len(stub.seen) == 1
    with Stub(script(lambda r: status(413, 'at most 1 MB')), read=False) as stub, client(stub) as c:
        file.write_bytes(bytes(50_000_000))  # far more than the sockets hold, refused before it is sent
        with pytest.raises(ValidationError, match='at most 1 MB'): c.files.upload(file)


def test_a_server_that_stops_reading_is_left(tmp_path):
    file = tmp_path/'chats.jsonl'
    file.write_bytes(bytes(50_000_000))
    async def never(request, n): await request.content.read(10); await asyncio.sleep(60)
    with Stub(never, read=False) as stub, client(stub, timeout=.5) as c:
        with pytest.raises(TuningTimeout): c.files.upload(file)
        assert len(stub.seen) == 1


def test_create_uploads_local_files_and_takes_them_back_when_it_is_refused(tmp_path):
    file = tmp_path/'chats.jsonl'
    file.write_text('{"messages": []}\n')
    files = []
    async def answer(request, n):
        if request.method == 'DELETE': files.remove(request.path.rpartition('/')[2]); return {}
        if request.path == '/v1/tunings':
            asked = json.loads(await request.read())
            if asked['model'] == 'wrong': return status(400)
            return job(id=f'tune-{n}', training_file=asked['training_file'])
        files.append(f'file-{len(files)}')
        return {'id': files[-1], 'bytes': 1, 'created_at': 0, 'filename': 'x'}
    with Stub(answer) as stub, client(stub) as c:
        assert c.tunings.create('smollm2', str(file)).training_file == 'file-0'
        with pytest.raises(ValidationError): c.tunings.create('wrong', file)
        assert files == ['file-0']
        many = c.tunings.create_many([dict(model='smollm2', training_file=file, seed=i) for i in range(3)])
        assert [t.training_file for t in many] == ['file-1']*3 and len(files) == 2
        asked = [json.loads(s['body']) for s in stub.seen[-3:]]
        assert [a['seed'] for a in asked] == [0, 1, 2]
        with pytest.raises(ValidationError) as e:
            c.tunings.create_many([dict(model=m, training_file='file-1') for m in ('smollm2', 'wrong', 'smollm2')])
        assert len(e.value.created) == 1


def test_downloads_go_on_where_they_broke_off_and_stay_in_their_folder(tmp_path):
    whole = os.urandom(500_000)
    async def answer(request, n):
        if request.path.endswith('/files'): return {'data': [{'name': name, 'bytes': len(whole)} for name in names]}
        start = int(request.headers.get('Range', 'bytes=0-')[6:-1])
        headers = {'ETag': '"1"', 'Content-Length': str(len(whole) - start)}
        reply = web.StreamResponse(status=206 if start else 200, headers=headers)
        await reply.prepare(request)
        await reply.write(whole[start:start + 200_000])
        if start < 300_000: await asyncio.sleep(.05); request.transport.close()
        return reply
    with Stub(answer) as stub, client(stub) as c:
        names = ['model/weights ä.bin', 'training_log.txt']
        folder = c.tunings.download('tune-1', tmp_path/'got')
        assert (folder/names[0]).read_bytes() == (folder/names[1]).read_bytes() == whole
        assert [s['headers'].get('Range', '') for s in stub.seen[1:4]] == ['', 'bytes=200000-', 'bytes=400000-']
        assert sorted(p.name for p in folder.rglob('*') if p.is_file()) == ['training_log.txt', 'weights ä.bin']
        for bad in ('../out.txt', '/tmp/out.txt', 'a/../../out.txt', 'C:\\out.txt', ''):
            names[:] = ['ok.txt', bad]
            with pytest.raises(APIError, match='outside of the folder'): c.tunings.download('tune-1', tmp_path/'bad')
        assert not (tmp_path/'bad').exists() and not (tmp_path/'out.txt').exists()


# -- streams ---------------------------------------------------------------------------------------------------------

def events(last, cut=3, how=lambda r: r.transport.abort(), done=True):
    "A stream that breaks after every `cut` events, in the middle of the next."
    async def answer(request, n):
        if n % 4 == 2: return status(503, **{'Retry-After': '0'})
        assert request.headers['Last-Event-ID'] == request.query['after']
        start = int(request.headers['Last-Event-ID']) + 1
        reply = web.StreamResponse(headers={'Content-Type': 'text/event-stream; charset=utf-8'})
        await reply.prepare(request)
        await reply.write(b': still here\n\n')
        for id in range(max(1, start - 1), last + 1):  # the one before comes again
            event = {'id': id, 'tuning_id': 'tune-1', 'created_at': 0, 'message': f'Grüße {id}'}
            line = f'id: {id}\nevent: message\ndata: {json.dumps(event, ensure_ascii=False)}\n\n'.encode()
            if id == start + cut:
                await reply.write(line[:50])
                await asyncio.sleep(.02)
                how(request)
                await asyncio.sleep(60)
            await reply.write(line)
        if done: await reply.write(b'event: done\ndata: {}\n\n')
        return reply
    return answer


def test_streams_neither_lose_nor_repeat():
    with Stub(events(10)) as stub, client(stub) as c:
        heard = list(c.tunings.stream_logs('tune-1'))
        assert [e.id for e in heard] == [*range(1, 11)] and heard[9].message == 'Grüße 10'
        assert len(stub.seen) > 4
        assert [e.id for e in c.tunings.stream_logs('tune-1', after=8)] == [9, 10]


def test_a_silent_stream_is_opened_anew():
    async def main(url):
        async with AsyncTuningClient(KEY, url, timeout=5) as c:
            c._line.silence = .2
            return [e.id async for e in c.tunings.stream_logs('tune-1')]
    with Stub(events(5, how=lambda r: None)) as stub: assert asyncio.run(main(stub.url)) == [1, 2, 3, 4, 5]


def test_a_stream_that_stays_broken_is_said():
    with Stub(script(hang_up)) as stub, client(stub, timeout=1) as c:
        with pytest.raises(ConnectionError): list(c.tunings.stream_logs('tune-1'))
        assert len(stub.seen) > 1
    with Stub(script(lambda r: status(404))) as stub, client(stub) as c:
        with pytest.raises(NotFoundError): list(c.tunings.stream_logs('tune-1'))
        assert len(stub.seen) == 1
    with Stub(script({'data': []})) as stub, client(stub) as c, pytest.raises(APIError, match='in place of a stream'):
        list(c.tunings.stream_logs('tune-1'))


def test_who_stops_listening_hangs_up():
    with Stub(None) as stub:
        async def endless(request, n):
            reply = web.StreamResponse(headers={'Content-Type': 'text/event-stream'})
            await reply.prepare(request)
            for id in range(1, 10_000):
                event = {'id': id, 'tuning_id': 'tune-1', 'created_at': 0, 'message': ''}
                await reply.write(f'data: {json.dumps(event)}\n\n'.encode())
                await asyncio.sleep(.01)
        stub.answer = endless
        with client(stub) as c:
            for e in c.tunings.stream_logs('tune-1'):
                if e.id == 3: break
            end = time.monotonic() + 10
            while not stub.gone and time.monotonic() < end: time.sleep(.02)
            assert stub.gone


# -- waiting ---------------------------------------------------------------------------------------------------------

def test_waiting(capsys):
    steps = [job('pending'), job(), job(progress={'step': 1, 'total_steps': 2, 'loss': 2.}), hang_up,
             lambda r: status(500),
             job('succeeded', progress={'step': 2, 'total_steps': 2}, fine_tuned_model='tuning:tune-1')]
    with Stub(script(*steps)) as stub, client(stub, max_retries=0) as c:
        met = []
        def hear(t): met.append((t.status, t.progress.step, threading.get_ident()))
        done = c.tunings.wait('tune-1', hear, poll=.05)
        assert done.is_successful and done.fine_tuned_model == 'tuning:tune-1'
        assert [m[:2] for m in met] == [('pending', 0), ('running', 0), ('running', 1), ('succeeded', 2)]
        assert {m[2] for m in met} == {threading.get_ident()}  # so that it may touch widgets and the client itself
    with Stub(script(*steps)) as stub, client(stub) as c:
        c.tunings.wait('tune-1', poll=.05)
        assert 'tune-1 succeeded: 100%' in capsys.readouterr().err
    with Stub(script(job())) as stub, client(stub) as c:
        with pytest.raises(TuningTimeout, match='tune-1 did not end within 0.3 s'):
            c.tunings.wait('tune-1', lambda t: None, .3)
        with pytest.raises(ZeroDivisionError): c.tunings.wait('tune-1', lambda t: 1/0)
        c.tunings.retrieve('tune-1')
    async def never(request, n): await asyncio.sleep(60)
    with Stub(never) as stub, client(stub, timeout=60) as c:
        with pytest.raises(TuningTimeout): c.tunings.wait('tune-1', lambda t: None, .3)
    with Stub(script(job('failed', error={'code': 'killed', 'message': 'by somebody'}))) as stub, client(stub) as c:
        assert c.tunings.wait('tune-1', lambda t: None).is_failed
        with pytest.raises(TuningFailed, match='killed: by somebody') as e:
            c.tunings.wait('tune-1', lambda t: None, raise_on_failure=True)
        assert e.value.tuning.is_failed
    with Stub(script(lambda r: status(404))) as stub, client(stub) as c:
        with pytest.raises(NotFoundError): c.tunings.wait('tune-1', lambda t: None)


def test_waiting_for_many(capsys):
    async def answer(request, n):
        id = request.path.split('/')[3]
        if request.method == 'POST': return status(409) if id == 'tune-2' else job('cancelled', id)
        return job('succeeded' if n > 8 or id == 'tune-2' else 'running', id)
    with Stub(answer) as stub, client(stub) as c:
        ids = [f'tune-{i}' for i in range(4)]
        done = c.tunings.wait_all(ids, poll=.05)
        assert [t.id for t in done] == ids and all(t.is_successful for t in done)
        assert '4 succeeded: 100%' in capsys.readouterr().err
        assert [t.status for t in c.tunings.cancel_many(ids)] == ['cancelled', 'cancelled', 'succeeded', 'cancelled']
        async def coroutine():
            async with AsyncTuningClient(KEY, stub.url) as c:
                met = []
                async def hear(t): met.append(t.id)
                done = await c.tunings.wait_all([t.id for t in await c.tunings.cancel_many(ids)], hear)
                return sorted(met), [t.id for t in done]
        assert asyncio.run(coroutine()) == (ids, ids)


# -- where it is used ------------------------------------------------------------------------------------------------

def test_in_a_loop_that_runs_in_threads_and_in_several_loops():
    with Stub(script(job())) as stub, client(stub) as c:
        async def cell(): return c.tunings.retrieve('tune-1').id  # as a notebook's cell does
        assert asyncio.run(cell()) == 'tune-1'
        with ThreadPoolExecutor(8) as pool: assert len(list(pool.map(c.tunings.retrieve, ['tune-1']*100))) == 100
        there = AsyncTuningClient(KEY, stub.url)
        async def ask(): return (await there.tunings.retrieve('tune-1')).id
        assert [asyncio.run(ask()) for _ in range(3)] == ['tune-1']*3


def test_an_interrupt_ends_waiting():
    code = '''
import sys, threading, time, _thread
from llm_distill.tuning.client import TuningClient
with TuningClient("k", sys.argv[1]) as c:
    threading.Timer(1, _thread.interrupt_main).start()
    try: c.tunings.wait("tune-1", lambda t: None)
    except KeyboardInterrupt: print("stopped", c.tunings.retrieve("tune-1").status)
'''
    with Stub(script(job())) as stub:
        done = subprocess.run([sys.executable, '-c', code, stub.url], capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == ('stopped running\n', '')


def test_it_imports_no_torch_and_leaves_nothing_open():
    code = '''
import sys
from llm_distill.tuning.client import TuningClient
print([m for m in ("torch", "transformers", "openai", "anthropic", "fastapi", "uvicorn") if m in sys.modules])
with TuningClient("k", sys.argv[1]) as c:
    print(c.tunings.retrieve("tune-1").id)
    logs = c.tunings.watch(["tune-1"])
    print(next(logs).status)
'''
    with Stub(script(job())) as stub:
        done = subprocess.run([sys.executable, '-X', 'dev', '-c', code, stub.url], capture_output=True, text=True,
                              timeout=60)
        assert (done.stdout, done.stderr) == ('[]\ntune-1\nrunning\n', '')


# -- the real service, with a model small enough to be taught here ---------------------------------------------------

@pytest.fixture(scope='module')
def service(tmp_path_factory):
    import small
    from llm_distill.tuning.process import serve_tunings
    home = tmp_path_factory.mktemp('tunings')
    tokenizer = small.byte_tokenizer()
    small.llama(tokenizer).save_pretrained(home/'models/tiny')
    tokenizer.save_pretrained(home/'models/tiny')
    rows = [{'messages': [{'role': 'user', 'content': f'{a} and {b}?'}, {'role': 'assistant', 'content': f'{a + b}.'}]}
            for a in range(6) for b in range(6)]
    (home/'sums.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    with serve_tunings(home/'home', models=home/'models', max_jobs=2, max_upload=100_000) as server:
        server.file = home/'sums.jsonl'
        yield server


TINY = {'max_steps': 12, 'learning_rate': .01, 'batch_size': 4, 'heldout': .2}
LONG = {'max_steps': 100_000, 'batch_size': 1}


def test_a_job_from_end_to_end(service, tmp_path, capsys):
    with TuningClient(service.api_key, service.url) as c:
        assert c.health().status == 'ok'
        job = c.tunings.create('tiny', service.file, hyperparameters=TINY, suffix='sums', metadata={'run': '7'}, seed=1)
        heard = list(c.tunings.stream_logs(job))
        done = c.tunings.wait(job)
        assert f'{job.id} succeeded: 100%' in capsys.readouterr().err
        assert done.is_successful and done.fine_tuned_model == f'tuning:{job.id}' and done.metadata == {'run': '7'}
        assert done.metrics['loss_after'] < done.metrics['loss_before'] and done.progress.step == 12
        assert [e.id for e in heard] == [*range(1, len(heard) + 1)]
        assert [e.model_dump() for e in heard] == [e.model_dump() for e in c.tunings.events(job)]
        assert [e.id for e in c.tunings.events(job, after=2, limit=3)] == [3, 4, 5]
        assert c.tunings.metrics(job).curve[-1]['step'] == 12
        folder = c.tunings.download(job, tmp_path/'got')
        told = {f.name: f.bytes for f in c.tunings.result_files(job)}
        assert {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob('*') if p.is_file()} == told
        from llm_distill.saving import load_student
        assert load_student(folder/'model')
        again = c.tunings.create(done.fine_tuned_model, job.training_file, hyperparameters=TINY | {'max_steps': 2})
        assert c.tunings.wait(again, lambda t: None, raise_on_failure=True).is_successful
        assert [t.id for t in c.tunings.list('succeeded', limit=2)] == [again.id, job.id]
        c.tunings.delete(again)
        with pytest.raises(NotFoundError): c.tunings.retrieve(again)


def test_what_the_real_service_refuses(service, tmp_path):
    with TuningClient('wrong', service.url) as c, pytest.raises(AuthenticationError) as e: next(c.tunings.list())
    assert e.value.status == 401
    with TuningClient('', service.url) as c, pytest.raises(AuthenticationError, match='LLM_DISTILL_API_KEY'):
        c.tunings.retrieve('tune-1')
    with TuningClient(service.api_key, service.url) as c:
        before = len(list(c.files.list()))
        with pytest.raises(ValidationError) as e: c.tunings.create('../tiny', service.file)
        assert e.value.param == 'model' and len(list(c.files.list())) == before
        big = tmp_path/'big.jsonl'
        big.write_bytes(b'x'*5_000_000)
        with pytest.raises(ValidationError) as e: c.files.upload(big)
        assert e.value.status == 413
        with pytest.raises(ValidationError): c.files.upload(big.rename(tmp_path/'big.pkl'))
        kept = c.files.upload(service.file)
        assert c.files.content(kept) == service.file.read_bytes() and c.files.retrieve(kept).bytes == kept.bytes
        job = c.tunings.create('tiny', kept, hyperparameters=LONG, idempotency_key='one')
        assert c.tunings.create('tiny', kept, hyperparameters=LONG, idempotency_key='one').id == job.id
        with pytest.raises(ConflictError): c.tunings.create('tiny', kept, hyperparameters=TINY, idempotency_key='one')
        with pytest.raises(ConflictError): c.files.delete(kept)
        with pytest.raises(ConflictError): c.tunings.delete(job)
        assert c.tunings.cancel(job).status in ('running', 'cancelled', 'pending')
        assert c.tunings.wait(job, lambda t: None).status == 'cancelled'
        with pytest.raises(ConflictError): c.tunings.cancel(job)
        c.files.delete(kept)
        with pytest.raises(NotFoundError): c.files.retrieve(kept)


def test_a_batch_with_a_bad_file(service, tmp_path):
    bad = tmp_path/'bad.jsonl'
    bad.write_text('{"no": "answer"}\n')
    async def batch():
        async with AsyncTuningClient(service.api_key, service.url) as c:
            files = service.file, bad, service.file, service.file
            told = [dict(model='tiny', training_file=f, hyperparameters=TINY) for f in files]
            jobs = await c.tunings.create_many(told)
            assert jobs[0].training_file == jobs[2].training_file
            await c.tunings.cancel_many(jobs[2:])
            return await c.tunings.wait_all(jobs)
    done = asyncio.run(batch())
    assert [t.status for t in done] == ['succeeded', 'failed', 'cancelled', 'cancelled']
    assert done[1].error.code == 'bad_input'


def test_streams_and_waits_sit_through_a_restart(service, tmp_path):
    from llm_distill.tuning.process import serve_tunings
    models = service.file.parent/'models'
    options = dict(models=models, api_keys=['key-of-mine'])
    first = serve_tunings(tmp_path/'home', **options)
    port = int(first.url.split(':')[2].removesuffix('/v1'))
    with TuningClient('key-of-mine', first.url) as c, ThreadPoolExecutor(2) as pool:
        job = c.tunings.create('tiny', service.file, hyperparameters=LONG)
        heard = []
        def follow():
            for e in c.tunings.stream_logs(job): heard.append(e.id)
        following, waiting = pool.submit(follow), pool.submit(c.tunings.wait, job, lambda t: None)
        while len(heard) < 10: time.sleep(.05)
        running, first._running = first._running, None  # it goes, its job stays
        running.listener.stop()
        first._thread.join()
        running.service.close()
        at = len(heard)
        time.sleep(1)
        with serve_tunings(tmp_path/'home', port=port, **options):
            while len(heard) < at + 10: time.sleep(.05)
            c.tunings.cancel(job)
            assert waiting.result(60).status == 'cancelled'
            following.result(60)
            assert heard == [*range(1, len(heard) + 1)] == [e.id for e in c.tunings.events(job)]


# -- commands --------------------------------------------------------------------------------------------------------

def test_commands(service, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('LLM_DISTILL_API_KEY', service.api_key)
    monkeypatch.setenv('LLM_DISTILL_TUNING_URL', service.url)
    def tune(*words, code=0):
        capsys.readouterr()
        found = main(['tune', *map(str, words)])
        done = capsys.readouterr()
        assert found == code, done
        assert service.api_key not in done.out + done.err
        return done
    settings = [w for pair in (TINY | {'max_steps': 3}).items() for w in ('--set', '{}={}'.format(*pair))]
    id = tune('create', 'tiny', service.file, *settings, '--suffix', 'owls', '--metadata', 'run=7').out.split()[0]
    assert 'succeeded' in tune('wait', id).out
    shown = tune('show', id).out
    assert '"run": "7"' in shown and 'fine_tuned_model' in shown
    assert json.loads(tune('show', id, '--json').out)['suffix'] == 'owls'
    assert id in tune('list', '--status', 'succeeded').out
    lines = tune('logs', id).out.splitlines()
    assert lines == tune('logs', '-f', id).out.splitlines() and 'succeeded' in lines[-1]
    tune('download', id, tmp_path/'got')
    assert (tmp_path/'got/model/config.json').exists()
    bad = tmp_path/'bad.jsonl'
    bad.write_text('{"no": "answer"}\n')
    failed = tune('create', 'tiny', bad, '--wait', '--json', code=1)
    assert json.loads(failed.out)['status'] == 'failed' and 'llm-distill: tune-' in failed.err
    wrong = [('create', 'tiny', service.file, '--set', 'n_epoch=1'), ('create', 'tiny', 'none.jsonl'),
             ('show', 'tune-0'), ('cancel', id + 'x'), ('list', '--status', 'done'), ('show', id, '--api-key', 'wrong'),
             ('list', '--base-url', 'http://127.0.0.1:9')]
    for words in wrong: assert tune(*words, code=1).err.startswith('llm-distill: '), words
    long = tune('create', 'tiny', service.file, '--set', 'max_steps=100000', '--json').out
    tune('cancel', id, json.loads(long)['id'])
    tune('wait', id, json.loads(long)['id'], code=1)
    tune('delete', id, json.loads(long)['id'])


def test_an_interrupted_wait_leaves_the_job_alone(service):
    from conftest import SCRIPT
    env = os.environ | {'LLM_DISTILL_API_KEY': service.api_key, 'LLM_DISTILL_TUNING_URL': service.url}
    with TuningClient(service.api_key, service.url) as c:
        job = c.tunings.create('tiny', service.file, hyperparameters=LONG)
        for words in (['wait'], ['logs', '-f']):
            running = subprocess.Popen([SCRIPT, 'tune', *words, job.id], env=env, text=True, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE)
            (running.stderr if words == ['wait'] else running.stdout).read(1)  # it is at it
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=30)
            assert running.returncode == 130 and 'the job goes on' in err and 'Traceback' not in err
        head = subprocess.run(f'"{SCRIPT}" tune logs -f {job.id} | head -2', shell=True, env=env, capture_output=True,
                              text=True)
        assert len(head.stdout.splitlines()) == 2 and 'Traceback' not in head.stderr
        assert not c.tunings.retrieve(job).is_finished
        c.tunings.cancel(job)
        assert c.tunings.wait(job, lambda t: None).status == 'cancelled'
