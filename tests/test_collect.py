"Collecting survives kill -9: no acknowledged answer is lost, none is asked twice."
import os
import random
import signal
import subprocess
import sys
from collections import Counter

from llm_distill import TeacherCache
from llm_distill.teachers.loopback import LoopbackProvider

WORKER = '''
import sys
from llm_distill import collect, create_teacher
url, db, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
teacher = create_teacher("openai-compatible", "m", base_url=url, cache_as="t", max_retries=0)
def acknowledge(event): print(event.done, flush=True)
answers = collect([f"Question {i}" for i in range(n)], teacher, db, logprobs=5, concurrency=4, on_event=acknowledge)
print("asked", answers.asked, "cached", answers.from_cache, flush=True)
'''


def start(url, db, n):
    return subprocess.Popen([sys.executable, '-c', WORKER, url, str(db), str(n)], stdout=subprocess.PIPE, text=True)


def test_kill_loses_nothing_acknowledged_and_asks_nothing_twice(tmp_path):
    n, db, moments = 60, tmp_path/'answers.db', random.Random(0)
    with LoopbackProvider(delay_s=.02) as provider:
        in_flight = 0
        for _ in range(3):
            worker, acknowledged = start(provider.url, db, n), 0
            until = moments.randrange(5, 14)
            first = None
            for line in worker.stdout:
                acknowledged = int(line)
                first = acknowledged if first is None else first
                if acknowledged >= first + until: break
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
            acknowledged = max([acknowledged, *(int(line) for line in worker.stdout if line.strip().isdigit())])
            in_flight += 4
            with TeacherCache(db) as cache: assert len(cache) >= acknowledged, 'an acknowledged answer is lost'
        with TeacherCache(db) as cache: kept = len(cache)
        before = Counter(r['messages'][-1]['content'] for r in provider.requests)
        out = start(provider.url, db, n).communicate()[0].splitlines()[-1]
        assert out == f'asked {n - kept} cached {kept}'
        assert start(provider.url, db, n).communicate()[0].splitlines()[-1] == f'asked 0 cached {n}'
        asked = Counter(r['messages'][-1]['content'] for r in provider.requests)
    assert len(asked) == n
    # Only what was on its way at a kill, and so never acknowledged, may have been asked again.
    assert sum(asked.values()) - n <= in_flight
    assert sum(before.values()) - kept <= in_flight
