"""Asking a server many prompts: `collect` against the official SDK, LangChain, distilabel and curator.

The server, on loopback, takes 200 ms over each answer; each client works in a process of its own. Ours writes every
answer to a fresh SQLite file, and curator to its own files; the SDK, LangChain and distilabel only hold them in memory.
    python tests/benchmarks/collect.py [--json] [--quick] [--rounds 2] [--peers-python PATH]
"""
import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import math
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

LATENCY, TOKENS, TOP, REPLIES, VOCAB = .2, 64, 20, 300, 30_000
PACKAGES = {'ours': 'llm_distill', 'sdk': 'openai', 'langchain': 'langchain-openai', 'distilabel': 'distilabel',
            'curator': 'bespokelabs-curator'}
QUIET = {'TELEMETRY_ENABLED': 'false', 'CURATOR_VIEWER': '0', 'HOSTED_CURATOR_VIEWER': '0', 'HF_HUB_OFFLINE': '1',
         'CURATOR_DISABLE_RICH_DISPLAY': '1', 'LANGSMITH_TRACING': 'false', 'TOKENIZERS_PARALLELISM': 'false'}


# The server -----------------------------------------------------------------------------------------------------------
def words(rng, weights, n) -> list[str]: # Distinct; the frequent ones are short, as in real vocabularies
    found = {}
    while len(found) < n: found |= dict.fromkeys(rng.choices(range(VOCAB), cum_weights=weights, k=n))
    return [f' tok{i}' for i in list(found)[:n]]


def entry(token, logprob) -> dict:
    return {'token': token, 'bytes': list(token.encode()), 'logprob': float(f'{logprob:.8g}')}


def place(rng, weights) -> dict: # One token with its most probable alternatives, which hold 90 to 99 % of the mass
    tokens, mass, spread = words(rng, weights, TOP + 1), rng.uniform(.9, .99), rng.uniform(1, 4)
    logits = sorted((rng.gauss(0, spread) for _ in range(TOP)), reverse=True)
    shift = math.log(mass/sum(math.exp(x) for x in logits))
    logprobs = [x + shift for x in logits]
    logprobs.append(min(logprobs[-1], math.log(1 - mass)) - rng.random())  # for a token beyond those listed
    drawn = rng.choices(range(TOP + 1), [*map(math.exp, logprobs[:TOP]), 1 - mass])[0]
    entries = [*map(entry, tokens, logprobs)]
    return {**entries[drawn], 'top_logprobs': entries[:TOP]}


def reply(number, text, places) -> bytes:
    choice = {'index': 0, 'message': {'role': 'assistant', 'content': text, 'refusal': None}, 'finish_reason': 'stop',
              'logprobs': places and {'content': places, 'refusal': None}}
    usage = {'prompt_tokens': 20, 'completion_tokens': TOKENS, 'total_tokens': 20 + TOKENS}
    return json.dumps({'id': f'chatcmpl-{number}', 'object': 'chat.completion', 'created': 1, 'model': 'm',
                       'choices': [choice], 'usage': usage}).encode()


def replies() -> tuple[list[bytes], list[bytes]]: # Text of 1 KB, and tokens with logprobs
    rng = random.Random(0)
    weights = list(itertools.accumulate(1/rank for rank in range(1, VOCAB + 1)))
    plain, rich = [], []
    for i in range(REPLIES):
        plain.append(reply(i, ''.join(words(rng, weights, 200))[:700], None))
        places = [place(rng, weights) for _ in range(TOKENS)]
        rich.append(reply(i, ''.join(p['token'] for p in places), places))
    return plain, rich


class Clock:
    "Waits that last `LATENCY` on average; a plain sleep lasts up to 10 ms longer on a shared machine."
    def __init__(self): self.late, self.waited, self.waits = 0., 0., 0

    async def wait(self):
        began = time.perf_counter()
        await asyncio.sleep(LATENCY - self.late)
        took = time.perf_counter() - began
        self.late = min(LATENCY/4, max(0., self.late + (took - LATENCY)/50))
        self.waited, self.waits = self.waited + took, self.waits + 1


def make_app():
    (plain, rich), clock = replies(), Clock()
    limits = [(f'x-ratelimit-{word}-{kind}'.encode(), value) for kind in ('requests', 'tokens')
              for word, value in (('limit', b'100000000'), ('remaining', b'99999999'), ('reset', b'6ms'))]
    async def app(scope, receive, send):
        if scope['type'] != 'http': return
        body, more = b'', True
        while more:
            part = await receive()
            body, more = body + part.get('body', b''), part.get('more_body')
        data = json.dumps([time.process_time(), clock.waited, clock.waits]).encode()
        if scope['method'] == 'POST':
            asked = json.loads(body)
            which = zlib.crc32(json.dumps(asked.get('messages')).encode()) % REPLIES
            data = (rich if asked.get('logprobs') else plain)[which]
            await clock.wait()
        headers = [(b'content-type', b'application/json'), (b'content-length', str(len(data)).encode()), *limits]
        await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
        await send({'type': 'http.response.body', 'body': data})
    return app


