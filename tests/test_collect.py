"Collecting: one request for one question, whatever is killed, interrupted, full or in a hurry; nothing paid is lost."
import asyncio
import csv
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter

import pytest
from conftest import ROOT
from families import posts, server, teacher
from llm_distill import Budget, Price, TeacherCache, collect, create_teacher
from llm_distill.answers import Answers, cached_answers, read_answers
from llm_distill.collect import CollectWarning, acollect, cache_teacher_outputs, outlook
from llm_distill.records import Answer
from llm_distill.teachers.loopback import LoopbackProvider
from llm_distill.types import (BadInput, BudgetSpent, CacheError, Completion, NotCached, NoText, TeacherError,
                               TeacherRefused, TeacherTimeout)
from servers import Fault, Limiter

SAME = Price('m', None, 1000., 1000.)
TEN = [f'Question {i}' for i in range(10)]
COUNTED = {'openai': ('gpt-4o', {}), 'legacy': ('gpt-3.5-turbo-instruct', {}),
           'responses': ('gpt-4o', {'api': 'responses'}),
           'deepseek': (None, {}), 'anthropic': ('claude-sonnet-5', {}), 'custom': (None, {}), 'vllm': (None, {}),
           'sglang': (None, {}), 'llama.cpp': (None, {})}
forms = pytest.mark.parametrize('form', COUNTED)
top_k = pytest.mark.parametrize('form', [f for f in COUNTED if f not in ('anthropic', 'custom')])


def pair(form: str, **options):
    "A server, and what makes a teacher of it."
    family, (model, more) = form if form not in ('legacy', 'responses') else 'openai', COUNTED[form]
    p = server(family, **options)
    def make(**own):
        if model is None: return teacher(family, p, **more | own)
        return create_teacher(family, model, 'k', p.url, **{'retry_delay': 0, 'timeout': 30} | more | own)
    return p, make


def costs(p, *args, **kwargs) -> int:
    "How many requests a collection sends."
    before = len(posts(p))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', CollectWarning)
        collect(*args, **kwargs)
    return len(posts(p)) - before


def script(code: str, *args, **kwargs):
    "A process of its own that runs some code."
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def ends(worker, seconds: float = 60) -> tuple[int|str, str, str]:
    "Exit code, or that it hangs, and what it said."
    try: out, err = worker.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        worker.kill()
        return ('hangs', *worker.communicate())
    return worker.returncode, out, err


def asked(p) -> Counter:
    return Counter(r['messages'][-1]['content'] for r in list(p.requests))


START = '''
import asyncio, os, signal, sys, threading, time
from llm_distill import collect, create_teacher, TeacherCache
from llm_distill.collect import acollect
url, db = sys.argv[1:3]
def make(**more): return create_teacher("openai-compatible", "m", base_url=url, cache_as="t", **more)
t = make(max_retries=0)
'''


# What is asked


@forms
def test_only_what_is_new_is_asked(form, tmp_path):
    p, make = pair(form, answer_tokens=5)
    with p, make() as t, make(extra={'vendor_field': 1}) as other:
        run = lambda prompts, **more: costs(p, prompts, t, tmp_path/'a.db', keep_cut=True, max_tokens=20, **more)
        assert run(TEN) == 10 and run(TEN) == 0 and run(TEN[::-1]) == 0 and run(TEN[3:5]) == 0
        assert run([*TEN, 'One more']) == 1
        assert run(['Same']*10) == 1 and run(['Same']*3) == 0
        assert run(['Other', 'Other'], concurrency=1) == 1, 'one after the other'
        assert run(['Same'], n=3) == 2 and run(['Same'], n=3) == 0
        assert run(['Same'], system_prompt='Be kind') == 1
        assert [outlook(['Same'], who, tmp_path/'a.db', max_tokens=20).asked for who in (t, other)] == [0, 1]


@top_k
def test_a_longer_list_serves_a_shorter_one(form, tmp_path):
    p, make = pair(form, answer_tokens=5)
    most = 5 if form == 'legacy' else 20
    with p, make() as t:
        run = lambda **more: collect(['Hello'], t, tmp_path/'a.db', keep_cut=True, max_tokens=20, **more)
        assert run(logprobs=2).asked == 1
        whole, few = run(logprobs=most), run(logprobs=3)
        assert (whole.asked, few.asked, len(posts(p))) == (1, 0, 2)
        rows, firsts = whole[0].completion.logprobs, few[0].completion.logprobs
        assert firsts.top_tokens == [row[:3] for row in rows.top_tokens] and firsts.tokens == rows.tokens
        assert all(firsts.tail > rows.tail_mass() - 1e-6)


