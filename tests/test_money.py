"Money: a cap that holds, prices that are known or an error, an estimate that brackets the truth, terms that are told."
import asyncio
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import ROOT
from families import FAMILIES, posts, server, teacher
from llm_distill import Budget, Price, collect, create_teacher, find_price, set_price
from llm_distill.pricing import estimate_cost
from llm_distill.teachers.rate import RateControl
from llm_distill.types import BadInput, BadReply, BudgetSpent, TeacherError, Usage, as_messages
from servers import Fault, Limiter

SAME = Price('m', None, 1000., 1000.)  # a dollar for a thousand tokens, of question and answer


def charged(p) -> float:
    "What a server charged at the price of `SAME`."
    return p.limiter.tokens_admitted/1000


def generous() -> Limiter: return Limiter(1e9, 1e9, headers=False)


async def at_most(budget, rate, jobs):
    "Run many at once; gives results, and what was in flight and set aside at most."
    tasks, flight, aside = [asyncio.create_task(j) for j in jobs], 0, 0.
    while not all(t.done() for t in tasks):
        flight, aside = max(flight, rate.in_flight), max(aside, budget.spent + budget.reserved)
        await asyncio.sleep(.01)
    return [t.exception() or t.result() for t in tasks], flight, aside


def test_512_in_flight_never_pass_the_cap():
    worst = .4  # no request reserves more
    faults = [Fault('cut') if i % 40 == 7 else Fault('status', 500) if i % 40 == 9 else None for i in range(400)]
    with server('openai', limiter=generous(), answer_tokens=200, delay_s=.5, faults=faults) as p:
        cap = Budget(525*worst)
        t = teacher('openai', p, price=SAME, budget=cap, max_tokens=200, max_retries=1, timeout=60)
        t.rate = RateControl(512, start=512)
        async def main():
            try: return await at_most(cap, t.rate, [t.agenerate(f'Question {i}') for i in range(1400)])
            finally: await t.aclose()
        results, flight, aside = asyncio.run(main())
        kinds = {type(r).__name__ for r in results}
        assert charged(p) <= cap.spent + 1e-6, 'more was charged than is counted as spent'
        assert cap.spent <= cap.usd + 1e-6 and aside <= cap.usd + 1e-6
        assert cap.reserved == pytest.approx(0, abs=1e-6)
        assert kinds - {'TeacherUnreachable', 'TeacherBusy'} == {'Completion', 'BudgetSpent'}, kinds
        assert flight >= 300 and cap.spent >= cap.usd - worst and charged(p) > .8*cap.usd


def test_a_cap_that_teachers_threads_and_loops_share():
    with server('openai', limiter=generous(), delay_s=.05) as p, server('deepseek', limiter=generous()) as q:
        cap = Budget(6.)
        pairs = ('openai', p), ('deepseek', q)
        teachers = [teacher(f, s, price=SAME, budget=cap, max_tokens=60) for f, s in pairs]
        def ask(i):
            t = teachers[i % 2]
            for n in range(40):
                try: t.generate(f'{i} {n}') if i % 3 else asyncio.run(t.agenerate(f'{i} {n}'))
                except BudgetSpent: return
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join(60)
        assert not any(thread.is_alive() for thread in threads), 'somebody waits for ever'
        assert charged(p) + charged(q) <= cap.spent + 1e-6 <= cap.usd + 2e-6 and cap.spent > .9*cap.usd - .2
        for t in teachers: t.close()


def test_nobody_waits_for_money_that_cannot_come():
    "Where nothing is set aside, a reservation is granted or refused, whatever the rounding."
    rng = random.Random(0)
    for _ in range(20_000):
        cap, unit = Budget(1.), rng.choice([.1, .3, 1/3, .07])
        held = [unit*rng.random() for _ in range(3)]
        for usd in held: cap.reserve(usd)
        for usd in held: cap.settle(usd, usd*rng.choice([0, .5, 1]))
        cap.settle(0, round(1 - cap.spent - unit, 3))
        try: assert cap.reserve(1 - cap.spent), (cap.usd, cap.spent, cap.reserved)
        except BudgetSpent: pass


@pytest.mark.parametrize('family', ['vllm', 'sglang', 'openai-compatible', 'custom'])
def test_all_that_is_asked_is_counted(family):
    "Also what a teacher asks to make sure of itself."
    with server(family, limiter=generous()) as p, teacher(family, p, price=SAME, budget=9., max_tokens=8) as t:
        calls = [t.generate, t.get_logits] + [t.score]*(family in ('vllm', 'sglang')) + [t.probe]*(family != 'custom')
        for call in calls:
            call(*(() if call == t.probe else ('Tell me of the sun',)))
            assert charged(p) <= t.budget.spent + 1e-9, f'{call.__name__} cost more than is counted'
            assert t.stats.total + t.stats.retried == len(posts(p)), f'{call.__name__} sent more than is counted'


