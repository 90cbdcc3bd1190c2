"""Client CPU for one answer through `teacher.agenerate`, against the bare official SDK.

Both ask the same server, which runs in a process of its own and sends the same bytes each time; the rounds alternate.
    python tests/benchmarks/teachers.py [--json] [--requests 300] [--concurrency 16] [--rounds 5]
"""
import argparse
import asyncio
import json
import resource
import socket
import subprocess
import sys
import time

SERVER = '''
import json, sys
tokens = [{"token": f" w{i}", "bytes": list(f" w{i}".encode()), "logprob": -.12345678 - i*.37} for i in range(20)]
place = {**tokens[0], "top_logprobs": tokens}
def reply(logprobs):
    message = {"role": "assistant", "content": " w0"*64, "refusal": None}
    choice = {"index": 0, "finish_reason": "stop", "message": message,
              "logprobs": {"content": [place]*64, "refusal": None} if logprobs else None}
    usage = {"prompt_tokens": 20, "completion_tokens": 64, "total_tokens": 84}
    return json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice],
                       "usage": usage}).encode()
PLAIN, RICH = reply(False), reply(True)
LIMITS = [(f"x-ratelimit-{word}-{kind}".encode(), value) for kind in ("requests", "tokens")
          for word, value in (("limit", b"10000000"), ("remaining", b"9999999"), ("reset", b"6ms"))]
async def app(scope, receive, send):
    if scope["type"] != "http": return
    body, more = b"", True
    while more:
        part = await receive()
        body, more = body + part.get("body", b""), part.get("more_body")
    data = RICH if json.loads(body).get("logprobs") else PLAIN
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode()), *LIMITS]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": data})
import uvicorn
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
'''


def start_server() -> tuple[subprocess.Popen, int]:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = subprocess.Popen([sys.executable, '-c', SERVER, str(port)])
    for _ in range(200):
        try: socket.create_connection(('127.0.0.1', port)).close(); return server, port
        except OSError: time.sleep(.05)
    raise SystemExit('the server did not start')


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def cpu_per_call(ask, requests: int, concurrency: int) -> float: # Milliseconds
    left = iter(range(requests))
    async def worker():
        for _ in left: await ask()
    started = cpu_s()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return (cpu_s() - started)/requests*1e3


async def measure(url: str, args) -> dict:
    import openai
    from llm_distill import create_teacher
    messages = [{'role': 'user', 'content': 'Why is the sky blue? '*5}]
    sdk = openai.AsyncOpenAI(base_url=url, api_key='x', max_retries=0,
                             http_client=openai.DefaultAsyncHttpxClient(trust_env=False))
    teacher = create_teacher('openai-compatible', 'm', base_url=url)
    common = dict(max_tokens=64, temperature=1.)
    found = {}
    for name, ours, theirs in (('', {}, {}), ('_logprobs', {'logprobs': 20}, {'logprobs': True, 'top_logprobs': 20})):
        async def bare(more=theirs):
            return await sdk.chat.completions.create(model='m', messages=messages, **common, **more)
        async def through(more=ours): return await teacher.agenerate(messages, **common, **more)
        assert (await through()).text == (await bare()).choices[0].message.content
        rounds = []
        for _ in range(args.rounds + 1):  # the first one warms up
            rounds.append([await cpu_per_call(ask, args.requests, args.concurrency) for ask in (bare, through)])
        bare_ms, ours_ms = (sorted(r[i] for r in rounds[1:])[args.rounds//2] for i in (0, 1))
        found |= {f'sdk_ms{name}': bare_ms, f'teacher_ms{name}': ours_ms, f'cpu_vs_sdk{name}': ours_ms/bare_ms}
    await teacher.aclose()
    await sdk.close()
    return {k: round(v, 3) for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', action='store_true', help='print JSON alone')
    for name, default in (('requests', 300), ('concurrency', 16), ('rounds', 5)):
        parser.add_argument(f'--{name}', type=int, default=default)
    args = parser.parse_args()
    server, port = start_server()
    try: found = asyncio.run(measure(f'http://127.0.0.1:{port}/v1', args))
    finally: server.kill(); server.wait()
    if args.json: print(json.dumps(found)); return
    print(f'{"":24} {"SDK":>9} {"teacher":>9} {"ratio":>7}   (median CPU of {args.rounds} rounds)')
    for name, label in (('', 'text'), ('_logprobs', '64 tokens with top 20')):
        print(f'{label:24} {found["sdk_ms" + name]:6.2f} ms {found["teacher_ms" + name]:6.2f} ms '
              f'{found["cpu_vs_sdk" + name]:6.2f}x')


if __name__ == '__main__': main()