@pytest.mark.parametrize('form', ['openai', 'vllm', 'sglang', 'llama.cpp', 'deepseek', 'legacy', 'responses'])
def test_text_is_served_from_an_answer_with_logprobs(form, tmp_path):
    p, make = pair(form, answer_tokens=5)
    with p, make() as t:
        run = lambda **more: collect(['Hello'], t, tmp_path/'a.db', keep_cut=True, max_tokens=20, **more)
        assert run(logprobs=5).asked == 1
        text = run()
        assert text.asked == 0 and text[0].completion.logprobs is None and text[0].completion.cached
        assert run(logprobs=5)[0].completion.logprobs is not None


def test_text_today_and_logprobs_tomorrow(tmp_path):
    with server('vllm') as p, teacher('vllm', p) as t:
        collect(['One'], t, tmp_path/'a.db', logprobs=5)
        with TeacherCache(tmp_path/'a.db') as cache:
            collect(['Two'], t, cache)
            assert collect(['Two'], t, cache, logprobs=5).asked == 1


def test_samples_differ_and_are_kept_apart(tmp_path):
    with server('openai') as p, teacher('openai', p) as t:
        free, seeded = (collect(['Hello'], t, tmp_path/'a.db', n=4, **more) for more in ({}, {'seed': 7}))
        assert [a.sample for a in free] == [0, 1, 2, 3] and len({a.text for a in free}) > 1
        assert sorted(r.body.get('seed', 0) for r in posts(p)) == [0]*4 + [7, 8, 9, 10]
        assert len({a.text for a in seeded}) > 1
        assert collect(['Hello'], t, tmp_path/'a.db', n=2, seed=7)[1].text == seeded[1].text and len(posts(p)) == 8


def sources(folder) -> dict:
    import datasets
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = [{'prompt': q, 'topic': i} for i, q in enumerate(TEN)]
    talks = [{'messages': [{'role': 'system', 'content': 'Be kind'}, {'role': 'user', 'content': q}]} for q in TEN]
    (folder/'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder/'talks.jsonl').write_text('\n'.join(map(json.dumps, talks)))
    (folder/'a.txt').write_text('\n'.join(TEN))
    with (folder/'a.csv').open('w') as f:
        out = csv.DictWriter(f, ['prompt', 'topic'])
        out.writeheader(); out.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder/'a.parquet')
    pq.write_table(pa.Table.from_pylist(talks), folder/'talks.parquet')
    plain = {'list': TEN, 'records': rows, 'iterator': iter(TEN), 'frame': pd.DataFrame(rows),
             'dataset': datasets.Dataset.from_list(rows),
             **{n: folder/n for n in ('a.jsonl', 'a.txt', 'a.csv', 'a.parquet')}}
    kind = {'talks': talks, 'lists': [t['messages'] for t in talks],
            'dataset of talks': datasets.Dataset.from_list(talks),
            **{n: folder/n for n in ('talks.jsonl', 'talks.parquet')}}
    return plain, kind


def test_the_same_questions_from_anywhere_are_the_same(tmp_path):
    plain, kind = sources(tmp_path)
    with server('openai') as p, teacher('openai', p) as t, TeacherCache(tmp_path/'a.db') as cache:
        for where, prompts in plain.items():
            found = collect(prompts, t, cache)
            assert [a.prompt for a in found] == TEN and len(posts(p)) == 10, where
        for where, prompts in kind.items():
            assert len(collect(prompts, t, cache)) == 10 and len(posts(p)) == 20, where
        assert collect(plain['list'], t, cache, system_prompt='Be kind').asked == 0
        assert [a.meta for a in collect(plain['records'], t, cache)] == [{'topic': i} for i in range(10)]
        assert collect([{'q': q} for q in TEN], t, cache, column='q').asked == 0


def test_conversations_in_a_frame_that_was_read_from_parquet(tmp_path):
    import pandas as pd
    sources(tmp_path)
    with server('openai') as p, teacher('openai', p) as t:
        assert len(collect(pd.read_parquet(tmp_path/'talks.parquet'), t, tmp_path/'a.db')) == 10


def test_what_cannot_be_asked_is_said_and_the_rest_is_answered(tmp_path):
    odd = ['', '  ', [], None, 7, {'other': 1}, {'prompt': ''}, [{'role': 'user'}], 'Fine', '日本\x00', 'x'*50_000]
    with server('openai') as p, teacher('openai', p) as t, pytest.warns(CollectWarning, match='8 prompts were not'):
        found = collect(odd, t, tmp_path/'a.db')
        assert [a.prompt for a in found] == odd[8:] and len(found.errors) == 8
        assert [f'row {i}:' in e.error for i, e in enumerate(found.errors, 1)] == [True]*8
        for nothing in ([], iter(())):
            with pytest.raises(BadInput, match='nothing to ask'): collect(nothing, t, tmp_path/'a.db')
        for wrong in ({'prompt': 'x'}, 7, tmp_path/'none.jsonl'):
            with pytest.raises(BadInput): collect(wrong, t, tmp_path/'a.db')


