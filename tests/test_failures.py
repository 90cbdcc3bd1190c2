"What goes wrong is asked again or said clearly, once; nothing is left behind and the account is right."
import asyncio
import json
import time
from dataclasses import asdict
from email.utils import formatdate

import pytest
from families import CLOUD, posts, server, teacher
from llm_distill import Budget, Price, create_teacher
from llm_distill.teachers.background import background_loop
from llm_distill.types import (BadReply, BudgetSpent, QuotaSpent, TeacherBusy, TeacherError, TeacherRefused,
                               TeacherTimeout, TeacherUnreachable)
from servers import Fault, Provider, free_port, hanging_port

PRICE = Price('m', None, 1., 2.)
LONG = {'max_tokens': 30_000}  # Claude is asked for a stream
QUOTA = {'openai': {'error': {'message': 'You exceeded your current quota', 'code': 'insufficient_quota'}},
         'anthropic': {'type': 'error', 'error': {'type': 'invalid_request_error',
                                                  'message': 'Your credit balance is too low to access the API.'}}}
FINAL = (Fault('status', 401), TeacherRefused), (Fault('status', 429, body=QUOTA['openai']), QuotaSpent)
ways = pytest.mark.parametrize('family, params', [*((f, {}) for f in CLOUD), ('anthropic', LONG)],
                               ids=[*CLOUD, 'anthropic stream'])


def counts(t) -> tuple: return t.stats.total, t.stats.successful, t.stats.failed, t.stats.retried


def chain(error):
    "An error and all that hangs on it."
    while error:
        yield error
        error = error.__cause__ or error.__context__


def ours(error) -> bool:
    "Whether nothing of an SDK hangs on an error."
    return all('llm_distill' in type(e).__module__ for e in chain(error))


def check_left(t, p):
    "No task, no connection, no turn that was not given back."
    assert p.until(lambda p: p.open == 0), 'a connection is left'
    assert t.rate.in_flight == 0


@ways
def test_what_may_pass_is_asked_again(family, params):
    with server(family) as p:
        for status in (408, 409, 429, 500, 502, 503, 529):
            p.add(Fault('status', status, {'Retry-After': '0'}))
            with teacher(family, p) as t: assert t.generate('Hello', **params).text
            assert counts(t) == (1, 1, 0, 1) and [r.status for r in posts(p)[-2:]] == [status, 200]
        assert len(posts(p)) == 14


@ways
@pytest.mark.parametrize('fault, error', [
    (Fault('status', 500), TeacherBusy), (Fault('status', 429, {'Retry-After': '0'}), TeacherBusy),
    (Fault('reset'), TeacherUnreachable), (Fault('cut'), TeacherUnreachable)], ids=['500', '429', 'reset', 'cut'])
def test_one_layer_of_retries(family, params, fault, error):
    with server(family, always=fault) as p, teacher(family, p, max_retries=1) as t:
        with pytest.raises(error) as e: t.generate('Hello', **params)
        assert len(posts(p)) == 2 and counts(t) == (1, 0, 1, 1) and ours(e.value)
    with server(family, always=fault) as p, teacher(family, p, max_retries=0) as t:
        with pytest.raises(error): t.generate('Hello', **params)
        assert len(posts(p)) == 1 and counts(t) == (1, 0, 1, 0)


@ways
def test_what_cannot_pass_stops_at_once(family, params):
    said = {400: 'refuses the request', 401: '_API_KEY or api_key=', 403: 'check the rights', 404: 'check model=',
            413: 'refuses', 422: 'refuses'}
    with server(family, faults=[Fault('status', s) for s in said]) as p, teacher(family, p) as t:
        for n, (status, words) in enumerate(said.items(), 1):
            with pytest.raises(TeacherRefused, match=words) as e: t.generate('Hello', **params)
            assert e.value.status == status and len(posts(p)) == n and counts(t) == (n, 0, n, 0) and ours(e.value)


@pytest.mark.parametrize('family, fault', [
    ('openai', Fault('status', 429, {'Retry-After': '1'}, QUOTA['openai'])), ('deepseek', Fault('status', 402)),
    ('anthropic', Fault('status', 400, body=QUOTA['anthropic'])), ('anthropic', Fault('status', 402)),
    ('openai-compatible', Fault('status', 429, body=QUOTA['openai']))])
def test_an_account_without_credit(family, fault):
    with server(family, always=fault) as p, teacher(family, p) as t:
        with pytest.raises(QuotaSpent, match='no credit left.*add credit') as e: t.generate('Hello')
        assert len(posts(p)) == 1 and counts(t) == (1, 0, 1, 0) and ours(e.value)


