"Tens of thousands of prompts, a provider that fails in every way and is restarted: each is answered and paid once."
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from llm_distill import Price, TeacherCache, collect, create_teacher
from servers import free_port

PRICE = Price('gpt-4o', None, 2.5, 10.)
LEAN = Path(__file__).with_name('servers')/'lean.py'


class Lean:
    "The server in a process of its own, at one port over all restarts."
    def __init__(self, account: Path, *more: str):
        self.port, self.account, self.starts, self.counts = free_port(), account, 0, Counter()
        self.more = more
        self.start()

    def start(self):
        self.starts += 1
        words = sys.executable, LEAN, self.port, self.account, self.starts, *self.more
        self.process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == 'ready\n'

    def stop(self):
        self.process.terminate()
        self.counts.update(json.loads(self.process.communicate()[0]))

    def restart(self):
        self.stop()
        time.sleep(1)  # connections are refused
        self.start()


def soak(n: int, folder: Path) -> str:
    "Collect, look at everything, and tell the figures."
    lean, done = Lean(folder/'account'), [0]
    prompts = [f'Question {i} of {n}: what does the animal near the water say?{" " + "so"*(i % 30)}' for i in range(n)]
    def restarts():
        for part in (n//3, 2*n//3):
            while done[0] < part: time.sleep(.01)
            lean.restart()
    def see(event): done[0] = event.done
    threading.Thread(target=restarts, daemon=True).start()
    with create_teacher('openai', 'gpt-4o', 'k', f'http://127.0.0.1:{lean.port}/v1', price=PRICE, timeout=5,
                        retry_delay=.5) as t:
        began = time.monotonic()
        # A slow machine adds timeouts of its own, and what counts here is that each prompt is paid once
        found = collect(prompts, t, folder/'a.db', concurrency=128, on_event=see, second_tries=6)
        seconds = time.monotonic() - began
        lean.stop()
    account = [json.loads(line) for line in lean.account.open()]
    said, asked = {q: f'{number}: {q}' for q, number, _, _ in account}, Counter(q for q, *_ in account)
    owed = sum(into*PRICE.input + out*PRICE.output for _, _, into, out in account)/1e6
    sent = lean.counts['requests']
    figures = (f'{n} prompts, {sent} requests in {seconds:.1f} s ({sent/seconds:.0f}/s), '
               f'{t.stats.retried} retried, {found.usd:.6f} USD, {owed:.6f} owed, {dict(lean.counts)}, {t.rate}')
    print(figures)
    assert lean.starts == 3 and found.stopped is None and len(found) == n and not found.errors, found.tally.errors
    assert not [q for q, times in asked.items() if times > 1], 'what was answered whole was asked again'
    assert set(asked) == set(prompts) and all(a.text == said[q] for a, q in zip(found, prompts))
    with TeacherCache(folder/'a.db') as c:
        assert c.read('select count(*), count(distinct key) from answer')[0] == (n, n)
        assert sum(kept.completion.text == said[kept.query.messages()[-1]['content']] for kept in c) == n
    assert found.usd == pytest.approx(owed, abs=1e-6) and t.stats.usd == pytest.approx(owed, abs=1e-6)
    return figures


def test_stray_refusals_of_a_provider_that_tells_no_limits(tmp_path):
    "1 in 20 requests is refused, however few they are."
    lean, stop = Lean(tmp_path/'account', 'silent'), threading.Event()
    threading.Timer(12, stop.set).start()
    with create_teacher('openai', 'gpt-4o', 'k', f'http://127.0.0.1:{lean.port}/v1', price=PRICE, timeout=5,
                        retry_delay=.5) as t:
        found = collect([f'Question {i}' for i in range(600)], t, tmp_path/'a.db', stop=stop)
    lean.stop()
    assert len(found) > 300, f'{len(found)} answers in 12 s: {t.rate}'


@pytest.mark.slow
def test_two_thousand_prompts(tmp_path): soak(2000, tmp_path)


@pytest.mark.slow
def test_fifty_thousand_prompts(tmp_path): soak(int(os.environ.get('LLMD_SOAK', 50_000)), tmp_path)