def test_half_a_character_in_one_question_does_not_stop_the_others(tmp_path):
    with server('openai') as p, teacher('openai', p) as t:
        found = collect(['Hello \ud83d', *TEN], t, tmp_path/'a.db')
        assert len(found) >= 10


def test_a_source_that_breaks_keeps_what_came_before(tmp_path):
    def prompts():
        yield from range_of(100)
        raise OSError('the disk is gone')
    with server('openai') as p, teacher('openai', p) as t:
        with pytest.raises(OSError, match='gone'): collect(prompts(), t, tmp_path/'a.db')
        sent = len(posts(p))
        assert sent and collect(range_of(100), t, tmp_path/'a.db').from_cache == sent


def test_an_endless_slow_source_ends_by_stop(tmp_path):
    stop = threading.Event()
    def prompts():
        for i in range(10**9): time.sleep(.02); yield f'{i}'
    with server('openai') as p, teacher('openai', p) as t:
        found = collect(prompts(), t, tmp_path/'a.db', stop=stop, on_event=lambda e: e.done >= 5 and stop.set())
        assert found.stopped == 'stopped' and 5 <= len(found) < 20 and len(posts(p)) == len(found)
        assert [a.prompt for a in found] == [f'{i}' for i in range(len(found))]


def test_a_process_ends_though_its_source_still_waits(tmp_path):
    code = START + '''
stop = threading.Event()
def prompts():
    for i in range(5): time.sleep(.06); yield str(i)
    stop.set(); time.sleep(60)
print(len(collect(prompts(), t, db, stop=stop)), flush=True)'''
    with LoopbackProvider() as p: assert ends(script(code, p.url, tmp_path/'a.db'), 6)[0] == 0


def test_a_question_does_not_wait_for_the_next_one(tmp_path):
    answered = threading.Event()
    def prompts():
        yield 'First'
        assert answered.wait(2), 'who asks on after the answer waits for ever'
        yield 'Second'
    with server('openai') as p, teacher('openai', p) as t:
        assert len(collect(prompts(), t, tmp_path/'a.db', on_event=lambda e: e.done and answered.set())) == 2


def test_never_more_in_flight_than_told(tmp_path):
    for n in (1, 3, 8):
        with server('openai', delay_s=.03) as p, teacher('openai', p) as t:
            flights = []
            given, more = (range_of(40), t, tmp_path/f'{n}.db'), {'concurrency': n}
            (run := threading.Thread(target=collect, args=given, kwargs=more)).start()
            while run.is_alive():
                flights.append(sum(r.status is None for r in posts(p)))
                time.sleep(.002)
            assert max(flights) == n


def range_of(n: int) -> list: return [f'Question {i}' for i in range(n)]


# Money, failures


def test_two_budgets_hold_with_faults(tmp_path):
    faults = [f for i in range(30) for f in (None, Fault('cut'), Fault('status', 500))]
    for run, own in ((.5, 5.), (5., .5), (Budget(.5), None)):
        with server('openai', limiter=Limiter(1e9, 1e9, headers=False), answer_tokens=8, faults=faults) as p, \
                teacher('openai', p, price=SAME, budget=own, max_tokens=9, max_retries=1) as t:
            found = collect(range_of(200), t, tmp_path/'a.db', budget=run, second_tries=0)
            paid = p.limiter.tokens_admitted/1000
            assert found.stopped == 'budget' and 0 < paid <= .5 + 1e-9 and found.usd <= paid + 1e-9
            if own: assert paid <= t.budget.spent + 1e-9
            os.unlink(tmp_path/'a.db')


def test_with_no_money_at_all_it_says_so(tmp_path):
    with server('openai') as p, teacher('openai', p, price=SAME, max_tokens=100) as t:
        for how in ('raise', 'record'):
            with pytest.raises(BudgetSpent): collect(TEN, t, tmp_path/'a.db', budget=.01, on_error=how)
        with pytest.raises(BadInput): collect(TEN, t, tmp_path/'a.db', budget=0)
        assert not p.requests


def test_a_wrong_key_stops_at_once(tmp_path):
    with server('openai', key='right', delay_s=.02) as p, teacher('openai', p, 'wrong') as t:
        with pytest.raises(TeacherRefused, match='API key'): collect(range_of(500), t, tmp_path/'a.db')
        assert len(posts(p)) <= 64


def test_failures_in_a_row_stop_a_run(tmp_path):
    with server('openai', always=Fault('status', 500)) as p, teacher('openai', p, max_retries=0) as t:
        with pytest.raises(TeacherError, match='requests in a row'):
            collect(range_of(2000), t, tmp_path/'a.db', concurrency=8)
        assert len(posts(p)) <= 60


