"""Answers of a teacher with another tokenizer, brought into a student's tokens: teacher's tokens a second on one core.

    python tests/benchmarks/align.py
"""
import time

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llm_distill.align import Aligner, TokenMap, find_spans
from llm_distill.demo import demo_prompts
from llm_distill.models import load_tokenizer, token_bytes
from llm_distill.packing import as_arrays
from llm_distill.records import Answer
from llm_distill.targets import TargetMaker
from llm_distill.types import Completion, TokenLogprobs, as_messages

K = 20


def foreign(texts, size=3000):
    "A byte-level BPE trained on the texts."
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


def answers(texts, tokenizer, seed=0):
    "Answers with a random top-k, as a provider sends them."
    rng = np.random.default_rng(seed)
    bytes_of = token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    size = len(bytes_of)
    for text in texts:
        ids = tokenizer.encode(text).ids
        logprobs = np.sort(np.log(rng.dirichlet(np.ones(K + 1), len(ids))[:, :K]), 1)[:, ::-1].astype(np.float32)
        others = ((rng.integers(0, size, (len(ids), 1)) + 97*np.arange(K - 1)) % size).tolist()  # no token twice
        top = [[bytes_of[i], *(bytes_of[j] for j in row)] for i, row in zip(ids, others)]
        yield Answer(as_messages('Go on.'), Completion(text, 'stop', logprobs=TokenLogprobs(
            [bytes_of[i] for i in ids], logprobs[:, 0], top, list(logprobs))))


def best(work, n, times=3):
    "Tokens a second of processor time, the best of several."
    seconds = []
    for _ in range(times):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return n/min(seconds)


def table(student, texts, rows):
    "One answer after the other, by step."
    n = sum(len(a.completion.logprobs) for a in rows)
    aligner, maker = Aligner(student, K), TargetMaker(student, K, max_length=10**6)
    packed = [(a.text, as_arrays(a.completion.logprobs, aligner.vocabulary)) for a in rows]
    ids_of = TokenMap(aligner.vocabulary, aligner.id_of)
    sizes = [[np.array([len(t) for t in a.completion.logprobs.tokens]), aligner.cut(a.text).sizes] for a in rows]
    print(f'{n} tokens of the teacher in {len(rows)} answers, top {K}')
    print('| step | tokens/s |\n|---|---|')
    for name, work in {
        'spans alone': lambda: [find_spans(*s) for s in sizes],
        'numbers to ids': lambda: [ids_of(r.numbers) for _, r in packed],
        "the student's tokens alone": lambda: [aligner.cut(text) for text, _ in packed],
        'align, from arrays': lambda: [aligner.arrays(text, r, aligner.vocabulary) for text, r in packed],
        'align, from lists of bytes': lambda: [aligner(a.text, a.completion.logprobs) for a in rows],
        'whole examples': lambda: [maker.example(a) for a in rows],
    }.items(): print(f'| {name} | {best(work, n):,.0f} |')
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in maker.counts.as_dict().items() if v})


if __name__ == '__main__':
    prompts = [p['prompt'] for p in demo_prompts()]
    rng, student, teacher = np.random.default_rng(0), load_tokenizer('smollm2'), foreign(prompts)
    for count, size in ((400, 6), (60, 40)):
        texts = [' '.join(rng.choice(prompts, size)) for _ in range(count)]
        table(student, texts, list(answers(texts, teacher)))