def test_what_cannot_be_paid_is_not_sent():
    with server('openai') as p, teacher('openai', p, price=SAME, budget=.01) as t:
        for call in (lambda: t.generate('Hello', max_tokens=100), lambda: t.get_logits('Hello', max_tokens=100)):
            with pytest.raises(BudgetSpent, match='raise the budget or lower max_tokens'): call()
        with pytest.raises(BadInput, match='max_tokens='): t.generate('Hello')
        assert not p.requests and t.budget.spent == t.budget.reserved == 0 and t.stats.failed == 3
        assert t.stats.usd == 0
    with server('vllm') as p, teacher('vllm', p, price=SAME, budget=.001) as t:
        with pytest.raises(BudgetSpent): t.score('Make the sun')
        assert not posts(p)
    for cap in (0, -1, float('nan')):
        with pytest.raises(BadInput): Budget(cap)


@pytest.mark.parametrize('family', FAMILIES)
def test_an_unknown_price_under_a_cap_is_an_error(family):
    with server(family) as p, create_teacher(family, 'claude-nobody-9', 'k', p.url, budget=5., max_tokens=5) as t:
        with pytest.raises(BadInput, match='set_price'): t.generate('Hello')
        with pytest.raises(BadInput, match='set_price'): t.estimate(['Hello'])
        assert not p.requests and t.manifest()['price'] is None
    with server(family) as p, teacher(family, p, price=SAME, budget=5., max_tokens=5) as t:
        assert t.generate('Hello').text and 0 < t.budget.spent < 1


def test_without_a_cap_an_unknown_price_is_not_zero():
    with server('vllm') as p, create_teacher('vllm', 'm', 'k', p.url) as t:
        assert t.generate('Hello').text and t.stats.usd is None
    with server('custom') as p, teacher('custom', p, price=SAME, max_tokens=9) as t:
        assert t.generate('Hello').text and t.stats.usd != 0, 'it tells no tokens: nobody knows what they cost'


def test_a_price_of_ones_own():
    with pytest.raises(BadInput): set_price('test-own', -1., 0.)
    for bad in ({'input': float('nan'), 'output': 1.}, {'input': 1., 'output': 1., 'cached_input': -1.}):
        with pytest.raises(BadInput): set_price('test-own', **bad)
    set_price('test-own', 2., 8., cached_input=.5, batch_input=1., batch_output=4.)
    found, usage = find_price('test-own'), Usage(1_000_000, 500_000, 400_000)
    assert found.usd(usage) == pytest.approx(.6*2 + .4*.5 + .5*8) and found.source == 'given by the user'
    assert found.usd(usage, batch=True) == pytest.approx(.6*1 + .4*.5 + .5*4)
    with server('vllm', model='test-own') as p, create_teacher('vllm', None, None, p.url, budget=1., max_tokens=8) as t:
        answer = t.generate('Hello')
        assert t.stats.usd == pytest.approx(found.usd(answer.usage)) == pytest.approx(t.budget.spent)


def test_listed_prices():
    for model in ('gpt-4o-mini', 'claude-haiku-4-5', 'deepseek-v4-flash'):
        found, fresh, reread = find_price(model), Usage(10_000, 1000), Usage(10_000, 1000, 9000)
        assert found.usd(fresh) == pytest.approx((10_000*found.input + 1000*found.output)/1e6)
        assert found.usd(reread) == pytest.approx(found.usd(fresh) - 9000*(found.input - found.cached_input)/1e6)
        assert found.as_of >= '2025' and 'genai-prices' in found.source
        if found.batch_input: assert found.usd(fresh, batch=True) == pytest.approx(.5*found.usd(fresh))
        else:
            with pytest.raises(BadInput, match='batch'): found.usd(fresh, batch=True)


@pytest.mark.parametrize('family, model, extra', [
    ('deepseek', 'deepseek-v4-flash', {}), ('openai', 'gpt-4o-mini', {}),
    ('anthropic', 'claude-haiku-4-5', {'cache_control': {'type': 'ephemeral'}})])
def test_what_the_provider_had_cached_is_cheaper(family, model, extra):
    listed = find_price(model)
    with server(family) as p, create_teacher(family, model, 'k', p.url, price=listed, max_tokens=8, extra=extra) as t:
        first, second = (t.generate('Tell me of the water. '*400) for _ in range(2))
        assert first.usage.cached_tokens == 0 < second.usage.cached_tokens <= second.usage.prompt_tokens
        assert first.usage.prompt_tokens == second.usage.prompt_tokens
        assert listed.usd(second.usage) < listed.usd(first.usage)
        assert t.stats.cached_tokens == second.usage.cached_tokens
        assert t.stats.usd == pytest.approx(listed.usd(first.usage) + listed.usd(second.usage))


