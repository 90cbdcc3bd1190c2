"""How much of a provider's allowance is used, and how many requests are refused: our teacher against plain workers.

The provider is a loopback server with real token buckets of 300 requests and 20,000 tokens a minute.
    python tests/benchmarks/rate_limit.py [--json] [--seconds 60] [--silent]   (--silent: it sends no rate headers)
"""
import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from servers import Limiter, Provider  # noqa: E402

CASES = {'requests bind': 20, 'tokens bind': 150}  # tokens of an answer
DELAY_S, CONCURRENCY = .2, 64


async def through_teacher(url: str, tokens: int, until: float) -> None:
    from llm_distill import create_teacher
    teacher = create_teacher('openai-compatible', 'm', base_url=url, max_retries=20)
    async def worker(w):
        n = 0
        while time.monotonic() < until:
            n += 1
            asked = teacher.agenerate(f'Question {w} {n}', max_tokens=tokens)
            try: await asyncio.wait_for(asked, until - time.monotonic())
            except asyncio.TimeoutError: return
    await asyncio.gather(*(worker(w) for w in range(CONCURRENCY)))
    await teacher.aclose()


async def through_sdk(url: str, tokens: int, until: float) -> None:
    import openai
    sdk = openai.AsyncOpenAI(base_url=url, api_key='x', max_retries=20,
                             http_client=openai.DefaultAsyncHttpxClient(trust_env=False))
    async def worker(w):
        n = 0
        while time.monotonic() < until:
            n += 1
            ask = sdk.chat.completions.create(model='m', max_tokens=tokens,
                                              messages=[{'role': 'user', 'content': f'Question {w} {n}'}])
            try: await asyncio.wait_for(ask, until - time.monotonic())
            except (asyncio.TimeoutError, openai.APIError): pass
    await asyncio.gather(*(worker(w) for w in range(CONCURRENCY)))
    await sdk.close()


def measure(client, tokens: int, seconds: float, headers: bool) -> dict:
    limiter = Limiter(requests_per_minute=300, tokens_per_minute=20_000, headers=headers)
    with Provider('openai', flavour='plain', delay_s=DELAY_S, limiter=limiter, answer_tokens=tokens) as provider:
        started = time.monotonic()
        asyncio.run(client(provider.url, tokens, started + seconds))
        requests, allowed_tokens = limiter.allowed(time.monotonic() - started)
    used = max(limiter.admitted/requests, limiter.tokens_admitted/allowed_tokens)
    refused = limiter.refused/max(1, limiter.admitted + limiter.refused)
    return {'used': used, 'refused': refused, 'admitted': limiter.admitted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', action='store_true', help='print JSON alone')
    parser.add_argument('--seconds', type=float, default=60, help='for each of the four runs')
    parser.add_argument('--silent', action='store_true', help='the provider sends no rate headers')
    args = parser.parse_args()
    found = {f'{case}, {name}': measure(client, tokens, args.seconds, not args.silent) for case, tokens in CASES.items()
             for name, client in (('teacher', through_teacher), ('SDK', through_sdk))}
    if args.json: print(json.dumps(found)); return
    print(f'{"":24} {"allowance used":>15} {"refused":>9} {"answered":>9}')
    for name, row in found.items(): print(f'{name:24} {row["used"]:14.1%} {row["refused"]:9.1%} {row["admitted"]:9}')


if __name__ == '__main__': main()
