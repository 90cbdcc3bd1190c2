"From answers to targets: the bugs that others have had, foreign tokenizers, chat masks."
import random
import warnings

import numpy as np
import pytest
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llm_distill.align import Aligner, find_spans
from llm_distill.demo import demo_prompts
from llm_distill.models import encode_chat, load_tokenizer, token_bytes
from llm_distill.packing import Vocabulary, as_arrays
from llm_distill.records import Answer
from llm_distill.targets import LowCoverage, TargetMaker, collate, make_examples, shift_check
from llm_distill.types import BadInput, Completion, TokenLogprobs, as_messages

MARKED = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
          "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
          "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
UNMARKED = MARKED.replace('{% generation %}', '').replace('{% endgeneration %}', '')


@pytest.fixture(scope='module')
def student(): return load_tokenizer('smollm2')


@pytest.fixture(scope='module')
def table(student): return token_bytes(student)


@pytest.fixture(scope='module')
def foreign():
    "A byte-level BPE of 3,000 tokens, trained on the demo's prompts and our own words."
    texts = [p['prompt'] for p in demo_prompts()] + [p.read_text() for p in (ROOT/'llm_distill').glob('*.py')]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=3000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def told(*places):
    "Logprobs from (token, its probability, alternatives with theirs)."
    with np.errstate(divide='ignore'):
        return TokenLogprobs([p[0] for p in places], np.log([p[1] for p in places]), [list(p[2]) for p in places],
                             [np.log(list(p[2].values())) for p in places])


def said(text, rows=None, finish='stop', messages='Go on.'):
    return Answer(as_messages(messages), Completion(text, finish, logprobs=rows))


def spoken_by(tokenizer, text, p=.5):
    "A text in a tokenizer's tokens, each with the same probability."
    names = token_bytes(tokenizer)
    said = [names[i] for i in tokenizer(text)['input_ids']]
    return told(*((t, p, {t: p, b' a' if t == b' the' else b' the': .25}) for t in said))


def taught(example): return example['labels'] >= 0


def slow_groups(teacher, student):
    "Spans from their definition: cut wherever both have a boundary."
    ends = [np.cumsum([len(t) for t in tokens]).tolist() for tokens in (teacher, student)]
    groups, begin = [], 0
    for cut in sorted(set(ends[0]) & set(ends[1]) - {0}):
        groups.append([[i for i, (e, t) in enumerate(zip(side, tokens)) if begin < e <= cut and t]
                       for side, tokens in zip(ends, (teacher, student))])
        begin = cut
    return groups


def test_gold_a_bos_does_not_shift_the_alignment():
    "trl#4392: a BOS on one side was counted as a token, and everything after it was one off."
    spans = find_spans(np.array([0, 3, 4]), np.array([3, 4]))
    assert spans.source.tolist() == [1, 2] and spans.teacher.tolist() == [-1, 0, 1]


def test_gold_parts_of_characters_are_not_taken_for_characters(student, table):
    "trl#4393: tokens within one character have equal character offsets."
    text = '日本語 🙂 é'
    rows = told(*((bytes([b]), .5, {}) for b in text.encode()))
    got = Aligner(student, 2)(text, rows)
    assert b''.join(table[i] for i in got.ids) == text.encode()
    assert got.nbytes['label'] == 0 and sum(got.nbytes.values()) == len(text.encode())
    given = np.nansum(got.span_logprob) + got.top_logprobs[got.soft, 0].sum()
    assert given == pytest.approx(len(text.encode())*np.log(.5))


def test_rows_are_not_shifted_by_one(student, foreign):
    "ms-swift#8436, fmchisel#23, ModelOpt#1191."
    text = ' '.join(p['prompt'] for p in demo_prompts()[:6])
    for teacher in (student, foreign):
        examples = make_examples([said(text, spoken_by(teacher, text))], student, top_k=2)
        rates = shift_check(examples)
        assert rates[0] == 1 and max(rates[-1], rates[1]) < .1
        for by in (-1, 1):
            wrong = dict(examples[0], top_ids=np.roll(examples[0]['top_ids'], by, 0))
            with pytest.raises(BadInput, match='shifted'): shift_check([wrong])


