"Bugs that other packages had in their distillation losses, each kept out of ours by name."
import math

import pytest
import torch
from llm_distill.fused import Dense, Head, Sparse, Text, fused_loss, plain_loss
from llm_distill.losses import (DIVERGENCES, forward_kl, jsd, reverse_kl, tempered, topk_renormalised, topk_tail_kl,
                                topk_truncated)
from torch.nn import functional as F

N, H, V, K = 6, 8, 50, 4
ONE, NONE = torch.ones(N), torch.zeros(N)


@pytest.fixture(autouse=True)
def same_numbers(): torch.manual_seed(0)


def setting(dtype=torch.float32, spread=1.):
    "Hidden states, a head, and a teacher's top-k for them."
    hidden, head = torch.randn(N, H), Head(spread*torch.randn(V, H))
    top = (2*torch.randn(N, V)).log_softmax(-1).topk(K)
    return hidden.to(dtype), head, Sparse(top.indices, top.values), torch.randint(V, (N,))


def grad(loss, logits): return torch.autograd.grad(loss.sum(), logits)[0]


@pytest.mark.parametrize('beta', [.1, .5, .9])
def test_trl_2202_and_3043_the_mixture_of_the_jsd(beta):
    "beta weighs the teacher in the mixture and its KL alike; swapping the roles is another loss."
    p, q = torch.tensor([[.7, .2, .1]]).log(), torch.tensor([[.2, .2, .6]]).log()
    m = [beta*a + (1 - beta)*b for a, b in zip((.7, .2, .1), (.2, .2, .6))]
    right = sum(beta*a*math.log(a/c) + (1 - beta)*b*math.log(b/c) for a, b, c in zip((.7, .2, .1), (.2, .2, .6), m))
    assert jsd(p, q, beta).item() == pytest.approx(right, rel=1e-5)
    if beta != .5: assert jsd(q, p, beta).item() != pytest.approx(right, rel=1e-2)


def test_trl_jsd_at_its_ends_is_a_kl():
    p, q = torch.randn(2, 3, 5).log_softmax(-1)
    assert torch.equal(jsd(p, q, 0), forward_kl(p, q)) and torch.equal(jsd(p, q, 1), reverse_kl(p, q))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_ms_swift_10156_no_divergence_is_negative_in_half_precision(dtype):
    hidden, head, target, labels = setting(dtype, spread=3.)
    for divergence in DIVERGENCES.values():
        *_, apart, _ = fused_loss(hidden, head, labels, target, ONE, NONE, divergence)
        assert (apart > -1e-5).all() and apart.isfinite().all()


def test_easydistill_34_the_sum_goes_over_the_vocabulary_and_is_no_mean():
    "A teacher that is sure gives cross-entropy itself, not a V-th of it."
    hidden, head, target, labels = setting()
    sure = Sparse(labels[:, None], torch.zeros(N, 1))
    _, apart, ce = fused_loss(hidden, head, labels, sure, ONE, NONE)
    assert torch.allclose(apart, ce, atol=1e-4)


def test_axolotl_2700_the_student_is_normalised_over_its_whole_vocabulary():
    "More for a token that the teacher does not show is less for those that it does."
    logits, target = torch.randn(1, V), Sparse(torch.tensor([[1, 2]]), torch.tensor([[.6, .39]]).log())
    logits[0, 1:3] += 6
    higher = logits.clone()
    higher[0, 7] += 8
    low, high = (topk_tail_kl(x, target.ids, target.logprobs).item() for x in (logits, higher))
    assert high > 2*low


def test_verl_5041_reverse_kl_on_a_top_k_leaves_no_way_out():
    "Mass on tokens that are not shown is pushed down as far as the teacher's tail is small."
    logits = torch.zeros(1, V, requires_grad=True)
    slope = grad(topk_tail_kl(logits, torch.tensor([[1, 2]]), torch.tensor([[.6, .399]]).log(), reverse_kl), logits)[0]
    assert (slope[3:] > 0).all() and slope[1] < 0 and slope[2] < 0


def test_verl_7855_a_truncated_top_k_is_no_divergence():
    "The sum over the shown tokens alone can be negative, and then it is no distance; with the tail it cannot."
    logits = torch.zeros(1, 4)
    logits[0, 0] = 5.
    ids, shown = torch.tensor([[0]]), torch.tensor([[.5]]).log()
    assert topk_truncated(logits, ids, shown) < 0 < topk_tail_kl(logits, ids, shown)


def test_distillkit_a_renormalised_top_k_never_rests():
    "The student that is its teacher is still pushed, to be surer than it."
    logits = (2*torch.randn(1, V)).requires_grad_()
    top = logits.detach().log_softmax(-1).topk(K)
    pushed = grad(topk_renormalised(logits, top.indices, top.values), logits)
    at_rest = grad(topk_tail_kl(logits, top.indices, top.values), logits)
    assert at_rest.norm() < 1e-5 < 1e-2 < pushed.norm()


def test_trl_5731_alpha_and_beta_mean_what_they_say():
    hidden, head, target, labels = setting()
    kl_only, apart, ce = fused_loss(hidden, head, labels, target, ONE, NONE)
    both = fused_loss(hidden, head, labels, target, .5*ONE, .5*ONE)[0]
    assert kl_only.item() == pytest.approx(apart.sum().item(), rel=1e-6)
    assert both.item() == pytest.approx(.5*(apart + ce).sum().item(), rel=1e-6)