def serve(port) -> None:
    import uvicorn
    prepare(core=1)
    uvicorn.run(make_app(), port=port, log_level='error', access_log=False, timeout_keep_alive=120)


# The clients, each one run in a process of its own --------------------------------------------------------------------
# A generator that stops three times: ready to ask, when all answers are there, and with the number of good ones.
def run_ours(url, prompts, concurrency, logprobs, folder):
    from llm_distill import collect, create_teacher
    teacher = create_teacher('openai-compatible', 'm', base_url=url, timeout=120, max_retries=0)
    more = {'logprobs': TOP} if logprobs else {}
    yield
    answers = collect(iter(prompts), teacher, Path(folder)/'answers.db', concurrency=concurrency, max_tokens=TOKENS,
                      **more)
    yield
    yield sum(bool(a.text and (a.completion.logprobs is not None) == logprobs) for a in answers)


def run_sdk(url, prompts, concurrency, logprobs, folder):
    import openai
    limits = type(openai.DEFAULT_CONNECTION_LIMITS)(max_connections=concurrency, max_keepalive_connections=concurrency)
    client = openai.DefaultAsyncHttpxClient(trust_env=False, limits=limits, timeout=120)
    sdk = openai.AsyncOpenAI(base_url=url, api_key='x', max_retries=0, http_client=client)
    more = {'logprobs': True, 'top_logprobs': TOP} if logprobs else {}
    async def ask_all():
        turn = asyncio.Semaphore(concurrency)
        async def ask(prompt):
            async with turn:
                return await sdk.chat.completions.create(model='m', messages=[{'role': 'user', 'content': prompt}],
                                                         max_tokens=TOKENS, **more)
        return await asyncio.gather(*map(ask, prompts))
    yield
    answers = asyncio.run(ask_all())
    yield
    yield sum(bool(c.message.content and bool(c.logprobs) == logprobs) for a in answers for c in a.choices)


def run_langchain(url, prompts, concurrency, logprobs, folder):
    from langchain_openai import ChatOpenAI
    more = {'logprobs': True, 'top_logprobs': TOP} if logprobs else {}
    chat = ChatOpenAI(model='m', base_url=url, api_key='x', max_tokens=TOKENS, max_retries=0, timeout=120, **more)
    yield
    answers = chat.batch(prompts, config={'max_concurrency': concurrency})
    yield
    yield sum(bool(a.content and bool(a.response_metadata.get('logprobs')) == logprobs) for a in answers)


def run_distilabel(url, prompts, concurrency, logprobs, folder): # Without a pipeline, whose processes come on top
    from distilabel.models import OpenAILLM
    llm = OpenAILLM(model='m', base_url=url, api_key='x', max_retries=0, timeout=120)
    llm.load()
    yield
    answers = []
    for i in range(0, len(prompts), concurrency):  # it asks a whole batch at once
        batch = [[{'role': 'user', 'content': p}] for p in prompts[i:i + concurrency]]
        answers += llm.generate(inputs=batch, max_new_tokens=TOKENS)
    yield
    yield sum(bool(a['generations'][0]) for a in answers)


def run_curator(url, prompts, concurrency, logprobs, folder):
    with contextlib.suppress(ImportError): # litellm has the tokenizer's file; without it curator needs a network
        import litellm.litellm_core_utils.default_encoding  # noqa: F401
    from bespokelabs import curator
    limits = {'max_requests_per_minute': 10**8, 'max_tokens_per_minute': 10**10}
    params = {'base_url': url, 'api_key': 'x', 'max_concurrent_requests': concurrency, 'max_retries': 0,
              'request_timeout': 120, **limits}
    llm = curator.LLM(model_name='m', backend='openai', backend_params=params,
                      generation_params={'max_tokens': TOKENS})
    yield
    found = llm(prompts, working_dir=str(folder))
    yield
    yield sum(bool(row['response']) for row in getattr(found, 'dataset', found))


def used() -> tuple[float, float]: # CPU seconds, and the highest memory in MB
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    unit = 1e6 if sys.platform == 'darwin' else 1e3
    return sum(u.ru_utime + u.ru_stime for u in both), max(u.ru_maxrss for u in both)/unit