def test_the_stop_token_is_taught_and_the_newline_after_it_is_not(student):
    "trl#5988: the student never learned to stop."
    for rows in (None, spoken_by(student, 'Four.')):
        example, = make_examples([said('Four.', rows)], student)
        assert example['input_ids'][-1] == example['labels'][-1] == student.eos_token_id and not example['soft'][-1]
        cut, = make_examples([said('Four.', rows, 'length')], student)
        assert len(cut['labels']) == len(example['labels']) - 1
    with_end = told((b'Four', .5, {}), (b'.', .5, {}), (b'<|im_end|>', .9, {}))  # a server that reports it, too
    assert make_examples([said('Four.', with_end)], student)[0]['labels'].tolist() == example['labels'].tolist()


def test_the_end_is_the_templates_own(student):
    tokenizer = load_tokenizer('smollm2')
    tokenizer.eos_token = '<|endoftext|>'
    example, = make_examples([said('Four.')], tokenizer)
    assert tokenizer.convert_ids_to_tokens([example['labels'][-1]]) == ['<|im_end|>']


@pytest.mark.parametrize('template', [MARKED, UNMARKED], ids=['marked', 'by-difference'])
def test_masks_equal_those_of_the_template(template):
    tokenizer, marked = load_tokenizer('smollm2'), load_tokenizer('smollm2')
    tokenizer.chat_template, marked.chat_template = template, MARKED
    talk = [{'role': 'system', 'content': 'Be kind.'}]
    for i, word in enumerate(['Grüße 日本', 'Hello', 'Hello', 'a\n\nb ']):
        talk += [{'role': 'user', 'content': f'{word}?'}, {'role': 'assistant', 'content': f'{word} {i}'}]
    read = marked.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
    example, = make_examples([said(talk[-1]['content'], messages=talk[:-1])], tokenizer, train_on='all')
    n = len(example['labels'])
    assert example['input_ids'].tolist() == read['input_ids'][:n]
    assert taught(example).tolist() == [bool(m) for m in read['assistant_masks'][:n]]
    assert marked.decode(read['input_ids'][n:]) == '\n' and not any(read['assistant_masks'][n:])
    last, = make_examples([said(talk[-1]['content'], messages=talk[:-1])], tokenizer)
    assert 0 < taught(last).sum() < taught(example).sum() == sum(read['assistant_masks'])


def test_every_example_is_taught_something(student):
    "A template without marks gave masks of zeros, with a line in the log."
    answers = [said(text, messages=q) for text in ('x', 'a\nb', '日') for q in ('Hi', [
        *as_messages('Hi'), {'role': 'assistant', 'content': 'Yes'}, *as_messages('And?')])]
    for train_on in ('last', 'all'):
        assert all(taught(e).sum() > 0 for e in make_examples(answers, student, train_on=train_on))


def test_sentinels_are_no_probabilities(student):
    rows = TokenLogprobs([b'Hi', b'!'], np.array([-.5, -9999.]), [[b'Hi', b'Ho'], [b'.', b'?']],
                         [np.array([-.5, -9999.]), np.array([-.1, -3.])])
    example, = make_examples([said('Hi!', rows, 'length')], student, top_k=3)
    values = example['top_logprobs'][example['soft']]
    assert np.isfinite(values).sum(1).tolist() == [1, 2] and values[np.isfinite(values)].min() > -10
    spelled = TokenLogprobs([b'H', b'i'], np.array([-.5, -9999.]), [[], []], [np.zeros(0)]*2)
    with pytest.warns(LowCoverage): lost, = make_examples([said('Hi', spelled, 'length')], student)
    assert 'span' not in lost and not lost['soft'].any()


def test_what_was_said_is_listed_though_unlikely(student):
    row = {t: p for t, p in zip((b'Red', b'Green', b'Black'), (.5, .3, .1))}
    example, = make_examples([said('Blue', told((b'Blue', .01, row)), 'length')], student, top_k=3)
    place = taught(example).argmax()
    assert student.batch_decode(example['top_ids'][place][:, None]) == ['Red', 'Green', 'Blue']
    assert np.exp(example['top_logprobs'][place]) == pytest.approx([.5, .3, .01])
    alone, = make_examples([said('Blue', told((b'Blue', .25, {})), 'length')], student, top_k=3)
    assert alone['soft'][-1] and np.exp(alone['top_logprobs'][-1]) == pytest.approx([.25, 0, 0])


def test_equal_bytes_are_added_and_what_is_missing_is_the_tail(student):
    rows = TokenLogprobs([b'Hi'], np.log([.5]), [[b'Hi', b'Ho', b'Hi', b'\xff\xfe']], [np.log([.5, .2, .1, .1])],
                         [np.array([1, 2, 3, 4])])
    example, = make_examples([said('Hi', rows, 'length')], student, top_k=4)
    assert np.exp(example['top_logprobs'][-1]) == pytest.approx([.6, .2, 0, 0])


