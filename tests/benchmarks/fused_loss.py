"""The fused loss against the same loss over all logits: time and memory of one forward and backward pass, side by side.

    python tests/benchmarks/fused_loss.py [--bf16]
"""
import resource
import subprocess
import sys
import time

import torch
from llm_distill.device import kept_memory
from llm_distill.fused import Head, Sparse, fused_loss
from llm_distill.losses import topk_tail_kl
from torch.nn import functional as F

N, H, V, K = 1024, 576, 49152, 20  # four sequences of 256 tokens, SmolLM2's sizes


def inputs():
    "Hidden states, a head, and a teacher's top-k for them."
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H, requires_grad=True), (torch.randn(V, H)/H**.5).requires_grad_()
    top = (3*torch.randn(64, V)).log_softmax(-1).topk(K)
    return hidden, weight, torch.randint(V, (N,)), top.indices.repeat(N//64, 1), top.values.repeat(N//64, 1)


def naive(hidden, weight, labels, ids, logprobs):
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return .8*topk_tail_kl(logits, ids, logprobs).sum() + .2*F.cross_entropy(logits, labels, reduction='sum')


def fused(hidden, weight, labels, ids, logprobs):
    one = torch.ones(len(hidden))
    return fused_loss(hidden, Head(weight), labels, Sparse(ids, logprobs), .8*one, .2*one)[0]


def measure(name: str, dtype: torch.dtype):
    "Best of five passes in ms, and what they added to the peak memory of this process in MiB."
    (hidden, *args), loss, times = inputs(), globals()[name], []
    hidden = hidden.detach().to(dtype).requires_grad_()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with kept_memory():
        for _ in range(5):
            started = time.perf_counter()
            loss(hidden, *args).backward()
            times.append(time.perf_counter() - started)
            hidden.grad = args[0].grad = None
    print(min(times)*1e3, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)/1024)


if __name__ == '__main__':
    if sys.argv[1:2] in (['naive'], ['fused']):
        measure(sys.argv[1], torch.bfloat16 if '--bf16' in sys.argv else torch.float32)
        sys.exit()
    def run(name):
        words = [sys.executable, __file__, name, *sys.argv[1:]]
        return [float(x) for x in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()]
    rows = {name: run(name) for name in ('naive', 'fused')}
    print('| loss | ms | extra peak MiB |\n|---|---|---|')
    for name, (ms, mib) in rows.items(): print(f'| {name} | {ms:.0f} | {mib:.0f} |')
    (a, b), (c, d) = rows.values()
    print(f'| ratio | {a/c:.2f}x | {b/d:.1f}x |')
