"Batches: half the price, the same answers, nothing asked twice, whatever happens on the way."
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import ROOT
from families import posts, server
from llm_distill import Budget, Price, TeacherCache, collect, create_teacher
from llm_distill.collect import CollectWarning
from llm_distill.teachers.batches import AnthropicBatches, BatchApi, OpenAIBatches
from llm_distill.types import BudgetSpent, NotCached, NotGiven, TeacherBusy, TeacherError, TeacherRefused
from servers import Fault, Limiter
from servers.batches import Outcome

SAME = Price('m', None, 1000., 1000., batch_input=500., batch_output=500.)  # dollars for 1,000 tokens: 1, by batch 1/2
SAID = Price('m', None, 0., 1000., batch_input=0., batch_output=500.)       # the same for answers alone
WAYS = {'chat': ('openai', 'gpt-4o', {}), 'responses': ('openai', 'gpt-4o', {'api': 'responses'}),
        'completions': ('openai', 'davinci-002', {}), 'anthropic': ('anthropic', 'claude-sonnet-5', {})}
ENDS = {'chat': ('GET .*/content', 'GET .*/batches/', 'POST .*/batches$', OpenAIBatches),
        'anthropic': ('GET .*/results', r'GET .*/batches/\w+$', 'POST .*/batches$', AnthropicBatches)}
LONG = {'max_tokens': 20}
ways, both = (pytest.mark.parametrize('way', names) for names in (WAYS, ENDS))


@contextmanager
def served(way='chat', price=SAME, teach=None, **options):
    "A server that counts, and a teacher of it."
    family, model, own = WAYS[way]
    with server(family, **{'limiter': Limiter(1e9, 1e9, headers=False), 'answer_tokens': 6, **options}) as p:
        with pupil(p, way, price=price, **own | (teach or {})) as t: yield p, t


def pupil(p, way='chat', model=None, key='k', **options):
    family, usual, own = WAYS[way]
    url = options.pop('url', p.url)
    return create_teacher(family, model or usual, key, url,
                          **{'retry_delay': 0, 'timeout': 5, 'price': SAME} | own | options)


def ask(prompts, t, db, **more): return collect(prompts, t, db, **{'mode': 'batch', 'poll_s': .02} | LONG | more)


def asked(n, word='Question'): return [f'{word} {i} about the water' for i in range(n)]


def jobs(p) -> list: return [[body for _, body in b.requests] for b in p.batches.values()]


def tokens(payload) -> int:
    used = payload['usage']
    return sum(used.get(k, 0) for k in ('prompt_tokens', 'completion_tokens', 'input_tokens', 'output_tokens',
                                        'cache_read_input_tokens', 'cache_creation_input_tokens'))


def answered(p) -> list: return [o.payload for b in p.batches.values() for o in b.outcomes if o.kind == 'succeeded']


def charged(p) -> float:
    "What a server charged at the price of `SAME`, online and by batch."
    return p.limiter.tokens_admitted/1000 + sum(map(tokens, answered(p)))/2000


def online(p) -> list: return [r for r in posts(p) if 'files' not in r.path and 'batches' not in r.path]


def left(db) -> int:
    with TeacherCache(db) as c: return c.read('select count(*) from job')[0][0]


def told(p) -> dict:
    "What the lines of chats and messages were answered, by question."
    def text(reply): return (reply['content'][0]['text'] if 'content' in reply
                             else reply['choices'][0]['message']['content'])
    return {body['messages'][-1]['content']: text(o.payload) for b in p.batches.values()
            for (_, body), o in zip(b.requests, b.outcomes) if o.kind == 'succeeded'}


def begun(prompts, t, db, p, polls=10**6, **more):
    "A run that is stopped while it waits for its jobs; `goes_on` lets them end."
    p.options.batch_polls, stop = polls, threading.Event()
    def see(event):
        if event.job == 'batch': stop.set()
    began = time.monotonic()
    found = ask(prompts, t, db, on_event=see, stop=stop, **more)
    assert found.stopped == 'stopped' and time.monotonic() - began < 5
    p.options.batch_polls = 1
    return found