def test_a_stripped_leading_space(student, table):
    rows = told((b' Four', .5, {b' Four': .5, b' Five': .25}), (b'.', .5, {}))
    example, = make_examples([said('Four.', rows, 'length')], student, top_k=2)
    assert student.decode(example['labels'][taught(example)]) == 'Four.' and example['soft'][taught(example)].all()
    assert [table[i] for i in example['top_ids'][taught(example)][0]] == [b'Four', b'Five']


def test_hidden_thoughts_and_trailing_spaces_are_not_taught(student):
    rows = told((b'hm', .5, {}), (b'</think>', .5, {}), (b'Four', .5, {}), (b'.\n', .5, {}))
    example, = make_examples([said('Four.', rows, 'length')], student)
    assert student.decode(example['labels'][taught(example)]) == 'Four.'
    assert example['soft'][taught(example)].tolist() == [True, False]  # ".\n" is another choice than "."


def test_the_chat_template_is_the_students(student, foreign):
    "ATLAS#45."
    foreign.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    example, = make_examples([said('Four.', spoken_by(foreign, 'Four.'))], student)
    prompt = encode_chat(student, as_messages('Go on.'))
    assert example['input_ids'][:len(prompt)].tolist() == prompt and not taught(example)[:len(prompt)].any()


def test_control_tokens_in_a_text_are_text(student):
    example, = make_examples([said('Write <|im_end|> to stop.')], student)
    assert (example['labels'] == student.eos_token_id).sum() == 1


def test_a_teacher_that_spells_does_not_teach_spelling(student):
    text = 'The quick brown fox'
    example, = make_examples([said(text, told(*((b'%c' % c, .5, {}) for c in text.encode())), 'length')], student)
    assert example['labels'][taught(example)].tolist() == student(text)['input_ids']


def test_the_teachers_own_cut_is_kept(student, table):
    "Sampled tokens may differ from how the tokenizer would cut the text."
    ids = student('Colours are seen by light that is not absorbed by things, they say, all of them')['input_ids']
    odd = [*ids[:-1], *student(' th', add_special_tokens=False)['input_ids'], *student('em')['input_ids']]
    rows = told(*((table[i], .5, {table[i]: .5}) for i in odd))
    example, = make_examples([said(student.decode(odd), rows, 'length')], student)
    assert example['labels'][taught(example)].tolist() == odd and example['soft'][taught(example)].all()


def test_a_tokenizer_that_changes_the_text_falls_back_and_says_so():
    made = Tokenizer(models.WordLevel({'<unk>': 0, 'hello': 1, '</s>': 2}, unk_token='<unk>'))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    lower = PreTrainedTokenizerFast(tokenizer_object=made, eos_token='</s>')
    answer = said('HELLO', told((b'HEL', .5, {}), (b'LO', .5, {})))
    with pytest.warns(LowCoverage): examples = make_examples([answer], lower)
    assert examples.counts.lost == 1 and examples.counts.coverage == 0
    assert examples[0]['labels'][-2:].tolist() == [1, 2] and not examples[0]['soft'].any()


def random_text(rng):
    "Unicode with all that is awkward: marks, emoji sequences, controls, spaces, right-to-left."
    anything = [chr(rng.choice([rng.randrange(0x20, 0xd800), rng.randrange(0xe000, 0x40000)])) for _ in range(8)]
    alphabets = ('abc XYZ', '0123456789', ' \t\n\u00a0\u200b', 'äßçñ\u0301\u0308', '日本語한국', '🙂👩\u200d👧🏽',
                 'אבגمرحبا', '\x00\x7f"\\<>|', anything)
    return ''.join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(1, 40)))


def test_nothing_is_grouped_wrongly_in_a_thousand_odd_texts(student, table, foreign):
    rng, names = random.Random(0), token_bytes(foreign)
    aligner, lost = Aligner(student, 2, align='bytes'), 0
    for _ in range(1000):
        text = random_text(rng)
        tokens = [names[i] for i in foreign(text)['input_ids']]
        if rng.random() < .3: tokens = [bytes([b]) for b in text.encode()]
        probabilities = [rng.uniform(.1, 1) for _ in tokens]
        got = aligner(text, told(*((t, p, {}) for t, p in zip(tokens, probabilities))))
        mine = [table[i] for i in got.ids]
        if got.road == 'lost':  # SmolLM2 has no token for some bytes, and leaves such characters out
            assert b''.join(mine) != text.encode() and not got.soft.any() and (got.span == -1).all()
            lost += 1
            continue
        assert b''.join(mine) == text.encode() and got.nbytes['label'] == 0
        for n, (theirs, ours) in enumerate(slow_groups(tokens, mine)):
            assert b''.join(tokens[i] for i in theirs) == b''.join(mine[i] for i in ours)
            expected = np.log([probabilities[i] for i in theirs]).sum()
            if len(theirs) == len(ours) == 1:
                assert got.soft[ours[0]] and got.top_logprobs[ours[0], 0] == pytest.approx(expected, rel=1e-4)
            else:
                assert set(got.span[ours]) == {n} and not got.soft[ours].any()
                assert got.span_logprob[ours[-1]] == pytest.approx(expected, rel=1e-4)
                assert np.isnan(got.span_logprob[ours[:-1]]).all()
    assert lost < 20


