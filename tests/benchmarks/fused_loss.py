"""The fused loss against the same loss over all logits: time and memory of one forward and backward pass, side by side.

    python tests/benchmarks/fused_loss.py
"""
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from llm_distill.losses import distill_loss, topk_tail_kl

N, H, V, K = 1024, 576, 49152, 20  # four sequences of 256 tokens, SmolLM2's sizes


def inputs():
    "Hidden states, a head, and a teacher's top-k for them."
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H, requires_grad=True), (torch.randn(V, H)/H**.5).requires_grad_()
    top = (3*torch.randn(64, V)).log_softmax(-1).topk(K)
    return hidden, weight, torch.randint(V, (N,)), top.indices.repeat(N//64, 1), top.values.repeat(N//64, 1)


def naive(hidden, weight, labels, ids, logprobs):
    logits = F.linear(hidden, weight)
    return .8*topk_tail_kl(logits, ids, logprobs).sum() + .2*F.cross_entropy(logits, labels, reduction='sum')


def fused(*args): return distill_loss(*args)[0]


def measure(name: str):
    "Best of five passes in ms, and what they added to the peak memory of this process in MiB."
    args, loss, times = inputs(), globals()[name], []
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        started = time.perf_counter()
        loss(*args).backward()
        times.append(time.perf_counter() - started)
        for x in args[:2]: x.grad = None
    print(min(times)*1e3, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)/1024)


if __name__ == '__main__':
    if len(sys.argv) > 1: measure(sys.argv[1]); sys.exit()
    rows = {name: [float(x) for x in subprocess.run([sys.executable, __file__, name], capture_output=True, text=True,
                                                    check=True).stdout.split()] for name in ('naive', 'fused')}
    print('| loss | ms | extra peak MiB |\n|---|---|---|')
    for name, (ms, mib) in rows.items(): print(f'| {name} | {ms:.0f} | {mib:.0f} |')
    (a, b), (c, d) = rows.values()
    print(f'| ratio | {a/c:.2f}x | {b/d:.1f}x |')
