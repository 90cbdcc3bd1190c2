"""Many clients watch a few jobs train: does anybody miss anything?

    python tests/benchmarks/tuning.py --clients 200 --jobs 4

A service in a process of its own, its workers in theirs, all clients in this one: half of them follow a job's events
over one connection, a quarter follow and hang up every few events, a quarter poll. Ends with 1 where a request failed,
or where a follower did not hear each event of its job once and in order.
"""
import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import small
from llm_distill.demo import demo_prompts
from llm_distill.tables import write_jsonl
from llm_distill.tuning.aclient import AsyncTuningClient
from llm_distill.tuning.errors import TuningError

RUN = '''
import json, sys
from llm_distill.tuning.process import run_tunings
run_tunings(on_ready=lambda url: print(url, flush=True), **json.loads(sys.argv[1]))
'''


def material(folder):
    "A model that may be trained, and a file to learn from."
    tokenizer = small.byte_tokenizer()
    small.llama(tokenizer).save_pretrained(folder/'models'/'tiny')
    tokenizer.save_pretrained(folder/'models'/'tiny')
    rows = [{'prompt': f'Ask on {p["topic"]}.', 'completion': p['prompt']} for p in demo_prompts()]
    write_jsonl(folder/'questions.jsonl', rows)
    return folder/'questions.jsonl'


class Crowd:
    def __init__(self, client): self.client, self.failed, self.took, self.heard, self.hung_up = client, [], [], [], 0

    async def safely(self, work):
        try: await work
        except (TuningError, OSError) as e: self.failed.append(f'{type(e).__name__}: {e}')

    async def poll(self, id):
        while True:
            began = time.perf_counter()
            job = await self.client.tunings.retrieve(id)
            self.took.append(1e3*(time.perf_counter() - began))
            if job.is_finished: return
            await asyncio.sleep(random.uniform(.2, .8))

    async def follow(self, id):
        self.heard.append((id, [e.id async for e in self.client.tunings.stream_logs(id)]))

    async def follow_in_pieces(self, id):
        ids, whole = [], False
        while not whole:
            stream, most = self.client.tunings.stream_logs(id, after=ids[-1] if ids else 0), random.randint(3, 30)
            async for event in stream:
                ids.append(event.id)
                most -= 1
                if not most: self.hung_up += 1; break
            else: whole = True
            await stream.aclose()
        self.heard.append((id, ids))

    async def health(self):
        took = []
        try:
            while True:
                began = time.perf_counter()
                await self.client.health()
                took.append(1e3*(time.perf_counter() - began))
                await asyncio.sleep(.1)
        except asyncio.CancelledError: return took


async def run(url, file, args):
    async with AsyncTuningClient('the-key', url) as client:
        crowd, sent = Crowd(client), await client.files.upload(file)
        numbers = {'max_steps': args.steps, 'precision': 'float32', 'save_steps': args.steps//2}
        jobs = [(await client.tunings.create('tiny', sent, hyperparameters=numbers)).id for _ in range(args.jobs)]
        kinds = [crowd.follow, crowd.follow, crowd.follow_in_pieces, crowd.poll]
        watch, began = asyncio.create_task(crowd.health()), time.perf_counter()
        await asyncio.gather(*(crowd.safely(kinds[i % 4](jobs[(i//4) % len(jobs)])) for i in range(args.clients)))
        watch.cancel()
        told = {}
        for id in jobs: told[id] = [e.id async for e in client.tunings.events(id)]
        states = [(await client.tunings.retrieve(id)).status for id in jobs]
        return crowd, told, states, await watch, time.perf_counter() - began


def spread(times):
    found = statistics.median(times), sorted(times)[int(.99*len(times))], max(times)
    return ' / '.join(f'{t:.1f}' for t in found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--clients', type=int, default=200)
    parser.add_argument('--jobs', type=int, default=4)
    parser.add_argument('--steps', type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        file = material(Path(temp))
        options = {'home': f'{temp}/home', 'port': 0, 'models': f'{temp}/models', 'api_keys': ['the-key'],
                   'max_jobs': args.jobs, 'per_minute': 0}
        service = subprocess.Popen([sys.executable, '-c', RUN, json.dumps(options)], stdout=subprocess.PIPE, text=True)
        try: crowd, told, states, health, seconds = asyncio.run(run(service.stdout.readline().strip(), file, args))
        finally: service.terminate(); service.wait(30)
    wrong = sum(ids != told[id] for id, ids in crowd.heard)
    gaps = sum(ids != list(range(1, len(ids) + 1)) for ids in told.values())
    print(f'{args.clients} clients, {args.jobs} jobs of {args.steps} steps: {seconds:.0f} s, jobs {", ".join(states)}')
    print(f'  events of the jobs            {", ".join(str(len(ids)) for ids in told.values())}')
    print(f'  heard by followers            {sum(len(ids) for _, ids in crowd.heard):,}, {crowd.hung_up} times hung up')
    print(f'  followers that missed some    {wrong} of {len(crowd.heard)}')
    print(f'  requests that failed          {len(crowd.failed)} {crowd.failed[:3] or ""}')
    print(f'  a poll, ms: median / 99 % / most    {spread(crowd.took)}   ({len(crowd.took):,} polls)')
    print(f'  health, ms: median / 99 % / most    {spread(health)}')
    bad = wrong or gaps or crowd.failed or set(states) != {'succeeded'}
    return int(bool(bad))


if __name__ == '__main__': sys.exit(main())