def test_texts_cut_within_a_character(student):
    for text in ('日本', 'a🙂'):
        data = text.encode()[:-1]
        rows = told(*((bytes([b]), .5, {}) for b in data))
        example, = make_examples([said(data.decode('utf-8', 'replace'), rows, 'length')], student)
        assert text.startswith(student.decode(example['labels'][taught(example)]).rstrip('\ufffd'))


def test_a_foreign_teacher_on_real_text(student, foreign):
    "Shares of exact, spans and text add up; nothing is lost; what cannot be mapped is in the tail."
    rng, names = np.random.default_rng(0), token_bytes(foreign)
    def rows(text):
        ids = foreign(text)['input_ids']
        p = np.sort(rng.dirichlet(np.ones(6), len(ids))[:, :5], 1)[:, ::-1]
        return told(*((names[i], q[0], dict(zip([names[i], *(names[j] for j in rng.permutation(len(names))[:4])], q)))
                      for i, q in zip(ids, p)))
    texts = [' '.join(p['prompt'] for p in demo_prompts()[i:i + 3]) for i in range(0, 60, 3)]
    answers = [said(t, rows(t)) for t in texts]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        examples = make_examples(answers, student, top_k=5)
    counts = examples.counts
    assert counts.exact_bytes + counts.span_bytes + counts.label_bytes == sum(len(t.encode()) for t in texts)
    assert counts.coverage == 1 and counts.aligned == 20 and counts.exact_bytes > counts.span_bytes > 0
    assert counts.taught == counts.soft + counts.spanned + 20  # the ends of the turns
    assert .5 < counts.mapped < 1
    for e, text in zip(examples, texts):
        assert student.decode(e['labels'][taught(e)]) == text + '<|im_end|>'
        assert (np.exp(e['top_logprobs'][e['soft']].astype(np.float64)).sum(1) <= 1 + 1e-5).all()
        if 'span' not in e: continue
        ends = np.isfinite(e['span_logprob'])
        assert sorted(e['span'][ends]) == sorted(set(e['span'][e['span'] >= 0]))
    batch = collate(examples[:3], 0)
    assert batch['span'].shape == batch['labels'].shape and (batch['span'][batch['labels'] == -100] == -1).all()


def test_arrays_of_a_cache_give_the_same(student, foreign):
    text = 'How do bees make honey?'
    aligner, vocabulary = Aligner(student, 2), Vocabulary()
    one = aligner.arrays(text, as_arrays(spoken_by(foreign, text), vocabulary), vocabulary)
    other = aligner(text, spoken_by(foreign, text))
    assert one.ids.tolist() == other.ids.tolist() and np.array_equal(one.top_logprobs, other.top_logprobs)


def test_equal_draws_are_one_example_with_their_number(student):
    draws = [said(t) for t in ('Blue', 'Red', 'Blue')] + [said('Blue', messages='Another question')]
    examples = make_examples(draws, student)
    assert [float(e['weight']) for e in examples] == [2, 1, 1] and examples.counts.merged == 1
    maker = TargetMaker(student)
    stream = maker.stream(iter(draws))
    assert float(next(stream)['weight']) == 2 and maker.counts.answers == 3  # the first question alone was read
    assert collate(examples, 0)['weight'].tolist() == [2, 1, 1]


def test_what_is_cut_is_counted_and_said(student):
    text, heard = ' '.join(['word']*50), []
    whole, = make_examples([said(text)], student)
    examples = make_examples([said(text), said('')], student, max_length=40, warn=heard.append)
    assert examples.counts.cut_tokens == len(whole['labels']) - 40 and examples.counts.skipped == 1
    assert len(heard) == 1 and str(examples.counts.cut_tokens) in heard[0]
