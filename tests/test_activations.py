"Students of many families learn the same, whether their layers keep less and attend by products or not."
import pytest
import torch
import transformers
from llm_distill.activations import kept_short
from llm_distill.attention import attends_by_products

SIZES = {'vocab_size': 300, 'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 2,
         'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 128,
         'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2}
HALF = {'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': .5}  # of each head is turned
FAMILIES = {'Llama': {}, 'Mistral': {}, 'Qwen2': {}, 'Qwen3': {'head_dim': 16}, 'Gemma': {'head_dim': 16},
            'Gemma2': {'head_dim': 16}, 'Gemma3': {'head_dim': 16}, 'Phi': {'partial_rotary_factor': .5},
            'Phi3': {'rope_parameters': HALF}, 'StableLm': {}, 'GPTNeoX': {}, 'Cohere': {}, 'Glm': {'head_dim': 16},
            'Glm4': {'head_dim': 16}, 'Olmo2': {}, 'Granite': {}, 'SmolLM3': {}, 'Starcoder2': {}, 'Ernie4_5': {}}


def learnt(model, rounded):
    "The loss of two texts, one padded on the left, and all gradients."
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :7], labels[1, :8] = 0, -100
    with torch.autocast('cpu', torch.bfloat16, enabled=rounded):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss.item(), torch.cat([g.flatten() for g in grads])


def far(a, b) -> float: return ((a - b).norm()/b.norm()).item()


@pytest.mark.parametrize('family', FAMILIES)
def test_keeping_less_teaches_the_same(family):
    config = getattr(transformers, f'{family}TextConfig', None) or getattr(transformers, f'{family}Config')
    torch.manual_seed(0)
    model = getattr(transformers, f'{family}ForCausalLM')(config(**SIZES | FAMILIES[family]))
    (exact, right), (_, rough) = learnt(model, False), learnt(model, True)
    with attends_by_products(model), kept_short(model) as changed:
        (loss, same), (_, rounded) = learnt(model, False), learnt(model, True)
    assert changed and loss == pytest.approx(exact, rel=1e-5) and far(same, right) < 1e-5
    assert far(rounded, right) < 1.3*far(rough, right)  # bfloat16 costs what it did
