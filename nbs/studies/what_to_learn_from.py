"""What is it worth to keep more than the text? The long part of what_to_learn_from.ipynb.

    python nbs/studies/what_to_learn_from.py --out study

One teacher (SmolLM2-135M-Instruct), one student (10 of its 30 layers), the same answers read once by everyone;
what differs is what is known of the teacher at each token. Takes about two hours on 2 cores; stopped, the same command
goes on. --results writes what the notebook reads.
"""
import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from llm_distill import collect, create_teacher, evaluate, make_examples, prune
from llm_distill.capture import capture
from llm_distill.evaluate import FIGURES, Scores
from llm_distill.models import find_model, load_model, load_tokenizer
from llm_distill.progress import Progress
from llm_distill.rollout import as_examples, prompts_of, write_ids
from llm_distill.serving.process import serve
from llm_distill.targets import collate
from llm_distill.train import DistillConfig, DistillTrainer

SUBJECTS = '''rain, snow, wind, thunder, the moon, the sun, a comet, the sea, a river, a lake, a desert, a forest,
a mountain, a volcano, an island, a cave, a glacier, a swamp, a meadow, a canyon, a horse, a cat, a dog, a cow, a wolf,
a fox, a bear, an owl, an eagle, a penguin, a whale, a shark, a salmon, a frog, a snake, a turtle, a bee, an ant,
a butterfly, a spider, an oak, a rose, a cactus, wheat, rice, an apple, a banana, a tomato, a potato, an onion, bread,
cheese, butter, soup, coffee, tea, honey, salt, sugar, chocolate, a bicycle, a train, an airplane, a ship, a bridge,
a road, a tunnel, a castle, a library, a school, a hospital, a museum, a market, a farm, a lighthouse, a clock,
a mirror, a candle, a lamp, a camera, a telescope, a microscope, a computer, a telephone, a radio, a piano, a violin,
a drum, a painting, a poem, a map, a coin, a key, a ladder, a hammer, a needle, glass, steel, paper, wool, leather,
gold, electricity, gravity, magnetism, heat, sound, light, memory, sleep, friendship, courage, patience, money,
a budget, an election, a law, a festival, a holiday, football, chess'''
FORMS = ('Explain in simple words what {} is.', 'Tell me three facts about {}.', 'Write a short story about {}.',
         'Write a sentence about {} and another one that says the opposite.', 'Why do people care about {}?',
         'Ask me a question about {} and answer it yourself.', 'What would a child like to know about {}?',
         'Write the first lines of a letter about {}.')
LONGEST, BATCH, DRAWS = 80, 8, 50  # tokens of an answer, answers of a batch, draws of a sample


def questions() -> tuple[list[str], list[str]]:
    "To learn from and to be judged by; every sixth subject is kept for the second."
    subjects = [s.strip() for s in SUBJECTS.replace('\n', ' ').split(',')]
    sides = ([s for i, s in enumerate(subjects) if (i % 6 == 5) == side] for side in (False, True))
    return tuple([form.format(s) for s in side for form in FORMS] for side in sides)


class Renormalised(Dataset):
    "Targets whose k tokens share all of the probability, as if there were no others."
    def __init__(self, shards): self.shards = shards
    def __len__(self): return len(self.shards)
    def __getitem__(self, i):
        example = self.shards[i]
        logs = example['top_logprobs']
        with np.errstate(divide='ignore', invalid='ignore'):
            logs = np.where(example['soft'][:, None], logs - np.logaddexp.reduce(logs, 1, keepdims=True), logs)
        return example | {'top_logprobs': logs}


def other_tokenizer(answers, like, size: int = 6000) -> PreTrainedTokenizerFast:
    "Byte-level BPE trained on what was said; template and special tokens are those of `like`."
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
    texts = (m['content'] for a in answers for m in [*a.messages, {'content': a.text}])
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token='<|im_end|>', pad_token='<|im_end|>',
                                   bos_token='<|im_start|>')
    made.chat_template = like.chat_template
    return made


def speaking(student, old, new):
    "The student with an embedding for each of the new tokens: the mean of those that wrote it before."
    student, before = copy.deepcopy(student), student.get_input_embeddings().weight.detach().clone()
    words = [new.convert_ids_to_tokens(i) if i in new.all_special_ids else new.decode([i]) for i in range(len(new))]
    student.resize_token_embeddings(len(new), mean_resizing=False)
    with torch.no_grad():
        for i, word in enumerate(words):
            pieces = old(word, add_special_tokens=False).input_ids
            if pieces: student.get_input_embeddings().weight[i] = before[pieces].mean(0)
    end = new.convert_tokens_to_ids('<|im_end|>')
    student.config.eos_token_id = student.generation_config.eos_token_id = end
    student.config.pad_token_id = student.generation_config.pad_token_id = end
    return student