def test_one_failure_is_recorded_or_raised(tmp_path):
    bad = Fault('status', 400)
    with server('openai', faults=[bad]) as p, teacher('openai', p) as t, pytest.warns(CollectWarning):
        found = collect(TEN, t, tmp_path/'a.db', concurrency=1)
        assert [e.messages[-1]['content'] for e in found.errors] == TEN[:1] and len(found) == 9
        assert found.errors[0].kind == 'TeacherRefused' and found.stats()['errors'] == {'TeacherRefused': 1}
    with server('openai', faults=[None, bad], delay_s=.01) as p, teacher('openai', p) as t:
        with pytest.raises(TeacherRefused): collect(range_of(50), t, tmp_path/'b.db', concurrency=1, on_error='raise')
        assert len(posts(p)) == 2 and len(TeacherCache(tmp_path/'b.db')) == 1


def test_what_timed_out_once_is_answered_in_the_end(tmp_path):
    with server('openai', faults=[None, Fault('hang'), Fault('garbled')]) as p, \
            teacher('openai', p, timeout=.5, max_retries=0) as t:
        found = collect(TEN, t, tmp_path/'a.db', concurrency=2)
        assert [a.prompt for a in found] == TEN and not found.errors and len(posts(p)) == 12
    with server('openai', faults=[Fault('hang')]) as p, teacher('openai', p, timeout=.5, max_retries=0) as t:
        with pytest.raises(TeacherTimeout): collect(['Hello'], t, tmp_path/'b.db', second_tries=0)


def test_offline_asks_nothing(tmp_path):
    with server('openai') as p, teacher('openai', p) as t:
        with pytest.raises(NotCached): collect(TEN, t, tmp_path/'a.db', offline=True)
        assert not (tmp_path/'a.db').exists()
        collect(TEN, t, tmp_path/'a.db')
        assert collect(TEN, t, tmp_path/'a.db', offline=True).from_cache == 10 and len(posts(p)) == 10
        with pytest.raises(NotCached, match='Eleven'): collect([*TEN, 'Eleven'], t, tmp_path/'a.db', offline=True)
        assert len(posts(p)) == 10


def test_answers_that_were_cut_are_asked_again_unless_they_are_to_be_kept(tmp_path):
    with server('openai', answer_tokens=30) as p, teacher('openai', p, max_tokens=4) as t:
        for _ in range(2):
            with pytest.warns(CollectWarning, match='raise max_tokens'): found = collect(TEN, t, tmp_path/'a.db')
            assert len(found) == found.asked == 10 and found.tally.cut == 10
        assert collect(TEN, t, tmp_path/'a.db', keep_cut=True).asked == 0
        assert cache_teacher_outputs(['New'], t, tmp_path/'a.db')[0].completion.logprobs is not None
        assert cache_teacher_outputs(['New'], t, tmp_path/'a.db').asked == 0


def reply(finish='stop', **message) -> Fault:
    return Fault('status', 200, body={
        'id': 'x', 'object': 'chat.completion', 'created': 1, 'model': 'gpt-4o', 'usage': {
            'prompt_tokens': 1, 'completion_tokens': 1, 'total_tokens': 2},
        'choices': [{'index': 0, 'finish_reason': finish, 'logprobs': None,
                     'message': {'role': 'assistant', **message}}]})


def test_refusals_are_flagged_and_kept_and_no_text_is_not(tmp_path):
    faults = [reply(content=None, refusal='I cannot'), reply('content_filter', content='Part')]
    with server('openai', faults=faults) as p, teacher('openai', p) as t:
        found = collect(TEN[:3], t, tmp_path/'a.db', concurrency=1)
        assert [a.completion.refused for a in found] == [True, True, False] and found[0].text == 'I cannot'
        assert found.stats()['refused'] == 2 and collect(TEN[:3], t, tmp_path/'a.db').stats()['refused'] == 2
    message = {'id': 'm', 'type': 'message', 'role': 'assistant', 'model': 'claude-sonnet-5', 'stop_reason': 'refusal',
               'content': [{'type': 'text', 'text': 'No.'}], 'stop_sequence': None,
               'usage': {'input_tokens': 1, 'output_tokens': 1}}
    with server('anthropic', faults=[Fault('status', 200, body=message)]) as p, teacher('anthropic', p) as t:
        assert collect(['Hello'], t, tmp_path/'b.db', max_tokens=50)[0].completion.refused
    for fault in (reply('content_filter', content=None), reply(content=''), Fault('empty_answer')):
        with server('openai', always=fault) as p, teacher('openai', p) as t:
            with pytest.raises(NoText): collect(['Hello'], t, tmp_path/'c.db')
            with TeacherCache(tmp_path/'c.db') as cache: assert not len(cache)


# From wherever it is called


