"""Liger's kernel in place of ours, by Triton's interpreter, which needs no GPU.

    pip install liger-kernel triton && pytest -m slow tests/test_liger.py
"""
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import torch
from llm_distill.fused import Head, Text, fused_loss
from llm_distill.liger import liger_wanted

assert liger_wanted(torch.device('cpu')) == 'always'
rng = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=rng)

exact, rough = torch.float32, torch.bfloat16
for biased, dtype, frozen in ((0, exact, 0), (1, exact, 0), (0, rough, 0), (0, exact, 1)):
    hidden = random(37, 32).to(dtype).requires_grad_()
    weight = random(101, 32).requires_grad_(not frozen)
    bias = random(101).requires_grad_() if biased else None
    labels, w, zero = torch.arange(37)*2, torch.rand(37, generator=rng), torch.zeros(37)
    w[5] = 0
    inputs = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]

    def slow():
        z = hidden.float() @ weight.to(dtype).float().T
        if biased: z = z + bias
        return torch.nn.functional.cross_entropy(z, labels, reduction='none')

    loss, apart, ce = fused_loss(hidden, Head(weight, bias), labels, Text(), zero, w, chunk=8)
    wanted = (slow()*w).sum()
    found = ce, loss, *torch.autograd.grad(3*loss, inputs)
    for ours, theirs in zip(found, (slow(), wanted, *torch.autograd.grad(3*wanted, inputs))):
        assert (ours - theirs).norm() <= (1e-5 if dtype == exact else .02)*theirs.norm()

for other in (Head(weight, scale=2.), Head(weight, softcap=5.)):  # no cases of Liger's
    fused_loss(hidden, other, labels, Text(), zero, w)
print('all the same')
"""


def run(code, **more):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=600,
                          env={**os.environ, 'TRITON_INTERPRET': '1', **more})


def test_the_same_loss_and_gradients():
    pytest.importorskip('liger_kernel')
    pytest.importorskip('triton')
    done = run(CODE, LLM_DISTILL_LIGER='always')
    assert done.returncode == 0 and 'all the same' in done.stdout, done.stderr[-3000:]


def test_another_word_is_refused():
    done = run('import torch; from llm_distill.liger import liger_wanted; liger_wanted(torch.device("cpu"))',
               LLM_DISTILL_LIGER='yes')
    assert 'is "always", "never" or "race"' in done.stderr