@pytest.mark.parametrize('family', ['vllm', 'sglang', 'openai-compatible'])
def test_scoring_stops_as_well(family):
    for fault, error in FINAL:
        with server(family, always=fault) as p, teacher(family, p) as t:
            with pytest.raises(error): t.score('Make the sun')
            assert len(posts(p)) == 1, 'asked on in other ways'


def test_the_probe_stops_as_well():
    for fault, error in FINAL:
        with server('openai', always=fault) as p, teacher('openai', p) as t:
            with pytest.raises(error): t.probe()
            assert len(posts(p)) == 1 and t.card is None


def test_a_garbled_score_is_an_error():
    with server('vllm', faults=[Fault('cut_json')]) as p, teacher('vllm', p) as t:
        with pytest.raises(BadReply): t.score('Make the sun')
        assert len(posts(p)) == 1 and t.score('Make the sun').logprobs.top_ids is not None


@ways
@pytest.mark.parametrize('kind', ['cut_json', 'garbled', 'empty', 'html', 'empty_answer'])
def test_what_is_no_answer_is_an_error(family, params, kind):
    with server(family, faults=[Fault(kind)]) as p, teacher(family, p) as t:
        with pytest.raises(BadReply) as e: t.generate('Hello', **params)
        assert len(posts(p)) == 1 and counts(t) == (1, 0, 1, 0) and ours(e.value)
        assert t.generate('Hello', **params).text and counts(t) == (2, 1, 1, 0)


@pytest.mark.parametrize('body', [
    {'choices': []}, {'choices': None}, [], 'null', '{}', {'error': {'message': 'overloaded'}}, '"text"',
    {'choices': [{'message': None}]}, b'\xff\xfe\x00', {'choices': [{'message': {'content': 7}}]},
    {'choices': [{'message': {'content': 'a'}, 'logprobs': {'content': [{'token': 1}]}}]}])
def test_json_that_is_no_answer(body):
    with server('openai', faults=[Fault('garbled', body=body)]) as p, teacher('openai', p) as t:
        with pytest.raises(BadReply) as e: t.generate('Hello')
        assert ours(e.value)


def test_logprobs_that_were_asked_for_and_are_not_there():
    with Provider('openai', flavour='dropper') as p, create_teacher('openai-compatible', None, None, p.url) as t:
        with pytest.raises(BadReply, match='left the logprobs out'): t.generate('Hello', logprobs=3)


def test_a_stream_that_ends_in_an_error():
    said = {'type': 'error', 'error': {'type': 'overloaded_error', 'message': 'Overloaded'}}
    stream = Fault('garbled', headers={'content-type': 'text/event-stream'},
                   body=f'event: error\ndata: {json.dumps(said)}\n\n')
    with server('anthropic', faults=[stream]) as p, teacher('anthropic', p) as t:
        assert t.generate('Hello', **LONG).text and counts(t) == (1, 1, 0, 1)
    with server('anthropic', always=stream) as p, teacher('anthropic', p, max_retries=0) as t:
        with pytest.raises(TeacherBusy): t.generate('Hello', **LONG)


@pytest.mark.parametrize('said, least, most', [
    ('1', .9, 1.1), ('300 ms', .3, .4), ('-5', 0, .1), ('soon', 0, .1), ('nan', 0, .1), ('date', .1, 2.1),
    ('past', 0, .1)])
def test_the_wait_that_is_asked_for(said, least, most):
    dates = {'date': formatdate(int(time.time()) + 2, usegmt=True), 'past': formatdate(time.time() - 99, usegmt=True)}
    headers = {'retry-after-ms': '300'} if said == '300 ms' else {'Retry-After': dates.get(said, said)}
    with server('openai', faults=[Fault('status', 503, headers)]) as p, teacher('openai', p) as t:
        assert t.generate('Hello').text
        first, second = p.requests
        assert least <= t.stats.seconds_waited <= most and second.at - first.at >= .95*t.stats.seconds_waited


@pytest.mark.parametrize('form', ['%a %b %d %H:%M:%S %Y', '%a, %d %b %Y %H:%M:%S -0000', '%A, %d-%b-%y %H:%M:%S GMT'])
def test_dates_of_every_form(form):
    date = time.strftime(form, time.gmtime(time.time() - 60))
    with server('openai', faults=[Fault('status', 503, {'Retry-After': date})]) as p, teacher('openai', p) as t:
        assert t.generate('Hello').text and counts(t) == (1, 1, 0, 1)


@pytest.mark.parametrize('status, wait', [(429, '3600'), (503, '3600'), (529, 'date'), (429, 'inf')])
def test_a_wait_above_the_cap(status, wait):
    headers = {'Retry-After': formatdate(time.time() + 3600, usegmt=True) if wait == 'date' else wait}
    with server('openai', faults=[Fault('status', status, headers)]) as p, teacher('openai', p, retry_cap=5) as t:
        with pytest.raises(TeacherBusy, match='retry_cap= allows 5') as e: t.generate('Hello')
        assert len(p.requests) == 1 and counts(t) == (1, 0, 1, 0) and t.stats.seconds_waited == 0
        assert e.value.status == status and e.value.wait_s > 3000, 'the error lost what it knew'
        async def next_one(): return await asyncio.wait_for(t.agenerate('Hello'), 10)
        try: asyncio.run(next_one())
        except TeacherError: pass  # an error at once would do as well
        except asyncio.TimeoutError: pytest.fail('the next request waits in silence for what retry_cap forbids')