def test_from_a_thread_within_a_loop_and_awaited(tmp_path):
    with server('openai') as p, teacher('openai', p) as t, TeacherCache(tmp_path/'a.db') as cache:
        found = []
        thread = threading.Thread(target=lambda: found.append(collect(TEN, t, cache)))
        thread.start(); thread.join(10)
        async def inside(): return collect(TEN[:5] + ['In a loop'], t, cache)
        async def awaited(): return await acollect(TEN[:5] + ['Awaited'], t, cache)
        async def both():
            return await asyncio.gather(*(acollect([f'{i} {j}' for j in range(20)], t, cache) for i in range(2)))
        found += [asyncio.run(inside()), asyncio.run(awaited()), *asyncio.run(both())]
        assert [len(f) for f in found] == [10, 6, 6, 20, 20] and [f.asked for f in found] == [10, 1, 1, 20, 20]


def test_two_runs_at_the_same_time_give_each_its_own(tmp_path):
    with server('openai', delay_s=.01) as p, teacher('openai', p) as t, TeacherCache(tmp_path/'a.db') as cache:
        found = {}
        def run(i): found[i] = collect([*TEN, *(f'{i} {j}' for j in range(30))], t, cache, concurrency=4)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(20)
        assert [found[i][20].prompt for i in range(2)] == ['0 10', '1 10'] and len(cache) == 70
        assert [a.text for a in found[0][:10]] == [a.text for a in found[1][:10]], 'one answer to one question'


def test_a_listener_that_fails_loses_nothing_that_was_paid(tmp_path):
    def listen(event):
        if event.done >= 4: raise ValueError('my own mistake')
    with server('openai', delay_s=.02) as p, teacher('openai', p) as t:
        with pytest.raises(ValueError, match='mistake'):
            collect(range_of(50), t, tmp_path/'a.db', concurrency=4, on_event=listen)
        sent = len(posts(p))
        assert sent < 20 and collect(range_of(50), t, tmp_path/'a.db').from_cache == sent


@pytest.mark.parametrize('error', ['SystemExit(3)', 'KeyboardInterrupt()', 'BaseException()'])
def test_a_listener_that_wants_to_end_it_all(error, tmp_path):
    code = START + f'''
def listen(event): raise {error}
collect(["a", "b", "c"], t, db, on_event=listen)'''
    with LoopbackProvider() as p: assert ends(script(code, p.url, tmp_path/'a.db'), 30)[0] != 'hangs'


def test_collecting_out_of_a_listener_is_refused_at_once(tmp_path):
    took = []
    def listen(event):
        if took: return
        began = time.monotonic()
        try: collect(['Inner'], t, tmp_path/'a.db')
        finally: took.append(time.monotonic() - began)
    with server('openai') as p, teacher('openai', p) as t:
        with pytest.raises(RuntimeError, match='acollect'): collect(['Outer'], t, tmp_path/'a.db', on_event=listen)
        assert max(took) < 1


def test_events_tell_how_far_it_is(tmp_path):
    seen = []
    with server('openai') as p, teacher('openai', p) as t:
        collect(TEN, t, tmp_path/'a.db', n=2, on_event=seen.append)
        collect(iter(TEN), t, tmp_path/'a.db', on_event=seen.append)
    done = [e.done for e in seen if e.total == 20]
    assert done == sorted(done) and done[-1] == 20 and seen[-1].done == 10


def test_a_cancelled_task_keeps_what_was_on_its_way(tmp_path):
    async def main():
        task = asyncio.create_task(acollect(range_of(200), t, tmp_path/'a.db', concurrency=4))
        while len(posts(p)) < 9: await asyncio.sleep(.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError): await task
        return len(posts(p))
    with server('openai', delay_s=.1) as p, teacher('openai', p) as t:
        sent = asyncio.run(main())
        time.sleep(.3)
        assert len(posts(p)) == sent and collect(range_of(sent), t, tmp_path/'a.db').asked == 0


# Interrupts


INTERRUPTED = START + '''
print("go", flush=True)
answers = collect([f"Question {i}" for i in range(500)], t, db, concurrency=4)
print("end", time.time(), len(answers), answers.stopped, flush=True)'''


def test_an_interrupt_keeps_what_is_on_its_way_and_asks_nothing_more(tmp_path):
    with LoopbackProvider(delay_s=.3) as p:
        worker = script(INTERRUPTED, p.url, tmp_path/'a.db')
        while len(p.requests) < 6: time.sleep(.01)
        worker.send_signal(signal.SIGINT)
        time.sleep(.15)
        sent = len(p.requests)
        code, out, err = ends(worker)
        assert code == 0 and out.split()[-2:] == [f'{sent}', 'interrupted'] and 'on their way' in err
        assert len(p.requests) == sent and len(TeacherCache(tmp_path/'a.db')) == sent


