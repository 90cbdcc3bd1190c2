"""Many clients, most of them rude: does the server stay up, flat and friendly?

    python tests/benchmarks/load.py --clients 200 --minutes 10

A server in a process of its own, clients in this one, and a third that asks after its health all the time, and after
that of a server that does nothing else, for a machine may be slow by itself. Ends with 1 where a status is not the one
that was due, an answer is left behind, memory grows, or health takes too long.
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
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import aiohttp
import psutil

KEY, LIMIT = 'the-key', 8_000_000
IDLE = '''
import asyncio
async def answer(reader, writer):
    try:
        while await reader.readuntil(b'\\r\\n\\r\\n'):
            writer.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok')
    except asyncio.IncompleteReadError: writer.close()
async def main():
    server = await asyncio.start_server(answer, '127.0.0.1', 0)
    print('%s:%s' % server.sockets[0].getsockname(), flush=True)
    await server.serve_forever()
asyncio.run(main())
'''
PROBE = '''
import http.client, json, sys, time
took = [[], []]
def open_to(place): return http.client.HTTPConnection(*place.split(':'), timeout=60)
def ask(connection, which):
    began = time.perf_counter()
    connection.request('GET', '/health')
    reply = connection.getresponse(); reply.read()
    took[which].append((1e3*(time.perf_counter() - began), reply.status))
kept = [open_to(place) for place in sys.argv[1:3]]
print('ready', flush=True)
until = time.monotonic() + float(sys.argv[3])
while time.monotonic() < until:
    for which in (0, 1):
        ask(kept[which], which)
        new = open_to(sys.argv[1 + which])
        ask(new, which); new.close()
    time.sleep(.1)
print(json.dumps(took))
'''


def tiny_model(folder: Path, seed: int = 0, **options) -> Path:
    "A Llama of random weights with a real tokenizer: small enough that all the work is the server's."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from llm_distill.models import load_tokenizer
    tokenizer = load_tokenizer('smollm2')
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
                 eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes | options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def figures(text: str) -> dict[str, float]:
    "What /metrics says, by name."
    rows = (line.rsplit(' ', 1) for line in text.splitlines() if not line.startswith('#'))
    return {name.removeprefix('llm_distill_'): float(value) for name, value in rows}


class Clients:
    "What clients do, each kind with the statuses that are due; 0 where they hang up themselves."
    def __init__(self, url: str, model: str, session, seed: int):
        self.root, self.model, self.session, self.random = url.removesuffix('/v1'), model, session, random.Random(seed)
        self.host, port = self.root.removeprefix('http://').split(':')
        self.port, self.seen, self.took, self.problems = int(port), defaultdict(Counter), defaultdict(list), []

    def chat(self, words=20, **more):
        text = ' '.join(self.random.choice(('rain', 'sun', 'owl', 'tea', 'run')) for _ in range(words))
        return {'model': self.model, 'messages': [{'role': 'user', 'content': text}],
                'max_tokens': self.random.randint(1, 48), **more}

    async def post(self, path, body=None, key=KEY, method='POST', **sent):
        headers = {'authorization': f'Bearer {key}', 'content-type': 'application/json'}
        sent = sent or {'data': json.dumps(body)}
        async with self.session.request(method, self.root + path, headers=headers, **sent) as reply:
            await reply.read()
            return reply.status

    async def stream(self, most=None, pause=0.):
        body = self.chat(stream=True, logprobs=True, top_logprobs=5, max_tokens=200, ignore_eos=True)
        headers = {'authorization': f'Bearer {KEY}'}
        async with self.session.post(f'{self.root}/v1/chat/completions', json=body, headers=headers) as reply:
            lines = 0
            async for _ in reply.content:
                lines += 1
                await asyncio.sleep(pause)
                if most and lines > most: reply.close(); return 0
            return reply.status

    async def raw(self, data: bytes, then, rest: bytes = b'') -> int:
        "Some bytes, something else to do, and away."
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            await then(reader, writer, rest)
        finally:
            with suppress(OSError): writer.transport.abort()
        return 0

    def head(self, length, path='/v1/chat/completions') -> bytes:
        return (f'POST {path} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {KEY}\r\n'
                f'Content-Length: {length}\r\n\r\n').encode()

    async def bytewise(self, reader, writer, rest):
        for at in range(30):
            if writer.is_closing(): return  # the server's patience was at its end
            writer.write(rest[at:at + 1])
            await asyncio.sleep(.1)

    async def by_byte(self, reader, writer, rest):
        for _ in range(30): await reader.read(1); await asyncio.sleep(.1)

    async def later(self, reader, writer, rest): await asyncio.sleep(self.random.random()*.05)

    async def _upload(self, n):
        with suppress(aiohttp.ClientConnectionError):
            for _ in range(n): yield b' '*65_536

    async def asks(self, path, **body): return await self.post(path, {'model': self.model, **body})
    async def talks(self, **more): return await self.post('/v1/chat/completions', self.chat(**more))
    async def sends(self, data, path='/v1/chat/completions'): return await self.post(path, data=data)

    async def begins(self, then, **body):
        data = json.dumps(self.chat(**body)).encode()
        return await self.raw(self.head(len(data)) + data, then)

    KINDS = {  # weight, statuses, what is done
        'chat': (30, {200, 429}, lambda c: c.talks()),
        'chat, logprobs': (5, {200, 429}, lambda c: c.talks(n=2, logprobs=True, top_logprobs=20)),
        'score': (5, {200, 429}, lambda c: c.asks('/v1/completions', prompt=['The cat sat on the mat. '*20]*2,
                                                  max_tokens=0, echo=True, logprobs=5)),
        'embed': (5, {200, 429}, lambda c: c.asks('/v1/embeddings', input=['rain '*60, 'sun']*4)),
        'logits': (1, {200, 429}, lambda c: c.post('/logits', {'input': 'a few words', 'encoding_format': 'base64'})),
        'schema': (3, {200, 429}, lambda c: c.talks(max_tokens=40, response_format={'type': 'json_object'})),
        'stream': (10, {200, 429}, lambda c: c.stream()),
        'gone in midstream': (8, {0, 429}, lambda c: c.stream(3)),
        'slow reader': (4, {0, 200, 429}, lambda c: c.stream(40, .1)),
        'slowest reader': (2, {0}, lambda c: c.begins(c.by_byte, stream=True, max_tokens=900, ignore_eos=True)),
        'slow writer': (2, {0}, lambda c: c.raw(c.head(200), c.bytewise, b'{"model": "' + b'x'*100)),
        'gone in the head': (2, {0}, lambda c: c.raw(c.head(9)[:40], c.later)),
        'gone in the body': (3, {0}, lambda c: c.raw(c.head(999) + b'{"model"', c.later)),
        'gone while read': (8, {0}, lambda c: c.begins(c.later, words=700, max_tokens=200)),
        'too long': (1, {413}, lambda c: c.sends(b' '*(LIMIT + 1))),
        'too long, chunked': (1, {413}, lambda c: c.sends(c._upload(LIMIT//65_536 + 2))),
        'long text': (1, {400}, lambda c: c.asks('/v1/completions', prompt='word '*1_500_000)),
        'many objects': (1, {400}, lambda c: c.sends(b'{"messages":[' + b'{},'*999_999 + b'{}]}')),
        'some objects': (1, {400}, lambda c: c.sends(b'{"messages":[' + b'{},'*99_999 + b'{}]}')),
        'many numbers': (1, {400}, lambda c: c.asks('/v1/completions', prompt=[7]*1_500_000)),
        'no JSON': (3, {400}, lambda c: c.sends(b'{"model": ')),
        'no UTF-8': (3, {400}, lambda c: c.sends(b'{"model": "\xff\xfe"}')),
        'deep': (2, {400}, lambda c: c.sends(b'{"messages":' + b'['*60_000 + b']'*60_000 + b'}')),
        'wrong key': (4, {401}, lambda c: c.post('/v1/chat/completions', c.chat(), key='the-ke')),
        'no such route': (2, {404}, lambda c: c.asks('/v1/nothing')),
        'no such method': (2, {405}, lambda c: c.post('/v1/chat/completions', {}, method='DELETE')),
        'no such model': (2, {404}, lambda c: c.talks(model='x'*10_000)),
        'huge n': (2, {400}, lambda c: c.talks(n=10**9)),
        'many prompts': (1, {400}, lambda c: c.asks('/v1/completions', prompt=['a']*100_000)),
        'models': (3, {200}, lambda c: c.post('/v1/models', method='GET')),
        'metrics': (1, {200}, lambda c: c.post('/metrics', method='GET'))}

    async def one(self, until: float):
        kinds, weights = zip(*((k, w) for k, (w, _, _) in self.KINDS.items()))
        while time.monotonic() < until: await self.do(*self.random.choices(kinds, weights))

    async def do(self, kind: str):
        began = time.monotonic()
        try: status = await asyncio.wait_for(self.KINDS[kind][2](self), 120)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, EOFError) as e: status = type(e).__name__
        self.seen[kind][status] += 1
        self.took[kind].append(time.monotonic() - began)
        if status not in self.KINDS[kind][1]: self.problems.append((kind, status))


async def _watch(server, until: float, sizes: list):
    process = psutil.Process(server.process.pid)
    while time.monotonic() < until:
        sizes.append(process.memory_info().rss/2**20)
        await asyncio.sleep(min(1., max(until - time.monotonic(), .01)))


async def _at_the_end(session, root: str, seconds: float = 30) -> dict:
    "Figures when nothing is left to do, or when it took too long."
    until = time.monotonic() + seconds
    while True:
        async with session.get(f'{root}/metrics', headers={'authorization': f'Bearer {KEY}'}) as reply:
            now = figures(await reply.text())
        if not any(now[k] for k in ('running', 'waiting', 'tokens')) or time.monotonic() > until: return now
        await asyncio.sleep(.05)


async def _load(server, model: str, clients: int, seconds: float) -> dict:
    root = server.url.removesuffix('/v1')
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=60)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        who = [Clients(server.url, model, session, i) for i in range(clients)]
        for kind in Clients.KINDS: await who[0].do(kind)  # each at least once, and the first seconds are not counted
        def start(*words): return subprocess.Popen([sys.executable, '-c', *words], stdout=subprocess.PIPE, text=True)
        idle = start(IDLE)
        probe = start(PROBE, root.removeprefix('http://'), idle.stdout.readline().strip(), str(seconds))
        assert probe.stdout.readline().strip() == 'ready'
        sizes = []
        until = time.monotonic() + seconds
        await asyncio.gather(_watch(server, until, sizes), *(c.one(until) for c in who))
        health, machine = json.loads((await asyncio.to_thread(probe.communicate))[0])
        idle.kill(); idle.communicate()
        end = await _at_the_end(session, root)
    seen, took = defaultdict(Counter), defaultdict(list)
    for c in who:
        for kind in c.seen: seen[kind] += c.seen[kind]; took[kind] += c.took[kind]
    return {'clients': clients, 'seconds': seconds, 'seen': seen, 'took': took, 'rss': sizes, 'end': end,
            'health': health, 'machine': machine, 'problems': [p for c in who for p in c.problems]}


def run_load(model: str, clients: int = 200, seconds: float = 600, **options) -> dict:
    "What happened, by kind; `complaints` says what of it must not."
    from llm_distill import serve
    with serve(model, device='cpu', name='m', api_keys=[KEY], patience=10, **options) as server:
        report = asyncio.run(_load(server, 'm', clients, seconds))
        report['log'] = server.log.read_text(errors='replace')
    return report


def complaints(report: dict, most_ms: float|None = None) -> list[str]:
    out = [f'{kind}: {status}' for kind, status in sorted(set(report['problems']), key=str)]
    end, rss = report['end'], report['rss']
    out += [f'{n:.0f} times {name}' for name, n in end.items() if name.startswith('http_responses_total{status="5')]
    left = 'running', 'waiting', 'tokens', 'errors_total'
    out += [f'{name} is {end[name]:.0f} at the end' for name in left if end[name]]
    if any(status != 200 for _, status in report['health']): out.append('not always healthy')
    worst = max(ms for ms, _ in report['health'])
    if most_ms and worst > most_ms: out.append(f'health took {worst:.0f} ms')
    if len(rss) >= 20:
        first, second = statistics.median(rss[len(rss)//5:len(rss)//2]), statistics.median(rss[-len(rss)//4:])
        if second > 1.05*first + 32: out.append(f'memory grew from {first:.0f} to {second:.0f} MiB')
    if 'Traceback' in report['log']: out.append('tracebacks in the log')
    if KEY in report['log']: out.append('a key in the log')
    return out


def _at(values, share): return sorted(values)[min(int(share*len(values)), len(values) - 1)] if values else float('nan')


def show(report: dict):
    print(f'{report["clients"]} clients, {report["seconds"]:.0f} s\n')
    print('| what | statuses (0: hung up) | median s | p99 s |')
    print('|---|---|---|---|')
    for kind in Clients.KINDS:
        counts = ', '.join(f'{s}: {n:,}' for s, n in sorted(report['seen'][kind].items(), key=str))
        print(f'| {kind} | {counts} | {_at(report["took"][kind], .5):.2f} | {_at(report["took"][kind], .99):.2f} |')
    ms, rss, end = [ms for ms, _ in report['health']], report['rss'], report['end']
    bare = [ms for ms, _ in report['machine']]
    total = sum(sum(counts.values()) for counts in report['seen'].values())
    print(f'\n{total:,} requests. /health, {len(ms):,} times: median {_at(ms, .5):.1f} ms, p99 {_at(ms, .99):.1f}, '
          f'most {max(ms):.1f}')
    print(f'a server that does nothing else: median {_at(bare, .5):.1f} ms, p99 {_at(bare, .99):.1f}, '
          f'most {max(bare):.1f}')
    print('memory, MiB: ' + ', '.join(f'{rss[i]:.0f}' for i in range(0, len(rss), max(1, len(rss)//12))))
    always = 'running', 'waiting', 'tokens'
    print('at the end: ' + ', '.join(f'{name} {n:,.0f}' for name, n in end.items() if n or name in always))


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--clients', type=int, default=200)
    args.add_argument('--minutes', type=float, default=10.)
    args.add_argument('--model', help='a folder or "smollm2"; a tiny random model if not given')
    args.add_argument('--most-ms', type=float, default=100., help='the longest that /health may take')
    args.add_argument('--json', action='store_true')
    args = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run_load(args.model or str(tiny_model(Path(folder))), args.clients, 60*args.minutes)
    found = complaints(report, args.most_ms)
    if args.json: print(json.dumps(report | {'complaints': found}))
    else: show(report); print('\n'.join(found) or 'nothing to complain about')
    if found and report['log']: print(report['log'][-3000:], file=sys.stderr)
    sys.exit(bool(found))


if __name__ == '__main__': main()