def prepare(core) -> None: # A core of its own, where there are two, and as many sockets as the system lets us have
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    if len(cores) > 1: os.sched_setaffinity(0, {cores[core]})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError): resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_client(name, url, requests, concurrency, logprobs) -> None:
    prepare(core=0)
    prompts = [f'Question {i}: why is the sky blue?' for i in range(requests)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(HF_HOME=folder, XDG_CACHE_HOME=folder)
        client = globals()[f'run_{name}'](url, prompts, concurrency, logprobs, folder)
        next(client)
        cpu, started = used()[0], time.perf_counter()
        next(client)
        wall, (after, peak) = time.perf_counter() - started, used()
        answers = next(client)
        disk = sum(f.stat().st_size for f in Path(folder).glob('answers.db*'))
    if answers != requests: raise SystemExit(f'{answers} of {requests} prompts have an answer')
    ideal = requests/(math.ceil(requests/concurrency)*LATENCY)
    found = {'requests': requests, 'rate': requests/wall, 'ideal_ratio': requests/wall/ideal, 'seconds': wall,
             'cpu_ms': (after - cpu)/requests*1e3, 'peak_mb': peak}
    if name == 'ours' and logprobs: found['bytes_per_token'] = disk/requests/TOKENS
    print(json.dumps(found), flush=True)


# The benchmark --------------------------------------------------------------------------------------------------------
PROBE = '''
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
'''


def installed(python) -> dict:
    names = [*PACKAGES.values(), 'openai', 'litellm', 'uvicorn', 'uvloop', 'httptools']
    done = subprocess.run([python, '-c', PROBE, *names], capture_output=True, text=True, check=True)
    return {k: v for k, v in json.loads(done.stdout).items() if v}


def child(python, *args, **pipes) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith('_proxy')} | QUIET
    return subprocess.Popen([python, __file__, *map(str, args)], env=env, text=True, **pipes)


def start_server(pythons) -> tuple[subprocess.Popen, int, str]:
    able = [p for p in pythons if 'uvicorn' in pythons[p]]
    if not able: raise SystemExit('the server needs uvicorn (and is faster with uvloop and httptools)')
    python = max(able, key=lambda p: len({'uvloop', 'httptools'} & set(pythons[p])))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = child(python, '--serve', port)
    for _ in range(1200):
        try: socket.create_connection(('127.0.0.1', port)).close()
        except OSError: time.sleep(.05)
        else: return server, port, '+'.join(k for k in ('uvicorn', 'httptools', 'uvloop') if k in pythons[python])
        if server.poll() is not None: break
    server.kill()
    server.wait()
    raise SystemExit('the server did not start')


def server_state(port) -> list: # CPU seconds, seconds waited over answers, and answers
    link = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    link.request('GET', '/')
    try: return json.loads(link.getresponse().read())
    finally: link.close()