@dataclass
class Arm:
    "One way to learn."
    label: str
    data: Callable                # Of the seed: examples, or a Dataset of them
    settings: dict = field(default_factory=dict)
    teacher: object = None        # In memory
    finish: dict|None = None      # Settings of the last quarter, in which the student writes itself
    other: bool = False           # In the other tokenizer
    stored: Callable|None = None  # Bytes of targets on disk


class Study:
    "What all arms share."
    def __init__(self, out: Path, size: int|None):
        self.out, show = out, Progress()
        out.mkdir(parents=True, exist_ok=True)
        place = find_model('smollm2')
        self.teacher, self.tokenizer = load_model(place), load_tokenizer(place)
        learn, judge = (side[:size] for side in questions())
        asked = dict(logprobs=20, max_tokens=LONGEST, temperature=1., keep_cut=True, on_event=show, concurrency=32,
                     on_error='raise')
        with serve(place, batch_size=32, dtype='float32') as server, \
                create_teacher('openai-compatible', base_url=server.url, cache_as='smollm2', timeout=600) as t:
            answers = list(collect(learn + judge, t, out/'cache.db', **asked))
        show.close()
        self.answers, self.judged = ([a for a in answers if a.prompt in set(side)] for side in (learn, judge))
        self.examples, self.heldout = (make_examples(a, self.tokenizer) for a in (self.answers, self.judged))
        self.student = prune(self.teacher, keep_every=3)
        self.other = other_tokenizer(self.answers, self.tokenizer)
        self.heldout_bytes = sum(len(a.text.encode()) for a in self.judged)
        self.taught = sum(int((e['labels'] != -100).sum()) for e in self.examples)

    def kept(self, name: str, **how):
        return capture(self.teacher, self.examples, self.out/name, self.tokenizer, **how)

    def sample(self, seed: int): return self.kept(f'sampled-{seed}', kind='sampled', draws=DRAWS, seed=seed)
    def topk(self, k: int, seed: int = 0): return self.kept(f'top-{k}', kind='topk', k=k)
    def text(self, seed: int = 0): return self.examples

    def foreign(self, seed: int = 0, **aligning): return make_examples(self.answers, self.other, **aligning)

    def size(self, make) -> int: return sum(f.stat().st_size for f in make(0).folder.iterdir())

    def arms(self) -> dict[str, Arm]:
        spans = partial(self.foreign, every_span=True)
        only, text = {'alpha': 1., 'beta': 0.}, {'alpha': 0., 'beta': 1.}
        top5, top20 = partial(self.topk, 5), partial(self.topk, 20)
        on_policy = {'lmbda': 1., 'rollout_tokens': LONGEST, 'learning_rate': 2e-4}
        return {
            'text': Arm('text only', self.text, text),
            'top5': Arm('top-5 and tail', top5, only, stored=top5),
            'top20': Arm('top-20 and tail', top20, only, stored=top20),
            'top20_text': Arm('top-20 and tail 0.8, text 0.2 (default)', top20, stored=top20),
            'no_tail': Arm('top-20 without tail', lambda seed: Renormalised(top20()), only, stored=top20),
            'sampled': Arm(f'RS-KD, {DRAWS} draws', self.sample, only, stored=self.sample),
            'full': Arm('all logits', self.text, only, self.teacher),
            'on_policy': Arm('top-20, last quarter on-policy', top20, only, finish=on_policy, stored=top20),
            'packed': Arm('top-20, packed', top20, only | {'packing': True, 'max_length': 512}, stored=top20),
            'other_text': Arm('other tokenizer: text only', self.foreign, text, other=True),
            'other_top20': Arm('other tokenizer: top-20, aligned', self.foreign, only, other=True),
            'other_spans': Arm('other tokenizer: spans (ALM)', spans, only, other=True),
        }

    def run(self, arm: Arm, seed: int) -> dict:
        "Train and judge one student."
        torch.manual_seed(seed)
        tokenizer, student = self.tokenizer, copy.deepcopy(self.student)
        if arm.other: tokenizer, student = self.other, speaking(student, self.tokenizer, self.other)
        data = arm.data(seed)
        parts = [(data, arm.settings, arm.teacher)]
        if arm.finish:
            order = np.random.default_rng(seed).permutation(len(data))
            cut = len(data)*3//4
            parts = [([data[int(i)] for i in order[:cut]], arm.settings, None),
                     ([data[int(i)] for i in order[cut:]], arm.settings | arm.finish, self.teacher)]
        seconds, steps = 0., 0
        for data, settings, teacher in parts:
            sizes = {'num_train_epochs': 1, 'per_device_train_batch_size': BATCH, 'seed': seed, 'logging_steps': 1}
            trainer = DistillTrainer(student, DistillConfig(str(self.out/'run'), **sizes | settings), data,
                                     tokenizer, teacher=teacher)
            began = time.perf_counter()
            trainer.train()
            seconds, steps = seconds + time.perf_counter() - began, steps + trainer.state.global_step
        told = {'seconds': seconds, 'steps': steps, 'curve': trainer.curve}
        return told | self.judge(student, arm, tokenizer, own=not seed)

    def judge(self, student, arm: Arm, tokenizer, own: bool) -> dict:
        "On the teacher's text, and if wanted on the student's own."
        if arm.other:
            heldout = make_examples(self.judged, tokenizer)
            scores = evaluate(student, [e | {'soft': np.zeros_like(e['soft'])} for e in heldout], tokenizer)
            return {'scores': scores.as_dict()}
        scores = {'scores': evaluate(student, self.heldout, tokenizer, teacher=self.teacher).as_dict()}
        if not own: return scores
        prompts = prompts_of(collate(self.heldout[::2], tokenizer.pad_token_id))
        torch.manual_seed(0)
        said = [s for i in range(0, len(prompts), 40)
                for s in write_ids(student, prompts[i:i + 40], tokenizer.pad_token_id, LONGEST, 1.)]
        own = evaluate(student, as_examples(prompts, said), tokenizer, teacher=self.teacher)
        return scores | {'own': own.as_dict()}


