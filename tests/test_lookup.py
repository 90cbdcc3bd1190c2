"Guesses of what comes next: they save steps, and change nothing that is said."
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, replace

import openai
import pytest
import torch
from conftest import ROOT

from llm_distill import serve
from llm_distill.models import load_model, load_tokenizer
from llm_distill.serving.engine import Engine
from llm_distill.serving.sampling import Sampling

sys.path.insert(0, str(ROOT/'tests/benchmarks'))
from load import tiny_model  # noqa: E402

FEW = {i: 12. for i in range(40, 46)}  # so few tokens are likely that they soon repeat


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tiny_model(tmp_path_factory.mktemp('tiny'))


def some_requests(n: int) -> list[tuple[list[int], Sampling]]:
    rng, out = random.Random(3), []
    kinds = [dict(temperature=0), dict(temperature=.7, logit_bias=FEW), dict(temperature=1., top_p=.8, logit_bias=FEW),
             dict(temperature=0, repetition_penalty=1.1, frequency_penalty=.3), dict(temperature=1.)]
    for i in range(n):
        prompt = [rng.randrange(30, 60) for _ in range(rng.choice((1, 5, 40, 150)))]
        more = {'top_logprobs': 2} if i % 3 else {'prompt_logprobs': 1} if i % 2 else {}
        how = kinds[i % len(kinds)] | more
        out.append((prompt, Sampling(rng.choice((1, 2, 30, 70)), seed=i, ignore_eos=i % 4 > 0, **how)))
    return out


def answers(engine: Engine, requests, at_once: int) -> list[list[tuple]]:
    rng = random.Random(at_once)
    def ask(request):
        said, done = [], threading.Event()
        time.sleep(rng.random()*.02*at_once)
        job = engine.submit(*request, lambda pieces: (said.extend(pieces), said[-1].finish and done.set()))
        if rng.random() < .2:  # somebody who leaves
            gone = engine.submit(request[0], replace(request[1], max_tokens=90), lambda pieces: None)
            time.sleep(.01)
            engine.cancel(gone)
        assert done.wait(120) and [p.id for p in said if p.id >= 0] == job.said
        return [astuple(p) for p in said]
    with ThreadPoolExecutor(at_once) as pool: return list(pool.map(ask, requests))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_nothing_is_said_otherwise_in_any_company(folder, dtype, caplog):
    requests, tokenizer = some_requests(40), load_tokenizer(folder)
    for slots, at_once in ((2, 1), (4, 3), (40, 33)):
        plain, engine = (Engine(load_model(folder, 'cpu', dtype), tokenizer, slots=slots, max_context=256, lookup=on)
                         for on in (False, True))
        expected = answers(plain, requests, 1)
        assert answers(engine, requests, at_once) == expected
        assert not any(piece[5] == 'error' for pieces in expected for piece in pieces)
        for e in (plain, engine): e.close()
        assert not caplog.records and not plain.stats.guesses and 0 < engine.stats.right_guesses < engine.stats.guesses


def test_a_text_that_repeats_itself_takes_fewer_steps(folder):
    engine, told = Engine(load_model(folder, 'cpu'), load_tokenizer(folder), slots=4, max_context=256), []
    done = threading.Event()
    only = Sampling(100, temperature=0, ignore_eos=True, logit_bias={40: 99.})
    engine.submit([40]*9, only, lambda pieces: (told.extend(pieces), done.set()), stream=False)
    assert done.wait(60) and [p.id for p in told] == [40]*100
    engine.close()
    stats = engine.stats
    assert stats.steps + stats.right_guesses == 99 and stats.guesses - 3 <= stats.right_guesses and stats.steps < 40


def test_what_was_said_to_one_is_a_guess_for_the_next(folder):
    "Only an answer, not a prompt; and what is said is what an engine says that guesses nothing."
    prompt, how, said = list(range(30, 70)), Sampling(60, temperature=.8, seed=1, ignore_eos=True), {}
    def ask(engine):
        done, steps = threading.Event(), engine.stats.steps
        job = engine.submit(prompt, how, lambda pieces: done.set(), stream=False)
        assert done.wait(60)
        return job.said, engine.stats.steps - steps
    for lookup in (True, False):
        engine = Engine(load_model(folder, 'cpu'), load_tokenizer(folder), slots=4, max_context=256, lookup=lookup)
        for turn in range(2): said[lookup, turn] = ask(engine)
        engine.close()
        assert bool(engine.phrases.young) == lookup and not engine.phrases.young.get(chr(30) + chr(31) + chr(32))
    assert len({str(text) for text, _ in said.values()}) == 1 and len(set(said[True, 0][0])) > 20
    assert said[False, 0][1] == said[False, 1][1] == 59 and said[True, 1][1] < 25 < said[True, 0][1]


def test_a_server_tells_of_its_guesses_and_can_do_without(folder):
    said = []
    for how in ({}, {'no_lookup': True}):
        with serve(folder, device='cpu', name='m', batch_size=4, **how) as server:
            client = openai.OpenAI(base_url=server.url, api_key='-')
            reply = client.completions.create(model='m', prompt=[40]*9, max_tokens=60, temperature=0, logprobs=2,
                                              logit_bias={'40': 99}, extra_body={'ignore_eos': True})
            said.append(reply.choices[0].model_dump())
            lines = client.get('/../metrics', cast_to=str).splitlines()
            right = next(float(x.split()[-1]) for x in lines if x.startswith('llm_distill_right_guesses_total'))
            assert (right == 0) == bool(how)
    assert said[0] == said[1]