def test_the_provider_may_forbid_another_attempt():
    with server('openai', always=Fault('status', 500, {'x-should-retry': 'false'})) as p, teacher('openai', p) as t:
        with pytest.raises(TeacherBusy): t.generate('Hello')
        assert len(p.requests) == 1


def test_waits_grow_at_random_up_to_a_bound():
    with server('openai', always=Fault('status', 500)) as p, \
            teacher('openai', p, max_retries=6, retry_delay=.02, retry_cap=.1) as t:
        with pytest.raises(TeacherBusy): t.generate('Hello')
        gaps, waited = [b.at - a.at for a, b in zip(p.requests, p.requests[1:])], t.stats.seconds_waited
        assert len(gaps) == 6 and 0 < waited <= .02 + .04 + .08 + 3*.1 and sum(gaps) >= .95*waited


def test_a_pause_between_requests_is_not_taken_for_the_pace_of_the_provider():
    with server('openai', faults=[Fault('status', 429)]) as p, teacher('openai', p) as t:
        t.generate('Hello')
        time.sleep(2.5)
        p.add(Fault('status', 429))
        t.generate('Hello')
        began = time.monotonic()
        for _ in range(2): t.generate('Hello')
        assert time.monotonic() - began < 2, t.rate


def test_failures_do_not_raise_the_rate():
    with server('openai', always=Fault('status', 500)) as p, teacher('openai', p, max_retries=5) as t:
        before = t.rate.limit
        with pytest.raises(TeacherBusy): t.generate('Hello')
        assert t.rate.limit <= before


@ways
def test_timeouts(family, params):
    with server(family, faults=[Fault('hang'), Fault('drip', seconds=20)]) as p, teacher(family, p, timeout=.5) as t:
        began = time.monotonic()
        for error in t.generate_batch(['One', 'Two'], on_error='return', **params):
            assert isinstance(error, TeacherTimeout) and isinstance(error, TimeoutError) and ours(error)
            assert '0.5 s' in str(error) and 'timeout=' in str(error)
        assert .4 < time.monotonic() - began < 5 and counts(t) == (2, 0, 2, 0) and len(posts(p)) == 2
        check_left(t, p)
        assert len(p.gone) == 2


def test_nobody_there():
    with create_teacher('openai', 'gpt-4o', 'k', f'http://127.0.0.1:{free_port()}/v1', retry_delay=0, max_retries=2,
                        budget=1., price=PRICE, max_tokens=5) as t:
        with pytest.raises(TeacherUnreachable, match='nothing answers at') as e: t.generate('Hello')
        assert isinstance(e.value, ConnectionError) and counts(t) == (1, 0, 1, 2) and ours(e.value)
        assert t.budget.spent == 0
    with hanging_port() as port, \
            create_teacher('anthropic', 'claude-haiku-4-5', 'k', f'http://127.0.0.1:{port}', timeout=.5) as t:
        with pytest.raises(TeacherTimeout): t.generate('Hello')
        assert counts(t) == (1, 0, 1, 0)


def test_a_server_that_dies_and_comes_back():
    with server('openai') as p, teacher('openai', p, max_retries=0) as t:
        t.generate('Hello')
        for connection in list(p._connections): p._loop.call_soon_threadsafe(connection.transport_now.abort)
        assert p.until(lambda p: p.open == 0) and t.generate('Hello').text


@ways
def test_a_cancelled_call_leaves_nothing(family, params):
    async def cancel(coroutine, n):
        task = asyncio.create_task(coroutine)
        assert await asyncio.to_thread(p.until, lambda p: len(posts(p)) >= n)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        await asyncio.sleep(.05)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert await asyncio.to_thread(p.until, lambda p: p.open == 0), 'a connection is left'
    async def main():
        await cancel(t.agenerate('Hello', **params), 1)
        await cancel(t.agenerate_batch(['Hello']*20, concurrency=20, **params), 5)
        await t.aclose()
    with server(family, always=Fault('hang')) as p, teacher(family, p) as t:
        asyncio.run(main())
        assert t.rate.in_flight == 0 and t.stats.failed == t.stats.total and t.stats.successful == 0


