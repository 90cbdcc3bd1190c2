"""Targets on disk: size, and the speed of writing, reading and capturing them.

    python tests/benchmarks/shards.py [--json] [--model smollm2] [--examples 400] [--threads 1]

Writing puts everything on the disk (fsync). The rows are what the teacher says of random text of its own vocabulary.
"""
import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from llm_distill.capture import capture
from llm_distill.models import load_model
from llm_distill.shards import Shards, ShardWriter

LENGTH, PROMPT = 128, 32  # tokens of an example, and those of them that are not taught
KINDS = {'top-5': {'k': 5}, 'top-20': {'k': 20}, 'top-64': {'k': 64}, '50 draws': {'kind': 'sampled'}}


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def some(model, n) -> list[dict]:
    "Texts that the model itself says, so that its distributions are as peaked as they are in use."
    torch.manual_seed(0)
    start = torch.randint(model.config.vocab_size, (n, 1), device=model.device)
    ids = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=LENGTH - 1,
                         min_new_tokens=LENGTH - 1, pad_token_id=0).cpu().numpy()
    return [{'input_ids': x, 'labels': np.where(np.arange(LENGTH) < PROMPT, -100, x)} for x in ids]


def measure(name, model, few, n, folder) -> dict:
    "Capture a few examples, then write and read them n times over."
    options = KINDS[name]
    took = seconds(lambda: capture(model, few, folder/'few', **options))
    shards = Shards(folder/'few')
    examples, taught = list(shards), (LENGTH - PROMPT)*n
    header = {name: shards.header[name] for name in ('kind', 'k', 'draws')}
    def write():
        with ShardWriter(folder/'many', **header) as out:
            for i in range(n): out.append(examples[i % len(examples)])
    writing = seconds(write)
    many = Shards(folder/'many')
    order = np.random.default_rng(0).permutation(n)
    row = {'bytes_per_token': sum(p.stat().st_size for p in (folder/'many').iterdir())/taught,
           'entries': float(np.mean([np.isfinite(e['top_logprobs'][e['soft']]).sum(1).mean() for e in examples])),
           'write_tokens_s': taught/writing,
           'read_tokens_s': taught/min(seconds(lambda: [many[i] for i in order]) for _ in range(3)),
           'capture_tokens_s': (LENGTH - PROMPT)*len(few)/took}
    for x in ('few', 'many'): shutil.rmtree(folder/x)
    return row


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', action='store_true')
    parser.add_argument('--model', default='smollm2')
    parser.add_argument('--examples', type=int, default=400)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model)
    with tempfile.TemporaryDirectory() as temp:
        few = some(model, 4)
        ids = torch.tensor(np.stack([e['input_ids'] for e in few]), device=model.device)
        with torch.inference_mode(): forward = ids.numel()/seconds(lambda: model.base_model(ids))
        found = {name: measure(name, model, few, args.examples, Path(temp)) for name in KINDS}
    if args.json: print(json.dumps(found))
    else:
        print(f'{args.model}: its body alone reads {forward:,.0f} tokens/s, prompt included\n')
        print('| per taught token | MB per 1,000 | entries | written/s | read/s | captured/s |')
        print('|---|---|---|---|---|---|')
        for name, r in found.items():
            speeds = ' | '.join(f'{r[x]:,.0f}' for x in ('write_tokens_s', 'read_tokens_s', 'capture_tokens_s'))
            print(f'| {name} | {r["bytes_per_token"]/1000:.3f} | {r["entries"]:.1f} | {speeds} |')
