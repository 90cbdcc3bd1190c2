"Batches: half the price, the same answers, nothing asked twice, whatever happens on the way."
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from conftest import ROOT
from families import posts, server
from llm_distill import Budget, Price, TeacherCache, collect, create_teacher
from llm_distill.collect import CollectWarning
from llm_distill.teachers.batches import AnthropicBatches, OpenAIBatches
from llm_distill.types import BudgetSpent, NotCached, NotGiven, TeacherError, TeacherRefused
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
    url = options.pop('url', None) or p.url
    return create_teacher(family, model or usual, key, url,
                          **{'retry_delay': 0, 'timeout': 5, 'price': SAME} | own | options)


def ask(prompts, t, db, **more): return collect(prompts, t, db, **{'mode': 'batch', 'poll_s': .02} | LONG | more)


def but(broken, *values): return list(values)


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
    with TeacherCache(db) as c: return c.read("select count(*) from job where kind<>'ended'")[0][0]


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
        assert [(e.kind, e.messages[-1]['content']) for e in found.errors] == [
            ('TeacherRefused', asked(5)[i]) for i in (0, 3)]
        assert 'this prompt is not nice' in found.errors[0].error
    with served(way, teach={'extra': {'top_z': 3}}) as (p, t):
        with pytest.raises(TeacherRefused, match='top_z'): ask(asked(3), t, tmp_path/'b.db')
        assert left(tmp_path/'b.db') == 0


_ROW = 'failed() counts the lines of a file as requests in a row, and halts; the next run does so again, for ever'


@pytest.mark.parametrize('way, kind', [*(pytest.param('chat', k) for k in ('400', '5xx')),
                                       ('anthropic', '400'), ('anthropic', '5xx')])
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
        assert len(found) == 12 and found.stopped is None and len(jobs(p)) > 1 and max(aside) <= cap.usd + 1e-9
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
        with pytest.raises(BudgetSpent):
            collect(asked(4, 'Other'), t, tmp_path/'a.db', budget=cap, keep_cut=True, **LONG)
        ask(asked(4), t, tmp_path/'a.db', budget=cap, keep_cut=True)
        assert cap.spent <= cap.usd + 1e-9


@both
@pytest.mark.parametrize('kind', ['cut', 'cut_json', 'reset', 'hang'])
def test_a_lost_reply_makes_no_second_job(way, kind, tmp_path):
    with served(way, teach={'timeout': 1, 'max_retries': 3}) as (p, t):
        p.at(ENDS[way][2], Fault(kind))
        if kind == 'hang':
            with pytest.raises(TimeoutError): ask(asked(4), t, tmp_path/'a.db')
        found = ask(asked(4), t, tmp_path/'a.db')
        assert len(found) == 4 and [len(j) for j in jobs(p)] == [4] and not online(p) and left(tmp_path/'a.db') == 0


@both
def test_who_cannot_find_out_whether_there_is_a_job_makes_none(way, tmp_path):
    with served(way) as (p, t):
        p.at(ENDS[way][2], Fault('cut'))
        p.at(r'GET .*/batches\?', *[Fault('status', 500)]*4)
        with pytest.raises(TeacherError): ask(asked(4), t, tmp_path/'a.db')
        assert len(ask(asked(4), t, tmp_path/'a.db')) == 4 and [len(j) for j in jobs(p)] == [4]


FAULTS = {'500': Fault('status', 500), '429': Fault('status', 429, {'Retry-After': '0'}), 'cut': Fault('cut'),
          'reset': Fault('reset')}
_RAW = {('chat', 'results', kind): 'files are read outside of guard(): raw SDK errors, no retry' for kind in FAULTS}
_RAW['anthropic', 'results', 'cut'] = 'what breaks within results() is neither ours nor asked again'


@pytest.mark.parametrize('case', but(_RAW, *((way, what, kind) for way in ENDS for kind in FAULTS for what in (
    ('upload', 'create', 'look', 'results') if way == 'chat' else ('create', 'look', 'results')))), ids='-'.join)
def test_what_goes_wrong_for_a_moment_is_asked_again(case, tmp_path):
    way, what, fault = *case[:2], FAULTS[case[2]]
    results, look, create, _ = ENDS[way]
    with served(way) as (p, t):
        p.at({'upload': 'POST .*/files', 'create': create, 'look': look, 'results': results}[what], fault, fault)
        cap = Budget(5.)
        found = ask(asked(30), t, tmp_path/'a.db', budget=cap)
        assert len(found) == 30 and len(jobs(p)) == 1 and not online(p) and len(p._at) <= (what == 'create')
        assert cap.spent == pytest.approx(charged(p)) == pytest.approx(t.stats.usd) == pytest.approx(found.usd)