def test_a_second_interrupt_ends_at_once(tmp_path):
    with LoopbackProvider(delay_s=8) as p:
        worker = script(INTERRUPTED, p.url, tmp_path/'a.db')
        while len(p.requests) < 4: time.sleep(.01)
        for _ in range(2): worker.send_signal(signal.SIGINT); time.sleep(.4)
        began = time.monotonic()
        code, out, err = ends(worker)
        assert time.monotonic() - began < 2 and code in (1, -signal.SIGINT) and 'KeyboardInterrupt' in err
        assert 'end' not in out and len(p.requests) == 4


CELL = '''
prompts = [f"{} {{i}}" for i in range(500)]
answers = {}(prompts, t, db, concurrency=4)
print(len(answers), answers.stopped)'''


@pytest.mark.parametrize('how', ['collect', 'await acollect'])
def test_an_interrupted_cell_leaves_nothing_behind(how, tmp_path):
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name='python3', cwd=str(ROOT))
    with LoopbackProvider(delay_s=.3) as p:
        def run(code): return client.execute_interactive(code, timeout=8, output_hook=said.append)['content']
        def interrupt():
            until = time.monotonic() + 8
            while len(p.requests) < 6 and time.monotonic() < until: time.sleep(.01)
            manager.interrupt_kernel()
        said, thread = [], threading.Thread(target=interrupt)
        try:
            head = START.replace('url, db = sys.argv[1:3]', f'url, db = {p.url!r}, {str(tmp_path/"a.db")!r}')
            assert run(head)['status'] == 'ok'
            thread.start()
            run(CELL.format('some', how))
            sent = len(p.requests)
            time.sleep(.6)
            assert len(p.requests) == sent < 20
            if how == 'collect': assert f'{sent} interrupted' in ''.join(m['content'].get('text', '') for m in said)
            with TeacherCache(tmp_path/'a.db') as cache: assert len(cache) == sent
        finally:
            thread.join()
            client.stop_channels()
            manager.shutdown_kernel(now=True)


# Kills, full disks, forks


WORKER = START + '''
n = int(sys.argv[3])
answers = collect([f"Question {i}" for i in range(n)], t, db, logprobs=5, concurrency=4,
                  on_event=lambda e: print(e.done, flush=True))
print("asked", answers.asked, "cached", answers.from_cache, flush=True)'''


