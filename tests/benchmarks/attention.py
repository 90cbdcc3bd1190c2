"""Attention in training: by products against torch's own, forward and backward of one layer of SmolLM2, in turns.

    python tests/benchmarks/attention.py [--tokens 64,256,512,1024,2048,4096]

Four causal texts of equal length, in milliseconds; freed memory is kept, as the trainer keeps it.
"""
import argparse
import time
from types import SimpleNamespace

import torch
from llm_distill import attention
from llm_distill.device import kept_memory
from torch.nn import functional as F

TEXTS, HEADS, KEYS, WIDTH = 4, 9, 3, 64  # the last three are SmolLM2-135M's


def states(tokens, dtype):
    torch.manual_seed(0)
    def some(heads): return torch.randn(TEXTS, tokens, heads, WIDTH).to(dtype).transpose(1, 2)
    return [some(n).requires_grad_() for n in (HEADS, KEYS, KEYS)], some(HEADS)


def measure(tokens: int, dtype: torch.dtype) -> list[float]: # ms of torch's own, and by products
    (inputs, grad), layer = states(tokens, dtype), SimpleNamespace(is_causal=True)
    def own(): return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    def products(): return attention.products_attention(layer, *inputs, None)[0].transpose(1, 2)
    times = [], []
    for i in range(21 if tokens < 1000 else 5):
        for way, took in zip((own, products), times):
            began = time.perf_counter()
            torch.autograd.grad(way(), inputs, grad)
            if i: took.append(time.perf_counter() - began)
    return [1e3*sorted(took)[len(took)//3] for took in times]


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--tokens', default='64,256,512,1024,2048,4096')
    lengths = [int(n) for n in args.parse_args().tokens.split(',')]
    torch.set_float32_matmul_precision('medium')  # as the trainer sets it where that is the faster way
    attention._LONGEST = dict.fromkeys(attention._LONGEST, max(lengths))  # also where it would not be taken
    print('| tokens of a text | torch, bfloat16 | products, bfloat16 | torch, float32 | products, float32 |')
    print('|---|---|---|---|---|')
    with kept_memory():
        for n in lengths:
            found = [ms for dtype in (torch.bfloat16, torch.float32) for ms in measure(n, dtype)]
            shown = ' | '.join(f'{ms:.1f}' if ms < 20 else f'{ms:,.0f}' for ms in found)
            print(f'| {n:,} | {shown} |', flush=True)


if __name__ == '__main__': main()