def totals(runs: list[dict], name: str) -> Scores|None:
    "Of several seeds, prompt by prompt."
    scores = [Scores.from_dict(r[name]) for r in runs if name in r]
    if not scores: return None
    keys = [k for k in scores[0].keys if all(k in s.keys for s in scores)]
    sums = np.stack([[dict(zip(s.keys, s.sums))[k] for k in keys] for s in scores]).mean(0)
    return Scores.of(keys, np.round(sums, 4), exact=scores[0].exact)


def results(study: Study, seeds: int) -> dict:
    "What the notebook reads."
    rows = {}
    for name, arm in study.arms().items():
        files = [study.out/f'{name}-{seed}.json' for seed in range(seeds)]
        runs = [json.loads(f.read_text()) for f in files if f.exists()]
        if not runs: continue
        rows[name] = {
            'label': arm.label, 'seeds': len(runs), 'steps': runs[0]['steps'],
            'seconds': min(r['seconds'] for r in runs),
            'bytes_per_token': study.size(arm.stored)/study.taught if arm.stored else None,
            'kl_of_seeds': [r['scores']['kl'] for r in runs],
            'nats_per_byte_of_seeds': [np.array(r['scores']['sums'])[:, 2].sum()/study.heldout_bytes for r in runs],
            'curve': [[p['step'], round(p.get('kl', p['ce']), 4)] for p in runs[0]['curve']],
            'scores': totals(runs, 'scores').as_dict(), 'own': own.as_dict() if (own := totals(runs, 'own')) else None}
    vocabulary = study.teacher.config.vocab_size
    return {'machine': f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}',
            'date': time.strftime('%Y-%m-%d'), 'answers': len(study.answers), 'taught': study.taught,
            'heldout': len(study.judged), 'heldout_bytes': study.heldout_bytes, 'vocabulary': vocabulary,
            'coverage': study.foreign().counts.coverage, 'arms': rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('study'), help='answers, targets and results')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--arms', help='some of them, with commas')
    parser.add_argument('--size', type=int, help='so many questions on each side, to try it out')
    parser.add_argument('--results', type=Path, help='write what the notebook reads, a JSON file')
    args = parser.parse_args()
    study = Study(args.out, args.size)
    chosen = args.arms.split(',') if args.arms else list(study.arms())
    for seed in range(args.seeds):
        for name in chosen:
            done = args.out/f'{name}-{seed}.json'
            if done.exists(): continue
            found = study.run(study.arms()[name], seed)
            done.write_text(json.dumps(found))
            said = ' '.join(f'{k} {v:.4g}' for k, v in found['scores'].items() if k in FIGURES and v is not None)
            print(f'{name} seed {seed}: {found["seconds"]:.0f} s, {found["steps"]} steps, {said}', flush=True)
    if args.results: args.results.write_text(json.dumps(results(study, args.seeds)))


if __name__ == '__main__': main()