@pytest.mark.parametrize('T', [2., 4.])
def test_temperature_is_on_both_sides_and_squared_in_front(T):
    hidden, head, _, labels = setting()
    theirs = Dense(torch.randn(N, 3), Head(torch.randn(V, 3)))
    said = fused_loss(hidden, head, labels, theirs, ONE, NONE, forward_kl, T)[1]
    p, q = ((x/T).log_softmax(-1) for x in (theirs.head.logits(theirs.hidden), head.logits(hidden)))
    assert torch.allclose(said, T*T*F.kl_div(q, p, log_target=True, reduction='none').sum(-1), atol=1e-4)


def test_trl_2215_vocabularies_of_one_family_are_padded_to_different_sizes():
    hidden, head, _, labels = setting()
    padded = Dense(torch.randn(N, 3), Head(torch.randn(V + 14, 3)))
    cut = Dense(padded.hidden, Head(padded.head.weight[:V]))
    assert torch.equal(*(fused_loss(hidden, head, labels, t, ONE, NONE)[1] for t in (padded, cut)))


def test_rounded_logits_do_not_make_the_tail_explode():
    "Shown and summed logits come from the same rounded product, so that a sure student in bfloat16 keeps its tail."
    hidden, head, _, labels = setting(spread=6.)
    q = head.logits(hidden).log_softmax(-1).topk(K)
    own = Sparse(q.indices, q.values)
    exact = fused_loss(hidden, head, labels, own, ONE, NONE)[1]
    rounded = fused_loss(hidden.bfloat16(), head, labels, own, ONE, NONE)[1]
    assert exact.max() < 1e-4 and rounded.max() < .2


@pytest.mark.parametrize('target', ['sparse', 'text'])
@pytest.mark.parametrize('kind', ['plain', 'bias', 'softcap'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_may_be_all_but_impossible(target, kind, dtype):
    "Hundreds of nats below the likeliest token, exponentials that count from it would overflow."
    wide = 1300
    hidden, weight, bias = (20*torch.randn(N, H)).to(dtype), torch.randn(wide, H).to(dtype).float(), torch.randn(wide)
    head = {'plain': Head(weight), 'bias': Head(weight, bias), 'softcap': Head(weight, None, 1., 150.)}[kind]
    z = head.logits(hidden)
    shown, labels = Sparse(z.topk(K)[1], torch.randn(N, K + 1).log_softmax(-1)[:, 1:]), z.argmin(1)
    said = shown if target == 'sparse' else Text()
    wanted = [x.requires_grad_() for x in (hidden, weight, bias)][:3 if kind == 'bias' else 2]
    loss, _, ce = fused_loss(hidden, head, labels, said, ONE, ONE, chunk=4)
    right, _, slow = plain_loss(head._replace(weight=weight).logits(hidden), labels, said, ONE, ONE)
    assert slow.min() > 150 and torch.allclose(ce, slow, rtol=1e-5 if dtype == torch.float32 else .01)
    near = 1e-5 if dtype == torch.float32 else .02
    for ours, slow in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(right, wanted)):
        assert (ours.float() - slow.float()).norm() < near*slow.float().norm()
    with torch.no_grad(): assert torch.allclose(fused_loss(hidden, head, labels, said, ONE, ONE, chunk=4)[0], loss)


@pytest.mark.parametrize('name', DIVERGENCES)
def test_what_servers_send_makes_nothing_infinite(name):
    "-inf, -9999, a single alternative, no tail, a top-k that sums to a little more than 1."
    odd = torch.tensor([[-math.inf]*K, [-9999., -.1, -9999., -math.inf], [0.] + [-math.inf]*3, [math.log(.25)]*K,
                        [math.log(.2500001)]*K, [-.01, -9999., -20., -30.]])
    hidden, head, target, labels = setting(spread=5.)
    hidden.requires_grad_()
    loss, *_ = fused_loss(hidden, head, labels, Sparse(target.ids, odd), ONE, ONE, DIVERGENCES[name])
    assert loss.isfinite() and torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_one_token_answers_and_a_top_1():
    hidden, head, target, labels = setting()
    top = Sparse(target.ids[:1, :1], target.logprobs[:1, :1])
    one = fused_loss(hidden[:1], head, labels[:1], top, ONE[:1], ONE[:1])
    assert one[0].isfinite() and one[1].shape == (1,)


def test_a_frozen_head_takes_no_gradient_and_gives_one():
    hidden, head, target, labels = setting()
    hidden.requires_grad_()
    fused_loss(hidden, head, labels, target, ONE, ONE)[0].backward()
    assert hidden.grad.abs().sum() > 0 and head.weight.grad is None


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_made():
    "The largest tensor of forward and backward is a chunk of logits, or the head's gradient."
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            sizes.extend(x.nbytes for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor))
            return out
    many, wide = 300, 2000
    hidden, weight = torch.randn(many, 4, requires_grad=True), torch.randn(wide, 4, requires_grad=True)
    top = torch.randn(many, wide).log_softmax(-1).topk(K)
    theirs = Dense(torch.randn(many, 3), Head(torch.randn(wide, 3)))
    for target in (Sparse(top.indices, top.values), theirs, Text()):
        sizes.clear()
        with Watch():
            fused_loss(hidden, Head(weight), torch.randint(wide, (many,)), target, torch.ones(many), torch.ones(many),
                       chunk=50)[0].backward()
        assert max(sizes) <= 4*50*wide + 64


def test_tempered_keeps_a_distribution():
    x = torch.randn(3, 7).log_softmax(-1)
    assert torch.allclose(tempered(x, 3.).exp().sum(-1), torch.ones(3)) and torch.equal(tempered(x, 1.), x)