@ways
def test_batches_and_online_runs_find_each_others_answers(way, tmp_path):
    q = asked(6)
    with served(way) as (p, t):
        first = ask(q[:3]*2, t, tmp_path/'a.db')
        assert (first.asked, first.tally.equal, len(first)) == (3, 3, 6) and [len(j) for j in jobs(p)] == [3]
        assert not online(p) and left(tmp_path/'a.db') == 0
        mixed = collect(q[:5], t, tmp_path/'a.db', **LONG)
        assert (mixed.asked, mixed.from_cache) == (2, 3) and len(online(p)) == 2
        assert [a.text for a in first[:3]] == [a.text for a in mixed[:3]]
        last = ask(q, t, tmp_path/'a.db')
        assert (last.asked, last.from_cache, len(last)) == (1, 5, 6) and [len(j) for j in jobs(p)] == [3, 1]
        assert collect(q, t, tmp_path/'a.db', offline=True, **LONG).from_cache == 6


@ways
def test_half_the_price(way, tmp_path):
    with served(way) as (p, t):
        cap = Budget(5.)
        found = ask(asked(5), t, tmp_path/'a.db', budget=cap)
        assert len(found) == 5 and charged(p) > 0 == p.limiter.tokens_admitted
        assert found.usd == pytest.approx(t.stats.usd) == pytest.approx(cap.spent) == pytest.approx(charged(p))
        assert cap.reserved == pytest.approx(0) and t.stats.total == t.stats.successful == 5
        with TeacherCache(tmp_path/'a.db') as c: assert c.stats()['teachers'][0]['usd'] == pytest.approx(charged(p))


@both
def test_answers_stand_at_their_prompts(way, tmp_path):
    q = asked(40)
    with served(way) as (p, t):
        found = ask(q, t, tmp_path/'a.db')
        assert [a.text for a in found] == [told(p)[x] for x in q] and len({a.text for a in found}) > 30


@both
def test_the_limits_of_a_job(way, tmp_path, monkeypatch):
    api = ENDS[way][3]
    monkeypatch.setattr(api, 'most_requests', 3)
    with served(way, batch_max_requests=3) as (p, t):
        assert len(ask(asked(8), t, tmp_path/'a.db')) == 8 and [len(j) for j in jobs(p)] == [3, 3, 2]
    monkeypatch.setattr(api, 'most_requests', 100)
    monkeypatch.setattr(api, 'most_bytes', 1500)
    with served(way, batch_max_bytes=1520) as (p, t):  # Anthropic's brackets come on top
        found = ask([f'Frage {i}: {"水é"*40}' for i in range(12)], t, tmp_path/'b.db')
        assert len(found) == 12 and not online(p) and 3 <= len(jobs(p)) <= 8 and sum(map(len, jobs(p))) == 12


@both
@pytest.mark.parametrize('kind', ['expired', 'cancelled', '5xx'])
def test_lines_without_an_answer_are_asked_online(way, kind, tmp_path):
    def fault(name, n): return {'expired': 'expired', '5xx': 'error'}.get(kind) if n in (2, 5) else None
    def see(event):
        if kind == 'cancelled' and event.job == 'batch':
            for b in p.batches.values(): b.mark('canceling' if way == 'anthropic' else 'cancelling')
    with served(way, batch_fault=fault, batch_polls=4) as (p, t):
        cap = Budget(5.)
        found = ask(asked(8), t, tmp_path/'a.db', budget=cap, on_event=see)
        assert len(found) == 8 and not found.errors and len(online(p)) == 8 - len(answered(p)) > 1
        assert cap.spent == pytest.approx(charged(p)) == pytest.approx(t.stats.usd) == pytest.approx(found.usd)
        assert cap.reserved == pytest.approx(0) and left(tmp_path/'a.db') == 0


@pytest.mark.parametrize('how', [{'second_tries': 0}, {'on_error': 'raise'}], ids=['no second try', 'raise'])
@both
def test_a_5xx_line_is_no_failure_yet(way, how, tmp_path):
    with served(way, batch_fault=lambda name, n: 'error' if n == 2 else None) as (p, t):
        found = ask(asked(4), t, tmp_path/'a.db', **how)
        assert len(found) == 4 and len(online(p)) == 1


def bad(way) -> Outcome:
    "A line that is refused."
    said = {'type': 'invalid_request_error', 'message': 'this prompt is not nice'}
    return Outcome('errored', 400, {'error': said} if way == 'chat' else {'type': 'error', 'error': said})


