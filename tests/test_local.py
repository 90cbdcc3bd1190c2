"Local teachers of several architectures: crowds, people who leave, threads and memory that are given back."
import asyncio
import gc
import pickle
import random
import threading
import time

import pytest
import torch
import transformers

from llm_distill.models import load_tokenizer
from llm_distill.teachers.local import LocalTeacher
from llm_distill.types import BadInput, BadReply, TeacherTimeout

COMMON = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
              eos_token_id=2, max_position_embeddings=512)
GROUPED = COMMON | dict(num_key_value_heads=2)
# Some that the engine serves, and some that write one answer after the other: capped scores, positions by slopes,
# states in place of keys, a window that is shorter than an answer
FAMILIES = {'Llama': GROUPED, 'Qwen3': GROUPED | dict(head_dim=8), 'Gemma2': GROUPED | dict(head_dim=8),
            'GPTNeoX': COMMON, 'Bloom': dict(hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=2),
            'Mamba': dict(hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0, eos_token_id=2),
            'Mistral': GROUPED | dict(sliding_window=16)}
QUESTIONS = ['Hi', 'What is the capital of Peru?', 'Name three colours, please, and say where they are found.', 'Why?']


@pytest.fixture(scope='module')
def tokenizer():
    return load_tokenizer('smollm2')


def tiny(family, tokenizer):
    torch.manual_seed(0)
    config = getattr(transformers, f'{family}Config')(vocab_size=len(tokenizer), **FAMILIES[family])
    name = f'{family}ForCausalLM'
    model = getattr(transformers, name)(config).eval()
    for p in model.parameters(): p.data.mul_(4)  # so that it is surer of what comes next
    return model


def teacher(family, tokenizer, **more): return LocalTeacher(tiny(family, tokenizer), tokenizer=tokenizer, **more)


def plain(answer):
    return answer.text, answer.finish_reason, answer.usage, answer.logprobs.tokens, answer.logprobs.logprobs.tolist()


@pytest.mark.parametrize('family', FAMILIES)
def test_a_crowd_gets_what_each_gets_alone(family, tokenizer):
    how = dict(max_tokens=24, temperature=.8, top_p=.95, seed=7, logprobs=3)
    with teacher(family, tokenizer) as t:
        alone = [plain(t.generate(q, **how)) for q in QUESTIONS]
        assert [plain(a) for a in t.generate_batch(QUESTIONS*3, **how)] == alone*3
        async def at_random():
            async def one(question):
                await asyncio.sleep(random.random()/5)
                return plain(await t.agenerate(question, **how))
            return await asyncio.gather(*map(one, QUESTIONS))
        assert asyncio.run(at_random()) == alone


@pytest.mark.parametrize('family', ['Llama', 'Bloom'])
def test_greedy_answers_are_those_of_generate(family, tokenizer):
    with teacher(family, tokenizer) as t:
        for question in QUESTIONS:
            found = t.generate(question, max_tokens=20, temperature=0, logprobs=1)
            ids = tokenizer.apply_chat_template([{'role': 'user', 'content': question}], add_generation_prompt=True,
                                                return_tensors='pt', return_dict=True)['input_ids']
            slow = t.llm.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1]:]
            ends = slow[-1] == t.llm.generation_config.eos_token_id
            assert found.logprobs.tokens == [t.names[i] for i in (slow[:-1] if ends else slow).tolist()]


def test_stop_strings_and_limits(tokenizer):
    with teacher('Llama', tokenizer) as t:
        whole = t.generate('Hi', max_tokens=30, temperature=0).text
        assert len(whole) > 20
        cut = t.generate('Hi', max_tokens=30, temperature=0, stop=[whole[10:14], 'never said'])
        assert whole.startswith(cut.text) and whole[10:14] not in cut.text and cut.finish_reason == 'stop'
        with pytest.raises(BadInput, match='512 tokens at most'): t.generate('word '*600)
        for wrong in ({'top_p': 0}, {'top_p': 1.5}, {'top_k': -1}, {'temperature': -1}, {'max_tokens': 0}):
            with pytest.raises(BadInput, match='temperature and top_k 0 or more'): t.generate('Hi', **wrong)


@pytest.mark.parametrize('family', ['GPTNeoX', 'Bloom'])
def test_who_leaves_makes_room(family, tokenizer):
    t = teacher(family, tokenizer, concurrency=1, max_retries=0)
    t.llm.config.max_position_embeddings = 100_000  # GPT-NeoX turns by position and Bloom has slopes: both go on
    t.generate('Hi', max_tokens=1)
    engine = t.writer.open()
    words = engine.words if engine else t.writer._one.words
    words.ends.clear()  # so that an answer lasts
    t.llm.generation_config.eos_token_id, t.timeout = None, .3
    most = 3500 if engine else 50_000
    with pytest.raises(TeacherTimeout): t.generate('Hi', max_tokens=most, seed=1)
    t.timeout, began = 60, time.monotonic()
    t.generate('Hi', max_tokens=2)
    assert time.monotonic() - began < 5
    if engine: assert engine.stats.tokens < most and not engine.load['running']
    t.close()


def test_a_model_that_fails_on_a_request(tokenizer):
    with teacher('Llama', tokenizer) as t:
        t.generate('Hi', max_tokens=2)
        weight = t.llm.lm_head.weight.data
        held = weight.clone()
        weight.fill_(float('nan'))
        with pytest.raises(BadReply, match='failed on this request'): t.generate('Hi', max_tokens=2)
        weight.copy_(held)
        assert t.generate('Hi', max_tokens=5, temperature=0).usage.completion_tokens > 0


def engines(): return [thread for thread in threading.enumerate() if thread.name == 'engine' and thread.is_alive()]


def test_a_teacher_that_nobody_holds_leaves_no_thread(tokenizer):
    before = len(engines())
    t = teacher('Llama', tokenizer)
    t.generate('Hi', max_tokens=2)
    assert len(engines()) == before + 1
    del t
    gc.collect()
    for _ in range(100):
        if len(engines()) == before: return
        time.sleep(.1)
    raise AssertionError('the thread of its engine is still there')


def test_a_copy_by_pickle_answers_alike(tokenizer):
    with teacher('Llama', tokenizer) as t:
        first = t.generate('Hi', max_tokens=8, seed=1).text
        with pickle.loads(pickle.dumps(t)) as twin: assert twin.generate('Hi', max_tokens=8, seed=1).text == first


def test_a_student_may_train_on_while_it_answers(tokenizer):
    "The weights are shared, and neither attention nor gradients of the model change."
    model = tiny('Llama', tokenizer)
    how, ids = model.config._attn_implementation, tokenizer('The owl flies at night.', return_tensors='pt')['input_ids']
    with LocalTeacher(model, tokenizer=tokenizer) as t:
        before = t.generate('Hi', max_tokens=12, temperature=0).text
        descent = torch.optim.Adam(model.train().parameters(), .01)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            descent.step()
            t.generate('Hi', max_tokens=12, temperature=0)
        after = t.generate('Hi', max_tokens=12, temperature=0).text
        assert model.training and model.config._attn_implementation == how
    with LocalTeacher(model, tokenizer=tokenizer) as fresh:
        assert fresh.generate('Hi', max_tokens=12, temperature=0).text == after != before
