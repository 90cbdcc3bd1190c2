"Teachers against servers with a real model: our own, and one that we did not write."
import subprocess
import sys
import time

import numpy as np
import pytest
from servers import free_port

from llm_distill import create_teacher, serve
from llm_distill.types import NotGiven

QUESTION = 'What is the capital of France?'


@pytest.fixture(scope='module')
def local():
    with create_teacher('local', 'smollm2') as teacher: yield teacher


def test_our_own_server_and_the_model_in_this_process_say_the_same(local):
    with serve('smollm2', dtype='float32') as server, \
            create_teacher('openai-compatible', base_url=server.url, timeout=300) as teacher:
        asked = dict(max_tokens=12, temperature=0, logprobs=20)
        served, here = teacher.generate(QUESTION, **asked), local.generate(QUESTION, **asked)
        assert (served.text, served.finish_reason, served.usage) == (here.text, here.finish_reason, here.usage)
        assert served.logprobs.tokens == here.logprobs.tokens
        for ours, theirs in zip(served.logprobs.top_logprobs, here.logprobs.top_logprobs):
            np.testing.assert_allclose(ours, theirs, atol=5e-3)
        card = teacher.probe()
        assert (card.max_logprobs, card.logprob_space, card.temperature) == (20, 'raw', 'honoured')
        assert (card.seed, card.n, card.token_bytes, card.prompt_logprobs) == ('honoured', 'honoured', True, True)
        assert teacher.gives == {'text', 'top_logprobs', 'prompt_logprobs'}
        scored, read = teacher.score('Owls hunt at night.'), local.score('Owls hunt at night.')
        assert scored.logprobs.tokens == read.logprobs.tokens
        np.testing.assert_allclose(scored.logprobs.logprobs[1:], read.logprobs.logprobs[1:], atol=5e-3)


@pytest.fixture(scope='module')
def llama():
    "The URL of `python -m llama_cpp.server` on the teacher from PyPI."
    pytest.importorskip('starlette_context', reason='needs the extra "bench"')
    from llm_distill.models import _smollm2_gguf
    port = free_port()
    command = [sys.executable, '-m', 'llama_cpp.server', '--model', str(_smollm2_gguf()), '--port', str(port),
               '--logits_all', 'true', '--n_ctx', '1024', '--verbose', 'false']
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f'http://127.0.0.1:{port}/v1'
    try:
        for _ in range(120):
            try: create_teacher('llama.cpp', base_url=url, max_retries=0).generate('Hi', max_tokens=1); break
            except ConnectionError: time.sleep(.5)
            if server.poll() is not None:
                pytest.skip(f'llama_cpp crashes on this machine (exit {server.returncode}): rebuild llama-cpp-python '
                            'with CMAKE_ARGS=-DGGML_NATIVE=OFF')
        yield url
    finally: server.kill(); server.wait()


@pytest.mark.slow
def test_llama_cpp_answers_with_logprobs(llama):
    with create_teacher('llama.cpp', base_url=llama, timeout=120) as teacher:
        assert teacher.model.endswith('.gguf')
        answer = teacher.generate(QUESTION, max_tokens=12, temperature=0, logprobs=5)
        assert answer.text and answer.usage.completion_tokens
        assert b''.join(answer.logprobs.tokens).decode() == answer.text
        assert all(len(row) == 5 for row in answer.logprobs.top_logprobs)


@pytest.mark.slow
def test_llama_cpp_scores_a_text_one_place_too_late_and_that_is_noticed(llama):
    with create_teacher('llama.cpp', base_url=llama, timeout=120) as teacher:
        with pytest.raises(NotGiven, match='these give it'): teacher.score('The sky is blue because', top_k=5)


@pytest.mark.slow
def test_what_llama_cpp_really_does(llama):
    with create_teacher('llama.cpp', base_url=llama, timeout=120) as teacher: card = teacher.probe()
    assert card.max_logprobs >= 5 and card.temperature == 'honoured' and card.seed == 'honoured' and card.usage
    assert not card.prompt_logprobs and card.n == 'ignored'