@both
def test_a_look_that_hangs(way, tmp_path):
    with served(way, teach={'timeout': .5}) as (p, t):
        p.at(ENDS[way][1], None, Fault('hang'))
        assert len(ask(asked(3), t, tmp_path/'a.db')) == 3


_GONE = 'a 404 ends the run, and the job stays in the table: every further run ends in the same way'


@pytest.mark.parametrize('way, what', [
    *(pytest.param(w, 'job') for w in ENDS), pytest.param('chat', 'results'),
    pytest.param('anthropic', 'results')])
def test_a_job_that_is_gone_holds_nobody_up(way, what, tmp_path):
    with served(way) as (p, t):
        begun(asked(3), t, tmp_path/'a.db', p)
        if what == 'job': p.memory.batches.clear()
        else: p.at(ENDS[way][0], *[Fault('status', 404)]*9)
        for _ in range(2):
            try: found = ask(asked(3), t, tmp_path/'a.db'); break
            except TeacherError: found = ()
        assert len(found) == 3


def test_answers_with_other_line_ends(tmp_path):
    with served() as (p, t):
        begun(asked(2), t, tmp_path/'a.db', p)
        (name, body), (other, _) = next(iter(p.batches.values())).requests
        said = {'choices': [{'message': {'content': 'one\u2028two\x85three'}, 'finish_reason': 'stop'}],
                'usage': {'prompt_tokens': 9, 'completion_tokens': 3}, 'model': 'gpt-4o'}
        rows = [{'custom_id': n, 'response': {'status_code': 200, 'body': said}} for n in (name, other)]
        p.at('GET .*/content', Fault('garbled', body='\n'.join(json.dumps(r, ensure_ascii=False) for r in rows)))
        assert [a.text for a in ask(asked(2), t, tmp_path/'a.db')] == ['one\u2028two\x85three']*2


MODELS = {'chat': 'gpt-4o-mini', 'anthropic': 'claude-haiku-4-5'}


@both
def test_models_and_endpoints_in_one_file_keep_to_their_own_jobs(way, tmp_path):
    db = tmp_path/'a.db'
    with served(way) as (p, t), pupil(p, way, MODELS[way]) as small, pupil(p, way, cache_as='elsewhere') as moved:
        begun(asked(3), t, db, p)
        for other in (small, moved):
            assert len(ask(asked(3), other, db)) == 3 and left(db) == 1
        assert len(ask(asked(3), t, db)) == 3 and [len(j) for j in jobs(p)] == [3]*3 and not online(p)
        assert [{r['model'] for r in j} for j in jobs(p)] == [{t.model}, {small.model}, {t.model}]


def test_two_ways_to_ask_one_model_keep_to_their_own_jobs(tmp_path):
    db = tmp_path/'a.db'
    with served() as (p, t), pupil(p, 'responses') as other:
        begun(asked(3), t, db, p)
        assert len(ask(asked(2), other, db)) == 2
        assert len(ask(asked(3), t, db)) == 3 and [len(j) for j in jobs(p)] == [3, 2] and not online(p)


_TAKEN = 'find() goes by size and time alone; `known` holds the open jobs of one model in one file'


@pytest.mark.parametrize('way, whose', [(w, s) if w == 'chat' else pytest.param(w, s)
                                        for w in ENDS for s in ("another model's", "another file's")])
def test_a_lost_job_is_not_taken_for_another_one(way, whose, tmp_path):
    model, db = (MODELS[way], tmp_path/'a.db') if whose == "another model's" else (None, tmp_path/'b.db')
    with served(way) as (p, t), pupil(p, way, model) as other:
        begun(asked(3), t, tmp_path/'a.db', p)
        p.at(ENDS[way][2], Fault('status', 500))
        assert len(ask(asked(3, 'Other'), other, db)) == 3 and not online(p)
        assert len(ask(asked(3), t, tmp_path/'a.db')) == 3 and [len(j) for j in jobs(p)] == [3, 3] and not online(p)


def test_who_has_no_batches_says_who_has_them(tmp_path):
    from llm_distill.teachers.base import Teacher
    from llm_distill.teachers.local import LocalTeacher
    assert LocalTeacher.batch_api is Teacher.batch_api, 'a local model is asked in batches?'
    for family in ('deepseek', 'custom'):
        with server(family) as p, create_teacher(family, None, 'k', p.url, price=SAME) as t:
            with pytest.raises(NotGiven, match='OpenAI, Anthropic'): ask(['Hello'], t, tmp_path/'a.db')
            assert not p.requests


def test_compatible_servers(tmp_path):
    with server('vllm') as p, create_teacher('vllm', None, None, p.url) as t:
        assert len(ask(asked(3), t, tmp_path/'a.db')) == 3 and [len(j) for j in jobs(p)] == [3] and t.stats.usd is None


def test_a_compatible_server_without_batches(tmp_path):
    with server('openai-compatible') as p, create_teacher('openai-compatible', None, None, p.url) as t:
        with pytest.raises(NotGiven, match='/batches'): ask(['Hello'], t, tmp_path/'a.db')