@both
def test_refused_lines_are_failures(way, tmp_path):
    with served(way, batch_fault=lambda name, n: bad(way) if n in (1, 4) else None) as (p, t):
        cap = Budget(5.)
        with pytest.warns(CollectWarning, match='2 prompts were not answered'):
            found = ask(asked(5), t, tmp_path/'a.db', budget=cap)
        assert len(found) == 3 and not online(p) and cap.spent == pytest.approx(charged(p)) and cap.reserved < 1e-9
        assert [(e.kind, e.messages[-1]['content']) for e in found.errors] == [('TeacherRefused', asked(5)[i]) for i in (0, 3)]
        assert 'this prompt is not nice' in found.errors[0].error
    with served(way, teach={'extra': {'top_z': 3}}) as (p, t):
        with pytest.raises(TeacherRefused, match='top_z'): ask(asked(3), t, tmp_path/'b.db')
        assert left(tmp_path/'b.db') == 0


@both
@pytest.mark.parametrize('kind', ['400', '5xx'])
def test_many_lines_that_went_wrong_end_no_run(way, kind, tmp_path):
    def fault(name, n): return (bad(way) if kind == '400' else 'error') if n <= 60 else None
    with served(way, batch_fault=fault) as (p, t):
        found = ask(asked(64), t, tmp_path/'a.db', concurrency=4)
        assert len(found) == (4 if kind == '400' else 64) and len(found) + len(found.errors) == 64
        assert left(tmp_path/'a.db') == 0


def test_a_batch_that_fails_as_a_whole(tmp_path):
    with served(batch_max_requests=2) as (p, t):
        cap = Budget(5.)
        with pytest.warns(CollectWarning, match='holds more than 2 requests.*full price'):
            found = ask(asked(4), t, tmp_path/'a.db', budget=cap)
        assert len(found) == 4 == len(online(p)) and cap.spent == pytest.approx(charged(p)) and cap.reserved < 1e-9
    with served('anthropic', batch_max_requests=2) as (p, t):
        with pytest.raises(TeacherRefused, match='at most 2 items'): ask(asked(4), t, tmp_path/'b.db')
        assert not p.batches and left(tmp_path/'b.db') == 0


@both
def test_a_budget_makes_several_batches(way, tmp_path):
    aside = []
    with served(way, batch_fault=lambda name, n: 'expired' if n == 2 else None) as (p, t):
        cap = Budget(.45)
        found = ask(asked(12), t, tmp_path/'a.db', budget=cap,
                    on_event=lambda e: aside.append(cap.spent + cap.reserved))
        assert len(found) == 12 and found.stopped is None and len(jobs(p)) > 2 and max(aside) <= cap.usd + 1e-9
        assert cap.spent == pytest.approx(charged(p)) == pytest.approx(found.usd) and cap.reserved < 1e-9
        assert sum(map(len, jobs(p))) == 12


@both
def test_a_budget_that_is_too_small(way, tmp_path):
    with served(way, price=SAID, teach={'max_tokens': 20}, answer_tokens=20) as (p, t):
        cap = Budget(.0535)  # 5 answers by batch
        part = ask(asked(9), t, tmp_path/'a.db', budget=cap, keep_cut=True)
        assert part.stopped == 'budget' and len(part) == 5 and cap.spent == pytest.approx(.05) and cap.reserved < 1e-9
        assert len(answered(p)) == 5 and not online(p) and left(tmp_path/'a.db') == 0
        with pytest.raises(BudgetSpent): ask(asked(1, 'Other'), t, tmp_path/'a.db', budget=cap)
        rest = ask(asked(9), t, tmp_path/'a.db', budget=1., keep_cut=True)
        assert (rest.from_cache, rest.asked) == (5, 4)


@both
def test_lines_that_go_online_do_not_wait_for_each_other(way, tmp_path):
    "All lines expire, and one worker at a time asks again under a budget that the rest still holds."
    with served(way, price=SAID, answer_tokens=20, batch_fault=lambda name, n: 'expired') as (p, t):
        stop, cap = threading.Event(), Budget(.10001)
        threading.Timer(6, stop.set).start()
        found = ask(asked(10), t, tmp_path/'a.db', budget=cap, concurrency=1, stop=stop, keep_cut=True)
        assert found.stopped == 'budget' and len(found) == 5 and cap.spent == pytest.approx(.1)


@both
def test_what_is_asked_online_meanwhile_only_borrows_from_the_budget(way, tmp_path):
    with served(way, price=SAID, batch_fault=lambda name, n: 'expired' if n == 1 else None, delay_s=.1) as (p, t):
        cap = Budget(.0205)  # two by batch, or one online
        found = ask(asked(3), t, tmp_path/'a.db', budget=cap)
        assert found.stopped is None and len(found) == 3, 'it did not wait for what is set aside and comes back'


