"""Tokens a second with guesses of what comes next, against the same engine without them.

SmolLM2-135M-Instruct, greedy answers; two engines in one process take turns at the same requests, and what they say is
compared. The one that guesses knows nothing before each round but the answers to `--before` other prompts. Prompts are
the stories of `serving.py`, and with LLMD_DATA those of its `gsm8k_train_1000.jsonl` and `self_instruct_seed.jsonl`.
    python tests/benchmarks/lookup.py [--json] [--clients 1 5 20] [--tokens 128] [--prompts 8] [--rounds 2]
                                      [--before 0 32] [--quantize int8] [--torch-compile]
"""
import argparse
import json
import os
import queue
import time
from itertools import product
from pathlib import Path

from serving import prompts

from llm_distill.models import encode_chat, load_tokenizer
from llm_distill.serving.loading import open_service
from llm_distill.serving.lookup import Phrases
from llm_distill.serving.options import ServeOptions
from llm_distill.serving.sampling import Sampling


def questions(n: int) -> dict[str, list[str]]:
    found, folder = {'stories': prompts(n)}, os.environ.get('LLMD_DATA')
    for name in ('gsm8k_train_1000', 'self_instruct_seed') if folder else ():
        lines = Path(folder, name + '.jsonl').read_text(encoding='utf-8').splitlines()[:n]
        found[name] = [json.loads(line)['prompt'] for line in lines]
    return found


def write(engine, asked: list[list[int]], tokens: int, clients: int) -> tuple[float, list[list[int]]]:
    "Seconds, and the answers; some at a time."
    said, begun = [], time.perf_counter()
    for start in range(0, len(asked), clients):
        ended = queue.Queue()
        jobs = [engine.submit(ids, Sampling(tokens, temperature=0), ended.put, stream=False)
                for ids in asked[start:start + clients]]
        for _ in jobs: ended.get(timeout=600)
        said += [job.said for job in jobs]
    return time.perf_counter() - begun, said


def compared(engines: dict, asked: list[list[int]], before: list[list[int]], clients: int, args) -> dict:
    seconds, stats = dict.fromkeys(engines, 0.), engines[True].stats
    guesses, right = stats.guesses, stats.right_guesses
    for turn in range(args.rounds):
        said, engines[True].phrases = {}, Phrases()
        for answer in before: engines[True].phrases.add(answer)
        for on in sorted(engines, reverse=turn % 2 == 1):
            took, said[on] = write(engines[on], asked, args.tokens, clients)
            seconds[on] += took
        if said[True] != said[False]: raise SystemExit('the answers differ')
    n = args.rounds*sum(map(len, said[True]))
    return {'plain': n/seconds[False], 'with_guesses': n/seconds[True], 'ratio': seconds[False]/seconds[True],
            'guesses': (stats.guesses - guesses)/n, 'right': (stats.right_guesses - right)/n}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', action='store_true')
    parser.add_argument('--clients', type=int, nargs='+', default=[1, 5, 20])
    parser.add_argument('--tokens', type=int, default=128)
    parser.add_argument('--prompts', type=int, default=8, help='at least; as many as there are clients')
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--before', type=int, nargs='+', default=[0, 32])
    parser.add_argument('--quantize')
    parser.add_argument('--torch-compile', action='store_true')
    args = parser.parse_args()
    how = dict(device='cpu', quantize=args.quantize, torch_compile='default' if args.torch_compile else None)
    services = {on: open_service(ServeOptions('smollm2', no_lookup=not on, **how)) for on in (False, True)}
    engines = {on: s.engine for on, s in services.items()}
    tokenizer, found, most = load_tokenizer('smollm2'), {}, max(args.before)
    for name, some in questions(most + max(args.prompts, *args.clients)).items():
        asked = [encode_chat(tokenizer, [{'role': 'user', 'content': q}]) for q in some]
        said = write(engines[False], asked[:most], args.tokens, 32)[1]
        for n, before in product(args.clients, args.before):
            for engine in engines.values(): write(engine, asked[:1], 8, 1)
            now = asked[most:most + max(args.prompts, n)]
            found[f'{name}, {n}, {before}'] = compared(engines, now, said[:before], n, args)
    for s in services.values(): s.close()
    if args.json: print(json.dumps(found)); return
    print('| prompts, clients, answers before | tokens/s without | with guesses | ratio | guesses a token | right |')
    print('|---|---|---|---|---|---|')
    for name, x in found.items():
        print(f'| {name} | {x["plain"]:.0f} | {x["with_guesses"]:.0f} | {x["ratio"]:.2f} | {x["guesses"]:.2f} | '
              f'{x["right"]:.2f} |')


if __name__ == '__main__': main()
