"""Does a pruned student learn better with its teacher's embeddings frozen? On the demo's answers.

    llm-distill demo && python tests/benchmarks/frozen_embeddings.py llm-distill-demo/cache.db
"""
import sys
import tempfile
import time

import torch

from llm_distill import DistillConfig, DistillTrainer, collect, create_teacher, demo_prompts, evaluate, load_model
from llm_distill import load_tokenizer, prune
from llm_distill.demo import FULL
from llm_distill.models import find_model, fingerprint


def main(cache: str):
    # Everything is in the cache; nobody needs to answer at this address.
    teacher = create_teacher('openai-compatible', 'SmolLM2-135M-Instruct', base_url='http://127.0.0.1:9/v1',
                             cache_as=fingerprint(find_model('smollm2')), max_retries=0)
    answers = collect(FULL.choose(demo_prompts()), teacher, cache, logprobs=20, seed=0, temperature=.7, keep_cut=True,
                      max_tokens=FULL.max_tokens)
    train, heldout = ([a for a in answers if a.meta['split'] == s] for s in ('train', 'heldout'))
    tokenizer, big = load_tokenizer('smollm2'), load_model('smollm2', 'cpu', torch.float32)
    print('| embeddings | learning rate | KL, nats/token | agreement | seconds |\n|---|---|---|---|---|')
    for frozen, rate in ((False, 5e-4), (False, 1e-3), (True, 5e-4), (True, 1e-3)):
        student, started = prune(big, 3), time.perf_counter()
        config = DistillConfig(tempfile.mkdtemp(), max_steps=60, learning_rate=rate,
                               freeze_embeddings=frozen, use_cpu=True)
        DistillTrainer(student, config, train, tokenizer).train()
        seconds, scores = time.perf_counter() - started, evaluate(student, heldout, tokenizer)
        kind = 'frozen' if frozen else 'trained'
        print(f'| {kind} | {rate} | {scores.kl:.2f} | {scores.agreement:.3f} | {seconds:.0f} |')


if __name__ == '__main__': main(sys.argv[1])