def measure(python, name, port, setting, requests, limit) -> dict|str:
    concurrency, logprobs = setting
    before = server_state(port)
    job = [name, f'http://127.0.0.1:{port}/v1', requests, concurrency, logprobs]
    client = child(python, '--client', json.dumps(job), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try: out, err = client.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        client.kill()
        client.communicate()
        return f'failed: not done after {limit} s'
    if client.returncode: return 'failed: ' + (err.strip().splitlines() or [f'status {client.returncode}'])[-1][:160]
    found = json.loads(out.splitlines()[-1])
    cpu, waited, waits = (b - a for a, b in zip(before, server_state(port)))
    found |= {'server_busy': cpu/found['seconds'], 'latency_ms': waited/waits*1e3}
    return found


def best(runs) -> dict|str: # The fastest; a failure only where all have failed
    return max((r for r in runs if isinstance(r, dict)), key=lambda r: r['rate'], default=runs[0])


def compare(port, clients, settings, args) -> dict:
    results = {name: {} for name in clients}
    for label, (setting, requests) in settings.items():
        ask = lambda name, n, setting=setting: measure(clients[name], name, port, setting, n, args.limit)
        turns = [name for name in ('sdk', 'ours') if name in clients]
        rounds = [{name: ask(name, requests) for name in turns} for _ in range(args.rounds)]
        for name in turns: results[name][label] = best([r[name] for r in rounds])
        few = max(requests//4, min(requests, setting[0]*4))
        for name in clients:
            if name in turns or setting[1] and name != 'langchain': continue
            results[name][label] = ask(name, few)
    return results


def ratio(results, ours, theirs, figure='rate'):
    a, b = (results.get(name, {}).get(label) for name, label in (ours, theirs))
    return a[figure]/b[figure] if isinstance(a, dict) and isinstance(b, dict) else None


def summary(results, versions, server, rich) -> dict:
    ours = results.pop('ours')
    if failed := [r for r in ours.values() if isinstance(r, str)]: raise SystemExit(failed[0])
    both = {'ours': ours, **results}
    found = {f'ideal_ratio_{c}': ours[f'text_{c}']['ideal_ratio'] for c in (64, 512)}
    found['vs_sdk_512'] = ratio(both, ('ours', 'text_512'), ('sdk', 'text_512'))
    for name in ('sdk', 'langchain'): found[f'vs_{name}_logprobs'] = ratio(both, ('ours', rich), (name, rich))
    found |= {'bytes_per_token': ours[rich]['bytes_per_token'], 'peak_mb': max(r['peak_mb'] for r in ours.values())}
    peers = {name: {'versions': versions[name], **results[name]} if name in results else
             'left out' if name in versions else 'not installed' for name in PACKAGES if name != 'ours'}
    return rounded({**found, 'server': server, 'ours': {'versions': versions['ours'], **ours}, 'peers': peers})


def rounded(found):
    if isinstance(found, dict): return {k: rounded(v) for k, v in found.items()}
    return round(found, 4) if isinstance(found, float) else found


def show(found, settings) -> None:
    print(f'{"":12} {"":12} {"requests/s":>10} {"of ideal":>9} {"CPU/request":>12} {"peak":>8} {"server: busy":>13} '
          f'{"latency":>11}')
    for label in settings:
        for name, results in {'ours': found['ours'], **found['peers']}.items():
            r = results if isinstance(results, str) else results.get(label)
            if isinstance(r, str): print(f'{label:12} {name:12} {r}')
            if isinstance(r, dict): print(f'{label:12} {name:12} {r["rate"]:10.0f} {r["ideal_ratio"]:8.0%} '
                                          f'{r["cpu_ms"]:9.2f} ms {r["peak_mb"]:5.0f} MB {r["server_busy"]:12.0%} '
                                          f'{r["latency_ms"]:8.1f} ms')
    for key in ('vs_sdk_512', 'vs_sdk_logprobs', 'vs_langchain_logprobs'):
        print(f'{key}: {found[key]:.2f}x' if found[key] else f'{key}: unknown')
    print(f'on disk: {found["bytes_per_token"]:.1f} bytes per token with its top {TOP}; server: {found["server"]}')


def parse():
    epilog = ('Asking fewer will do: the rate is what counts. Peers other than the SDK are asked a quarter as many, '
              'but four times what is in flight at least.')
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog)
    parser.add_argument('--json', action='store_true', help='print JSON alone')
    parser.add_argument('--quick', action='store_true', help='a fifth of the requests')
    parser.add_argument('--rounds', type=int, default=2, help='of the SDK and ours in turns; the best of each counts')
    parser.add_argument('--peers-python', action='append', default=[], metavar='PATH', help='an interpreter with peers '
                        'in its environment; may be repeated, and the first that has a peer runs it')
    for name, default, what in (('text-64', 8000, 'text, 64 in flight'), ('text-512', 10_000, 'text, 512 in flight'),
                                ('logprobs', 1500, f'{TOKENS} tokens with their top {TOP}')):
        parser.add_argument(f'--{name}', type=int, default=default, metavar='N', help=f'requests: {what}')
    parser.add_argument('--logprobs-concurrency', type=int, default=512, metavar='C', help='in flight with logprobs')
    parser.add_argument('--clients', default=','.join(PACKAGES), help='which to run (ours always runs)')
    parser.add_argument('--limit', type=int, default=600, help='seconds a client may take over one setting')
    for hidden in ('--serve', '--client'): parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.serve: return serve(int(args.serve))
    if args.client: return run_client(*json.loads(args.client))
    pythons = {p: installed(p) for p in [*args.peers_python, sys.executable]}
    # Ours and the SDK share an environment where they can
    homes = {name: next((p for p in ([sys.executable, *pythons] if name in ('ours', 'sdk') else pythons)
                         if package in pythons[p]), None) for name, package in PACKAGES.items()}
    homes['ours'] = sys.executable
    versions = {name: {k: pythons[p][k] for k in (PACKAGES[name], 'openai', 'litellm') if k in pythons[p]}
                for name, p in homes.items() if p}
    clients = {name: p for name, p in homes.items() if p and name in {'ours', *args.clients.split(',')}}
    scale, c = 5 if args.quick else 1, args.logprobs_concurrency
    settings = {'text_64': ((64, False), args.text_64//scale), 'text_512': ((512, False), args.text_512//scale),
                f'logprobs_{c}': ((c, True), args.logprobs//scale)}
    server, port, kind = start_server(pythons)
    try: results = compare(port, clients, settings, args)
    finally: server.kill(); server.wait()
    found = summary(results, versions, kind, f'logprobs_{c}')
    if args.json: print(json.dumps(found))
    else: show(found, settings)


if __name__ == '__main__': main()