def test_an_estimate_brackets_the_truth(tmp_path):
    prompts = [f'Tell me in a sentence what animal number {i} near the water may think of people.' for i in range(60)]
    with server('openai', limiter=generous()) as p, teacher('openai', p, price=SAME, max_tokens=40) as t:
        before = t.estimate(prompts)
        assert before.requests == 60 and before.low < before.high
        t.generate_batch(prompts[:25])
        after, so_far = t.estimate(prompts), charged(p)
        assert before.low <= after.low < after.high <= before.high, 'it does not narrow'
        found = collect(prompts, t, tmp_path/'a.db')
        truth = charged(p) - so_far
        assert before.low <= truth <= before.high and after.low <= truth <= after.high
        assert found.usd == pytest.approx(truth) and t.stats.usd == pytest.approx(charged(p))
        assert t.estimate(prompts, samples=3).high == pytest.approx(3*t.estimate(prompts).high)
    with server('openai') as p, teacher('openai', p, price=replace(SAME, batch_input=500., batch_output=500.)) as t:
        assert t.estimate(prompts, 40, batch=True).high == pytest.approx(.5*t.estimate(prompts, 40).high)
        with pytest.raises(BadInput, match='max_tokens='): t.estimate(prompts)
    shown = str(estimate_cost([as_messages(q) for q in prompts], find_price('gpt-4o-mini'), 40))
    assert '60 requests' in shown and 'USD' in shown and 'genai-prices' in shown


def test_live_cost_of_a_run(tmp_path):
    seen = []
    with server('openai', limiter=generous()) as p, teacher('openai', p, price=SAME, max_tokens=10) as t:
        collect([f'Question {i}' for i in range(12)], t, tmp_path/'a.db',
                on_event=lambda e: seen.append(e.metrics.get('usd')))
        assert seen[-1] == pytest.approx(charged(p)) and sorted(s or 0 for s in seen) == [s or 0 for s in seen]


def test_a_run_under_a_cap_keeps_what_was_paid(tmp_path):
    prompts = [f'Question {i}' for i in range(80)]
    with server('openai', limiter=generous(), answer_tokens=10) as p, \
            teacher('openai', p, price=SAME, max_tokens=10, budget=.8) as t:
        with pytest.raises(BudgetSpent): collect(prompts, t, tmp_path/'a.db', on_error='raise', keep_cut=True)
        part = collect(prompts, t, tmp_path/'a.db', keep_cut=True)
        assert part.stopped == 'budget' and 5 < len(part) < 80, part
        paid = charged(p)
        assert paid <= t.budget.spent + 1e-9 <= .8 + 1e-9
        t.budget = Budget(100.)
        found = collect(prompts, t, tmp_path/'a.db', keep_cut=True)
        assert found.from_cache == sum(r.status == 200 for r in p.requests) - found.asked > 5 and len(found) == 80


TERMS = '''
import sys; sys.path.insert(0, 'tests')
from families import *
for family in ('anthropic', 'anthropic', 'deepseek', 'openai-compatible'):
    with server(family) as p, teacher(family, p) as t:
        for _ in range(3): t.generate('Hello')
        print(family, t.manifest()['training_on_answers'], t.manifest()['terms'])
'''


def test_terms_are_shown_once_and_stand_in_the_manifest(tmp_path):
    done = subprocess.run([sys.executable, '-W', 'always', '-c', TERMS], capture_output=True, text=True, cwd=ROOT)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [['anthropic', 'restricted'], ['anthropic', 'restricted'],
                                            ['deepseek', 'allowed'], ['openai-compatible', 'unknown']]
    assert all(line[2].startswith('https://') for line in lines[:3])
    assert done.stderr.count('TermsNotice') == 1, done.stderr
    assert 'anthropic restrict' in done.stderr and lines[0][2] in done.stderr
    own = replace(SAME, training='restricted', terms='https://example.com/terms')
    with server('custom') as p, teacher('custom', p, price=own) as t, pytest.warns(UserWarning, match='example.com'):
        manifest = collect(['Hello'], t, tmp_path/'a.db').manifest
    assert (manifest['training_on_answers'], manifest['terms']) == ('restricted', 'https://example.com/terms')
    assert manifest['price']['input'] == 1000. and manifest['price']['source'] == 'given by the user'


def test_terms_of_two_models_at_one_address():
    free, bound = (replace(SAME, training=w, terms=f'https://example.com/{w}') for w in ('allowed', 'restricted'))
    with server('vllm', model='free') as p, create_teacher('vllm', 'free', None, p.url, price=free) as t:
        t.generate('Hello')
    with server('vllm', model='bound') as p, create_teacher('vllm', 'bound', None, p.url, price=bound) as t, \
            pytest.warns(UserWarning, match='example.com/restricted'): t.generate('Hello')


def test_attempts_that_may_have_been_charged_stay_counted():
    faults = [Fault('cut_json'), Fault('hang'), Fault('reset'), Fault('status', 400)]
    with server('openai', limiter=generous(), faults=faults) as p, \
            teacher('openai', p, price=SAME, max_tokens=10, budget=5., timeout=1, max_retries=0) as t:
        left = []
        for error in (BadReply, TimeoutError, ConnectionError, TeacherError):
            with pytest.raises(error): t.generate('Hello')
            left.append(t.budget.left)
        assert 5 > left[0] > left[1] > left[2] == left[3] and t.budget.reserved == pytest.approx(0, abs=1e-9)
        assert charged(p) <= t.budget.spent
        began = time.monotonic()
        assert t.generate('Hello').text and time.monotonic() - began < 5