def test_a_call_that_is_cancelled_while_it_waits():
    async def main():
        for wait in (lambda: t.stats.retried or t.rate.refusals, lambda: True):
            task = asyncio.create_task(t.agenerate('Hello'))
            while not wait(): await asyncio.sleep(.01)
            await asyncio.sleep(.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError): await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await t.aclose()
    with server('openai', always=Fault('status', 429, {'Retry-After': '60'})) as p:
        t = teacher('openai', p, budget=1., price=PRICE, max_tokens=5)
        asyncio.run(main())
        check_left(t, p)
        assert t.budget.reserved == pytest.approx(0, abs=1e-12) and len(p.requests) <= 2


def quiet(p, seconds=.6):
    "How many requests still come, but for those that are on the wire already."
    time.sleep(.2)
    before = len(p.requests)
    time.sleep(seconds)
    return len(p.requests) - before


@pytest.mark.parametrize('error', ['budget', 'refusal', 'logits'])
def test_after_an_error_a_batch_asks_no_more(error):
    prompts = [f'Question {i}' for i in range(200)]
    with server('custom' if error == 'logits' else 'openai', delay_s=.1, answer_tokens=2) as p:
        t = teacher('custom' if error == 'logits' else 'openai', p, max_tokens=4, price=PRICE, budget=Budget(.01))
        if error == 'budget': prompts[10] = 'Word '*3000
        else: p.add(*[None]*5, Fault('status', 401))
        with pytest.raises(BudgetSpent if error == 'budget' else TeacherRefused):
            if error == 'logits': t.get_logits_batch(prompts)
            else: t.generate_batch(prompts, concurrency=8)
        assert quiet(p) == 0, 'it went on asking, and paying, after it had raised'
        tasks = asyncio.run_coroutine_threadsafe(left(), background_loop()).result()
        assert tasks == 1 and t.budget.reserved == pytest.approx(0, abs=1e-12)
        t.close()


async def left(): return len(asyncio.all_tasks())


def test_errors_in_the_place_of_answers():
    prompts = ['One', 'Word '*3000, 'Three', 'Four']
    with server('openai', faults=[Fault('garbled')]) as p, \
            teacher('openai', p, max_tokens=4, price=PRICE, budget=Budget(.005)) as t:
        answers = t.generate_batch(prompts, concurrency=1, on_error='return')
        assert [type(a).__name__ for a in answers] == ['BadReply', 'BudgetSpent', 'Completion', 'Completion']


def test_the_account():
    "Statistics against what the server saw and charged."
    faults = [None, Fault('status', 500), Fault('reset'), None, Fault('status', 429, {'Retry-After': '0'}), None,
              Fault('garbled'), Fault('status', 400), None]
    with server('openai', faults=faults) as p, teacher('openai', p, price=PRICE, retry_delay=.01) as t:
        answers = [t.generate_batch([f'Question {i}'], max_tokens=5, on_error='return')[0] for i in range(6)]
        good = [a for a in answers if not isinstance(a, Exception)]
        assert [type(a).__name__ for a in answers] == ['Completion']*3 + ['BadReply', 'TeacherRefused', 'Completion']
        assert counts(t) == (6, 4, 2, 3) and len(p.requests) == 9
        assert t.stats.prompt_tokens == sum(a.usage.prompt_tokens for a in good)
        assert t.stats.completion_tokens == sum(a.usage.completion_tokens for a in good)
        assert t.stats.usd == pytest.approx(sum(PRICE.usd(a.usage) for a in good)) and t.stats.seconds_waited > 0
        assert t.manifest()['stats'] == asdict(t.stats)


def test_what_failed_attempts_may_have_cost():
    faults = [Fault('status', 500), Fault('cut'), Fault('status', 429, {'Retry-After': '0'}), Fault('status', 400)]
    with server('openai', faults=faults) as p, \
            teacher('openai', p, price=PRICE, max_tokens=10, budget=Budget(1.)) as t:
        with pytest.raises(TeacherRefused): t.generate('Hello')
        worst = t.budget.spent/2
        assert 0 < worst < .001 and t.stats.usd == 0 and t.stats.usd_unknown == pytest.approx(2*worst)


def test_tokens_of_an_answer_without_text_were_paid():
    with server('openai') as p, create_teacher('openai', 'gpt-5', 'k', p.url, price=PRICE) as t:
        with pytest.raises(BadReply, match='max_tokens'): t.generate('Hello', max_tokens=10)
        assert t.stats.completion_tokens == 10 and t.stats.prompt_tokens > 0 and t.stats.usd > 0


def test_a_model_name_that_cannot_be_learnt():
    with Provider('openai', key='right') as p, pytest.raises(TeacherRefused, match='API key'):
        create_teacher('openai-compatible', None, 'wrong', p.url)
    assert p.until(lambda p: p.open == 0)
    with pytest.raises(TeacherUnreachable): create_teacher('vllm', base_url=f'http://127.0.0.1:{free_port()}/v1')
