"""Tokens a second of a local teacher that is asked many questions, against `generate` of transformers.

All write the same greedy answers with top-20 logprobs, in turns, in one process.
    python tests/benchmarks/local_teacher.py [--json] [--questions 16] [--tokens 64] [--dtype float32] [--rounds 3]
"""
import argparse
import json
import statistics
import time

import torch

from llm_distill.models import encode_chat
from llm_distill.teachers.local import LocalTeacher


def padded(teacher, prompts, tokens):
    "One call of `generate`; the logprobs as it gives them."
    longest, pad = max(map(len, prompts)), teacher.tokenizer.pad_token_id
    ids = torch.tensor([[pad]*(longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0]*(longest - len(p)) + [1]*len(p) for p in prompts])
    with torch.inference_mode():
        out = teacher.llm.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens,
                                   do_sample=False, pad_token_id=pad, output_logits=True, return_dict_in_generate=True)
        torch.stack(out.logits, 1).float().log_softmax(-1).topk(20)
    return len(prompts)*tokens


def ways(teacher, questions, tokens):
    "What is compared: each gives how many tokens it wrote."
    prompts = [encode_chat(teacher.tokenizer, [{'role': 'user', 'content': q}]) for q in questions]
    how = dict(max_tokens=tokens, temperature=0, logprobs=20)
    def written(answers): return sum(a.usage.completion_tokens for a in answers)
    few = max(1, len(questions)//4)  # slow ones write a part
    return {'generate, one after the other': lambda: sum(padded(teacher, [p], tokens) for p in prompts[:few]),
            'generate, one padded batch': lambda: padded(teacher, prompts, tokens),
            'the teacher, one after the other': lambda: written([teacher.generate(q, **how) for q in questions[:few]]),
            'the teacher, together': lambda: written(teacher.generate_batch(questions, **how))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', action='store_true')
    parser.add_argument('--questions', type=int, default=16)
    parser.add_argument('--tokens', type=int, default=64)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    questions = [f'Explain in a few sentences why the number {i} is interesting.' for i in range(args.questions)]
    with LocalTeacher('smollm2', device='cpu', dtype=getattr(torch, args.dtype)) as teacher:
        compared, speeds = ways(teacher, questions, args.tokens), {}
        teacher.generate(questions[0], max_tokens=2)  # what is done once
        for _ in range(args.rounds):
            for name, work in compared.items():
                began = time.perf_counter()
                speeds.setdefault(name, []).append(work()/(time.perf_counter() - began))
    median = {name: statistics.median(v) for name, v in speeds.items()}
    base = median['generate, one after the other']
    if args.json: print(json.dumps({name: {'tokens_per_s': v, 'ratio': v/base} for name, v in median.items()})); return
    print(f'{args.questions} questions, {args.tokens} tokens each, {args.dtype}, median of {args.rounds} rounds')
    print('| who writes | tokens/s | ratio |\n|---|---|---|')
    for name, v in median.items(): print(f'| {name} | {v:.0f} | {v/base:.1f} |')


if __name__ == '__main__': main()