@both
def test_no_key_in_the_file_or_in_errors(way, tmp_path):
    secret = 'sk-secret-0123456789'
    with server(WAYS[way][0], key=secret) as p, pupil(p, way, key=secret) as t:
        begun(asked(3), t, tmp_path/'a.db', p)
        assert all(secret.encode() not in f.read_bytes() for f in tmp_path.iterdir())
        assert secret in str(p.requests[-1].headers)
    with server(WAYS[way][0], key='right') as p, pupil(p, way, key=secret) as t:
        with pytest.raises(TeacherRefused) as e: ask(asked(3), t, tmp_path/'b.db')
        assert secret not in repr(e.value) and left(tmp_path/'b.db') == 0


def test_a_write_that_nobody_waits_for_any_more_does_not_end_the_writer(tmp_path):
    with TeacherCache(tmp_path/'a.db') as c:
        slow = c.write(lambda db: time.sleep(.2), True)
        time.sleep(.1)
        slow.cancel()  # as a run does that is stopped while it notes a job
        assert c.write(lambda db: 'done', True).result(2) == 'done'


CHILD = '''
import sys; sys.path.insert(0, 'tests')
from test_batch import *
way, url, db, n = sys.argv[1:]
with pupil(None, way, url=url, cache_as='t') as t:
    found = ask(asked(int(n)), t, db, poll_s=.05)
    print(len(found), found.stopped)
'''


def child(way, p, db, n=30):
    words = sys.executable, '-W', 'ignore', '-c', CHILD, way, p.url, str(db), str(n)
    return subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until(p, worker, where):
    "Wait for a request of a child; gives whether it came."
    seen = len(p.requests)
    while worker.poll() is None:
        if any(re.search(where, f'{r.method} {r.path}') for r in p.requests[seen:]): return True
        time.sleep(.005)
    return False


@both
def test_kill(way, tmp_path):
    "At each step of a job, at some moment of it."
    results, look, create, _ = ENDS[way]
    moments, lots, killed = [create, look, results], random.Random(way), 0
    if way == 'chat': moments.insert(0, 'POST .*/files')
    with served(way, delay_s=.1, batch_polls=4) as (p, t):
        for where in [*moments, results]:
            worker = child(way, p, tmp_path/'a.db')
            if until(p, worker, where):
                time.sleep(lots.random()*.1)
                worker.kill()
                killed += 1
            worker.communicate()
        assert killed >= len(moments)
        assert child(way, p, tmp_path/'a.db').communicate()[0].split() == ['30', 'None']
        assert [len(j) for j in jobs(p)] == [30] and not online(p) and left(tmp_path/'a.db') == 0


@both
def test_an_interrupt_while_it_waits(way, tmp_path):
    with served(way, batch_polls=10**6) as (p, t):
        worker = child(way, p, tmp_path/'a.db')
        assert until(p, worker, ENDS[way][1])
        began = time.monotonic()
        worker.send_signal(signal.SIGINT)
        out, said = worker.communicate(timeout=10)
        assert out.split() == ['0', 'interrupted'] and time.monotonic() - began < 3 and 'Traceback' not in said
        p.options.batch_polls = 1
        assert child(way, p, tmp_path/'a.db').communicate()[0].split() == ['30', 'None']
        assert [len(j) for j in jobs(p)] == [30] and not online(p)


@both
def test_two_runs_wait_for_one_job(way, tmp_path):
    "The first one looks later, when the second one has taken the results and forgotten the job."
    with served(way) as (p, t), ThreadPoolExecutor() as pool:
        p.options.batch_polls = 10**6
        first = pool.submit(ask, asked(4), t, tmp_path/'a.db', poll_s=1.5)
        assert p.until(lambda p: any(b.polls for b in p.batches.values()))
        p.options.batch_polls = 1
        assert len(ask(asked(4), t, tmp_path/'a.db')) == 4
        assert len(first.result(20)) == 4 and [len(j) for j in jobs(p)] == [4] and not online(p)


_NONE = 'a job that another process is sending has no id: it is forgotten, sent twice, and looked at as None'


@pytest.mark.parametrize('way', but({'chat': _NONE}, *ENDS))
def test_two_runs_at_once_send_one_job(way, tmp_path):
    "The second one begins while the first one waits for the reply to its job."
    with served(way, delay_s=.3, teach={'timeout': 9}) as (p, t), ThreadPoolExecutor() as pool:
        first = pool.submit(ask, asked(4), t, tmp_path/'a.db')
        assert p.until(lambda p: len(posts(p)) == 1)
        found = ask(asked(4), t, tmp_path/'a.db'), first.result(20)
        assert [len(f) for f in found] == [4, 4] and [len(j) for j in jobs(p)] == [4]
