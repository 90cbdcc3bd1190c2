"""How far a served model is from the same one in float32: KL in nats a token, on answers that it wrote itself.

SmolLM2-135M-Instruct; each way of serving it as `llm_distill serve` prepares it on a CPU.
    python tests/benchmarks/fidelity.py [--json] [--tokens 80]
"""
import argparse
import json

import torch

from llm_distill.models import encode_chat, load_model, load_tokenizer
from llm_distill.serving.fuse import fuse
from llm_distill.serving.places import ATTENTION
from llm_distill.serving.quantize import quantize_for_cpu

QUESTIONS = ('Why is the sky blue?', 'Write a poem about a castle by the sea.',
             'Explain how a computer stores numbers.', 'Give me a recipe for bread.', 'What did the Romans build?',
             'Tell me about the moon.')


def served(kind: str):
    model = load_model('smollm2', 'cpu', torch.bfloat16)
    model.set_attn_implementation(ATTENTION)
    fuse(model, packed=kind == 'bfloat16')
    if kind == 'int8': quantize_for_cpu(model)
    return model.eval()


@torch.inference_mode()
def measure(tokens: int) -> dict[str, dict[str, float]]:
    whole, tokenizer, texts = load_model('smollm2', 'cpu', torch.float32).eval(), load_tokenizer('smollm2'), []
    for question in QUESTIONS:
        ids = torch.tensor([encode_chat(tokenizer, [{'role': 'user', 'content': question}])])
        torch.manual_seed(1)
        texts.append((ids.shape[1], whole.generate(ids, max_new_tokens=tokens, do_sample=True)))
    def rows(model): return torch.cat([model(ids).logits[0, n - 1:-1].float().log_softmax(-1) for n, ids in texts])
    right, found = rows(whole), {}
    for kind in ('bfloat16', 'int8'):
        said = rows(served(kind))
        kl, same = (right.exp()*(right - said)).sum(-1), right.argmax(-1) == said.argmax(-1)
        found[kind] = {'kl': kl.mean().item(), 'most': kl.max().item(), 'same_top': same.float().mean().item()}
    return found | {'tokens': len(right)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', action='store_true')
    parser.add_argument('--tokens', type=int, default=80)
    args = parser.parse_args()
    found = measure(args.tokens)
    if args.json: print(json.dumps(found)); return
    print(f'| against float32, {found.pop("tokens")} tokens | KL, nats a token | the largest | same likeliest token |')
    print('|---|---|---|---|')
    for kind, x in found.items(): print(f'| {kind} | {x["kl"]:.4f} | {x["most"]:.3f} | {x["same_top"]:.1%} |')


if __name__ == '__main__': main()