@pytest.mark.parametrize('kills', [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_loses_nothing_that_was_acknowledged_and_nothing_is_asked_twice(kills, tmp_path):
    n, db, rng, known = 14*kills, tmp_path/'a.db', random.Random(kills), set()
    with LoopbackProvider(delay_s=.005) as p:
        for _ in range(kills):
            before, worker, told = asked(p), script(WORKER, p.url, db, n), 0
            for line in worker.stdout:
                told = int(line)
                if told >= len(known) + rng.randrange(1, 12): break
            time.sleep(rng.choice([0, rng.uniform(0, .02)]))
            worker.kill()
            said = worker.communicate()[0].split()
            told = max([told, *map(int, said[:-1])])  # a last line may be half a number
            with TeacherCache(db) as cache: now = {kept.query.messages()[-1]['content'] for kept in cache.rows()}
            assert len(now) >= told and now >= known, 'an acknowledged answer is lost'
            assert not known & set(asked(p) - before), 'asked though it was there'
            known = now
        last = ends(script(WORKER, p.url, db, n), 60)[1].splitlines()[-1]
        assert last == f'asked {n - len(known)} cached {len(known)}'
        # a kill costs what is in the air (4) and, rarely, what is in the commit under way
        assert sum(asked(p).values()) - n <= 5*kills and len(asked(p)) == n


FULL = START + '''
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
rows = [{"prompt": f"Question {i} " + "word "*100, "more": "x"*int(sys.argv[3])} for i in range(2000)]
try: collect(rows, t, db, logprobs=20, max_tokens=60, keep_cut=True)
except Exception as e: print(type(e).__name__, e, flush=True)
try:
    with TeacherCache(db) as cache: print(len(list(cache.rows())))
except Exception as e: print("no read", e)'''


@pytest.mark.parametrize('more', [0, pytest.param(4000, id='4000: the spool is full first')])
def test_a_full_disk_stops_the_run_and_harms_nothing(more, tmp_path):
    with LoopbackProvider() as p:
        code, out, err = ends(script(FULL, p.url, tmp_path/'a.db', more), 30)
        assert code == 0 and out.startswith('CacheError'), (code, out[-300:], err[-300:])
        with TeacherCache(tmp_path/'a.db') as cache: kept = {k.query.messages()[-1]['content'] for k in cache.rows()}
        assert len(kept) >= 10
        before = asked(p)
        with create_teacher('openai-compatible', 'm', base_url=p.url, cache_as='t') as t:
            rest = [*kept, *[q for q in before if q not in kept], 'New']
            found = collect(rest, t, tmp_path/'a.db', logprobs=20, max_tokens=60, keep_cut=True)
        assert found.from_cache == len(kept) and set(asked(p) - before) == set(rest) - kept


def many(p, path, n: int = 600):
    with create_teacher('openai-compatible', 'm', base_url=p.url) as t: return collect(range_of(n), t, path)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_answers_on_disk_are_a_list_and_pickle_and_fork(tmp_path):
    with LoopbackProvider() as p:
        found = many(p, tmp_path/'a.db')
        assert len(found) == 600 and found[-1].prompt == 'Question 599'
        assert [a.prompt for a in found[2:4]] == range_of(4)[2:]
        with pytest.raises(IndexError): found[600]
        twin = pickle.loads(pickle.dumps(found))
        assert twin[5] == found[5] and len(twin) == 600 and twin.asked == 600
        for _ in range(2):
            pid = os.fork()
            if not pid: os._exit(int(found[500].prompt != 'Question 500'))
            assert os.waitpid(pid, 0)[1] == 0
        threads = [threading.Thread(target=lambda: [found[i] for i in range(0, 600, 7)]) for _ in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert found[0].prompt == 'Question 0'


def test_a_child_that_ends_takes_no_answers_along(tmp_path):
    code = START + '''
found = collect([str(i) for i in range(520)], t, db)
for _ in range(2):
    if not (pid := os.fork()): found[5]; sys.exit(0)
    if os.waitpid(pid, 0)[1]: sys.exit(1)'''
    with LoopbackProvider() as p: assert ends(script(code, p.url, tmp_path/'a.db'))[0] == 0


def test_answers_are_there_after_a_change_of_folder(tmp_path):
    code = START + '''
found = collect([str(i) for i in range(520)], t, db)
os.chdir(sys.argv[3])
print(found[5].text)'''
    (tmp_path/'other').mkdir()
    with LoopbackProvider() as p:
        assert ends(script(code, p.url, 'rel.db', tmp_path/'other', cwd=tmp_path))[0] == 0


FAST = '''
import asyncio, json
async def talk(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            size = next(int(l.split(b":")[1]) for l in head.split(b"\\r\\n") if l.lower().startswith(b"content-length"))
            await reader.readexactly(size)
            body = json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "word "*200}}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
            head = b"HTTP/1.1 200 OK\\r\\ncontent-type: application/json\\r\\ncontent-length: %d\\r\\n\\r\\n"
            writer.write(head % len(body) + body)
    except (asyncio.IncompleteReadError, ConnectionError): pass
async def main():
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())'''
PEAK = START + '''
import resource
n = int(sys.argv[3])
found = collect((f"Question {i} " + "word "*100 for i in range(n)), t, db)
assert len(found) == n and found[n - 1].prompt.startswith(f"Question {n - 1} ")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)'''


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_questions(tmp_path):
    fast = script(FAST)
    try:
        url = f'http://127.0.0.1:{int(fast.stdout.readline())}/v1'
        done = [ends(script(PEAK, url, tmp_path/f'{n}.db', n), 200) for n in (3000, 15_000)]
        assert float(done[1][1]) - float(done[0][1]) < 25, done
    finally: fast.kill(); fast.communicate()


# What comes out


def test_answers_are_written_and_read_back(tmp_path):
    with server('openai') as p, teacher('openai', p) as t:
        rows = [{'prompt': q, 'topic': i, 'tags': ['a', None]} for i, q in enumerate(TEN)]
        found = collect(rows, t, tmp_path/'a.db', logprobs=5)
        assert found.to_jsonl(tmp_path/'a.jsonl') == 10
        lines = [json.loads(line) for line in (tmp_path/'a.jsonl').read_text().splitlines()]
        assert all(list(line) == ['messages'] for line in lines)
        assert read_answers(tmp_path/'a.jsonl')[3].text == found[3].text
        found.to_jsonl(tmp_path/'all.jsonl', details=True), found.to_parquet(tmp_path/'a.parquet')
        for source in (tmp_path/'all.jsonl', tmp_path/'a.parquet', found.to_dataset()):
            back = read_answers(source)
            for a, b in zip(found, back, strict=True):
                x, y = a.completion, b.completion
                assert (a.messages, a.meta, a.text, x.usage, x.model) == (b.messages, b.meta, b.text, y.usage, y.model)
                assert x.logprobs.tokens == y.logprobs.tokens and x.logprobs.top_tokens == y.logprobs.top_tokens
                assert abs(x.logprobs.tail_mass() - y.logprobs.tail_mass()).max() < 1e-6
        assert found.to_jsonl(tmp_path/'b.jsonl', which=lambda a: a.meta['topic'] < 3) == 3
        with TeacherCache(tmp_path/'a.db') as cache:
            assert {a.text for a in cached_answers(cache)} == {a.text for a in found}
        assert found.browse('question 7')._repr_html_() and len(found.browse('question 7')) == 1


def test_what_is_written_is_json(tmp_path):
    import numpy as np
    from llm_distill.types import TokenLogprobs
    rows = TokenLogprobs([b'a'], np.array([np.nan]), [[b'a']], [np.array([-np.inf])])
    found = Answers([Answer([{'role': 'user', 'content': 'q'}], Completion('a', logprobs=rows))])
    found.to_jsonl(tmp_path/'a.jsonl', details=True)
    def wrong(word): raise AssertionError(word)
    json.loads((tmp_path/'a.jsonl').read_text(), parse_constant=wrong)


def test_records_with_dates_are_written(tmp_path):
    import datetime
    import pandas as pd
    for day in (pd.Timestamp('2026-01-01'), datetime.date(2026, 1, 1), b'bytes'):
        found = Answers([Answer([{'role': 'user', 'content': 'q'}], Completion('a'), {'day': day})])
        assert found.to_parquet(tmp_path/'a.parquet') == found.to_jsonl(tmp_path/'a.jsonl', details=True) == 1


def test_the_account_is_json_and_right(tmp_path):
    with server('openai', faults=[Fault('status', 400)]) as p, teacher('openai', p, price=SAME) as t:
        collect(TEN[:2], t, tmp_path/'a.db')
        with pytest.warns(CollectWarning): found = collect([*TEN, 'Question 9', ''], t, tmp_path/'a.db')
        told = json.loads(json.dumps(found.stats(), allow_nan=False))
        counts = [told[k] for k in ('prompts', 'asked', 'from_cache', 'equal', 'failed', 'answers')]
        assert counts == [12, 9, 1, 1, 1, 11]
        assert told['usd'] == pytest.approx((found.usage.total_tokens)/1000) and told['requests_per_s'] > 0
        assert 0 < told['latency_s']['p50'] <= told['latency_s']['max'] and told['finish_reasons'] == {'stop': 11}


def test_the_account_of_a_run_that_was_stopped(tmp_path):
    stop = threading.Event()
    with server('openai', delay_s=.05) as p, teacher('openai', p) as t:
        found = collect(range_of(200), t, tmp_path/'a.db', stop=stop, concurrency=4,
                        on_event=lambda e: e.done > 5 and stop.set())
        assert found.stats()['answers'] == len(found)


def test_another_model_or_system_within_a_run_is_told(tmp_path):
    def named(model, system):
        body = reply(content='x').body
        return Fault('status', 200, body=body | {'model': model, 'system_fingerprint': system})
    with server('openai', faults=[named('gpt-4o-a', 'fp1'), named('gpt-4o-b', 'fp2')]) as p, teacher('openai', p) as t:
        with pytest.warns(CollectWarning) as seen: found = collect(TEN[:2], t, tmp_path/'a.db')
        words = ' '.join(str(w.message) for w in seen)
        assert 'the model changed' in words and 'the system_fingerprint changed' in words
        assert found.stats()['models'] == {'gpt-4o-a': 1, 'gpt-4o-b': 1}


@pytest.mark.parametrize('more', [{'keep_cut': True}, {'on_error': 'raise'}, {'second_tries': 1}, {'budget': 1.},
                                  {'concurrency': 4}], ids=str)
def test_an_outlook_takes_the_arguments_of_the_run(more, tmp_path):
    with server('openai') as p, teacher('openai', p, max_tokens=30) as t:
        collect(TEN, t, tmp_path/'a.db', **more)
        assert outlook(TEN, t, tmp_path/'a.db', **more).asked == 0


def test_an_outlook_is_right_and_leaves_nothing(tmp_path):
    with server('openai') as p, teacher('openai', p, max_tokens=40) as t:
        seen = outlook([*TEN, TEN[0], ''], t, tmp_path/'a.db')
        assert (seen.prompts, seen.asked, seen.equal, seen.wrong) == (12, 10, 1, 1) and not (tmp_path/'a.db').exists()
        collect(TEN[:4], t, tmp_path/'a.db')
        assert outlook(TEN, t, tmp_path/'a.db').asked == 6 == costs(p, TEN, t, tmp_path/'a.db')


def test_settings_that_make_no_sense_are_refused(tmp_path):
    with server('openai') as p, teacher('openai', p) as t, server('anthropic') as q, teacher('anthropic', q) as claude:
        for bad in ({'n': 0}, {'concurrency': 0}, {'second_tries': -1}, {'on_error': 'x'}, {'mode': 'x'}, {'poll_s': 0},
                    {'concurency': 5, 'timeout': 3}, {'logprobs': True}):
            with pytest.raises(BadInput): collect(TEN, t, tmp_path/'a.db', **bad)
        with pytest.raises(BadInput, match='no logprobs'): collect(TEN, claude, tmp_path/'a.db', logprobs=5)
        with pytest.raises(CacheError): collect(TEN, t, tmp_path)
        assert not p.requests and not q.requests