def test_logprobs(tmp_path):
    for way in ('chat', 'responses', 'completions'):
        with served(way) as (p, t):
            rows = [a.completion.logprobs for a in ask(asked(3), t, tmp_path/f'{way}.db', logprobs=3)]
            assert all(len(r) == 6 and len(r.top_logprobs[0]) >= 3 for r in rows)
            again = collect(asked(3), t, tmp_path/f'{way}.db', logprobs=2, offline=True, **LONG)
            assert [a.completion.logprobs.tokens for a in again] == [r.tokens for r in rows]


@both
def test_samples(way, tmp_path):
    with served(way) as (p, t):
        found = ask(asked(4), t, tmp_path/'a.db', n=3)
        assert len(found) == 12 and [len(j) for j in jobs(p)] == [12] and [a.sample for a in found[:3]] == [0, 1, 2]
        assert len({a.text for a in found}) > 8
        assert collect(asked(4), t, tmp_path/'a.db', n=2, **LONG).from_cache == 8


@both
def test_answers_that_were_cut(way, tmp_path):
    with served(way) as (p, t):
        with pytest.warns(CollectWarning, match='2 answers were cut'):
            assert len(ask(asked(2), t, tmp_path/'a.db', max_tokens=3)) == 2
        assert ask(asked(2), t, tmp_path/'a.db', max_tokens=3, keep_cut=True).from_cache == 2
        assert len(jobs(p)) == 1
        with pytest.warns(CollectWarning): assert ask(asked(2), t, tmp_path/'a.db', max_tokens=3).asked == 2


def test_offline(tmp_path):
    with served() as (p, t):
        with pytest.raises(NotCached): ask(asked(2), t, tmp_path/'a.db', offline=True)
        TeacherCache(tmp_path/'a.db').close()
        with pytest.raises(NotCached): ask(asked(2), t, tmp_path/'a.db', offline=True)
        assert not p.requests
        ask(asked(2), t, tmp_path/'a.db')
        seen = len(p.requests)
        assert ask(asked(2), t, tmp_path/'a.db', offline=True).from_cache == 2 and len(p.requests) == seen


@both
def test_a_run_that_was_stopped_is_taken_up(way, tmp_path):
    q, db = asked(6), tmp_path/'a.db'
    with served(way) as (p, t):
        collect(q[:2], t, db, **LONG)
        part = begun(q, t, db, p)
        assert len(part) == 2 and left(db) == 1
        begun(q, t, db, p)
        cap = Budget(5.)
        found = ask(q, t, db, budget=cap)
        assert len(found) == 6 and found.asked == 4 and [len(j) for j in jobs(p)] == [4] and left(db) == 0
        assert cap.spent == pytest.approx(found.usd) and cap.reserved < 1e-9


@both
def test_answers_of_another_run_are_kept_as_well(way, tmp_path):
    db = tmp_path/'a.db'
    with served(way) as (p, t):
        begun(asked(4), t, db, p)
        other = ask(asked(3, 'Other') + asked(1), t, db)
        assert len(other) == 4 and [len(j) for j in jobs(p)] == [4, 3] and left(db) == 0
        assert collect(asked(4), t, db, offline=True, **LONG).from_cache == 4


@both
def test_lines_that_nobody_waits_for_are_not_asked_online(way, tmp_path):
    db, fault = tmp_path/'a.db', {2: 'expired', 3: 'error'}
    with served(way, batch_fault=lambda name, n: fault.get(n)) as (p, t):
        begun(asked(4), t, db, p)
        assert len(ask(asked(1, 'Other'), t, db)) == 1 and not online(p)


@both
def test_money_stays_set_aside_while_a_job_is_on_its_way(way, tmp_path):
    with served(way, price=SAID, answer_tokens=20) as (p, t):
        cap = Budget(.0505)
        begun(asked(4), t, tmp_path/'a.db', p, budget=cap, keep_cut=True)  # .04, and it will be charged
        collect(asked(4, 'Other'), t, tmp_path/'a.db', budget=cap, keep_cut=True, **LONG)
        ask(asked(4), t, tmp_path/'a.db', budget=cap, keep_cut=True)
        assert cap.spent <= cap.usd + 1e-9
