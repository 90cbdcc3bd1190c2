"The gradient of top-20 with its tail against that of the full forward KL, on what a real teacher says of real text."
import pytest
import torch
from torch.nn import functional as F

from llm_distill.demo import demo_prompts
from llm_distill.losses import topk_tail_kl
from llm_distill.models import load_model, load_tokenizer

K, DROPPED = 20, (8, 15, 22)  # 27 of 30 layers: a student near its teacher, where what a target leaves out shows


@pytest.fixture(scope='module')
def heads():
    "Hidden states and logits of the student, logprobs of the teacher, and the head, on some 400 places."
    model, tokenizer = load_model('smollm2', 'cpu', torch.float32), load_tokenizer('smollm2')
    ids = tokenizer('\n'.join(p['prompt'] for p in demo_prompts()), return_tensors='pt').input_ids[:, :384].view(2, 192)
    with torch.no_grad():
        teacher = model(ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
        layers = model.base_model.layers
        for i in reversed(DROPPED): del layers[i]
        model.config.num_hidden_layers = len(layers)
        hidden = model.base_model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    return hidden, teacher, model.lm_head.weight.detach()


def gradient(loss, hidden, head):
    "Of the summed loss with respect to the head's weights."
    head = head.clone().requires_grad_()
    loss(F.linear(hidden, head)).sum().backward()
    return head.grad.flatten()


def full(logits, teacher): return F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction='none').sum(-1)


def tailed(logits, teacher):
    top = teacher.topk(K)
    return topk_tail_kl(logits, top.indices, top.values)


def renormalised(logits, teacher):
    "The teacher's share among its top K."
    top = teacher.topk(K)
    return -(top.values.softmax(-1)*logits.log_softmax(-1).gather(-1, top.indices)).sum(-1)


def subset(logits, teacher):
    "And the student's too."
    top = teacher.topk(K)
    return -(top.values.softmax(-1)*logits.gather(-1, top.indices).log_softmax(-1)).sum(-1)


def cosine(a, b): return float((a*b).sum()/(a.norm()*b.norm()))


def test_top_20_with_its_tail_has_the_gradient_of_the_full_divergence(heads):
    hidden, teacher, head = heads
    losses = (full, tailed, renormalised, subset)
    grads = {f.__name__: gradient(lambda z, f=f: f(z, teacher), hidden, head) for f in losses}
    near = {name: cosine(grads['full'], g) for name, g in grads.items()}
    error = {name: float((grads['full'] - g).norm()/grads['full'].norm()) for name, g in grads.items()}
    assert near['tailed'] >= .995, (near, error)
    assert 1 - near['renormalised'] > 5*(1 - near['tailed']) and near['subset'] < .9, near
    assert error['tailed'] < .5*error['renormalised'] < .5*error['subset'], error
