"Encoder-decoders and speech behind the API: what `generate` says, what SDKs see, who disturbs whom, what is refused."
import asyncio
import importlib.util
import io
import json
import random
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import openai
import pytest
import small
import soundfile
import torch
import transformers
import uvicorn
from llm_distill.serving import seq2seq, speech
from llm_distill.serving.app import create_app
from llm_distill.serving.sampling import Sampling
from llm_distill.serving.seq2seq import Seq2SeqEngine, kind_of
from llm_distill.serving.speech import SpeechService, Transcriber
from llm_distill.types import BadInput, NoSuchModel, ServerBusy
from openai.types.audio import Transcription, TranscriptionVerbose


@contextmanager
def served(service, **options):
    "The address of a service while it is served."
    server = uvicorn.Server(uvicorn.Config(create_app(service, **options), port=0, log_level='error'))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started: time.sleep(.01)
    try: yield f'http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1'
    finally: server.should_exit = True; thread.join()


def sdk(url, **how): return openai.OpenAI(base_url=url, api_key='none', max_retries=0, timeout=60, **how)


def idle(engine, seconds=20):
    until = time.monotonic() + seconds
    while sum(engine.load.values()) and time.monotonic() < until: time.sleep(.01)
    return not sum(engine.load.values())


def status(error): return error.value.status_code, error.value.body['param']


# -- text: the engine --------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tokenizer(): return small.tokenizer()


def answer(engine, ids, sampling):
    "Token ids and text of one answer."
    done, said = threading.Event(), []
    engine.submit(ids, sampling, lambda pieces: (said.extend(pieces), done.set()), stream=False)
    assert done.wait(60)
    return [p.id for p in said if p.id >= 0], ''.join(p.text for p in said)


def slowly(model, tokenizer, ids, n=14, **how):
    out = model.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, forced_eos_token_id=None, **how)
    return out[0, 1:].tolist(), tokenizer.decode(out[0], skip_special_tokens=True)


@pytest.mark.parametrize('family', small.FAMILIES)
def test_greedy_is_what_generate_says_with_random_arrivals(family, tokenizer):
    model, rng = small.untaught(family, len(tokenizer)), random.Random(0)
    model.generation_config.no_repeat_ngram_size = 2  # or some would say one thing again and again
    prompts = [tokenizer(q)['input_ids'] for q in [*small.ANSWERS, 'good', 'It is the sea of Paris, thank you, danke']]
    slow = [slowly(model, tokenizer, p) for p in prompts]
    assert len({tuple(ids) for ids, _ in slow}) > 2, 'these weights say always the same'
    engine = Seq2SeqEngine(model, tokenizer, slots=3, max_context=64)
    def ask(i):
        time.sleep(rng.random()*.1)
        return answer(engine, prompts[i], Sampling(14, 0.))
    with ThreadPoolExecutor(12) as pool: answers = list(pool.map(ask, [*range(len(prompts))]*2))
    engine.close()
    assert answers == slow*2


RULES = [{'no_repeat_ngram_size': 2}, {'min_length': 10}, {'min_new_tokens': 9}, {'repetition_penalty': 1.7},
         {'encoder_no_repeat_ngram_size': 2}, {'bad_words_ids': [[7], [9, 11]]}, {'suppress_tokens': [5, 12, 13]},
         {'begin_suppress_tokens': [3, 4, 5, 6]}, {'forced_bos_token_id': 8}, {'forced_bos_token_id': 0},
         {'no_repeat_ngram_size': 3, 'forced_bos_token_id': 8, 'min_length': 5, 'repetition_penalty': 1.2}]


@pytest.mark.parametrize('rules', RULES, ids=str)
def test_the_rules_of_a_model_hold(rules, tokenizer):
    model = small.untaught('Bart', len(tokenizer))
    prompts = [tokenizer(q)['input_ids'] for q in small.ANSWERS]
    for name, value in rules.items(): setattr(model.generation_config, name, value)
    slow = [slowly(model, tokenizer, p) for p in prompts]
    engine = Seq2SeqEngine(model, tokenizer, slots=8, max_context=64)
    with ThreadPoolExecutor(5) as pool: answers = list(pool.map(lambda p: answer(engine, p, Sampling(14, 0.)), prompts))
    engine.close()
    assert answers == slow


def test_a_row_that_fails_takes_nobody_along(tokenizer):
    model, prompts = small.untaught('T5', len(tokenizer)), [tokenizer(q)['input_ids'] for q in small.ANSWERS]
    slow = [slowly(model, tokenizer, p) for p in prompts]
    engine, told, poison = Seq2SeqEngine(model, tokenizer, slots=8, max_context=64), {}, 5
    forward, bad = engine.slots._forward, prompts[2]
    def failing(cohort, cache, tokens):
        out = forward(cohort, cache, tokens)  # the caches have grown already
        if cache.get_seq_length() > poison and (cohort.mask.sum(1) == len(bad)).any(): raise RuntimeError('no memory')
        return out
    engine.slots._forward = failing
    done = [threading.Event() for _ in prompts]
    for i, p in enumerate(prompts):
        engine.submit(p, Sampling(14, 0.), lambda pieces, i=i: (told.update({i: pieces}), done[i].set()), stream=False)
    assert all(d.wait(60) for d in done)
    same = [i for i, p in enumerate(prompts) if len(p) == len(bad)]
    for i, pieces in told.items():
        if i in same: assert pieces[-1].finish == 'error'
        else: assert [p.id for p in pieces] == slow[i][0]
    assert engine.load == {'running': 0, 'waiting': 0, 'tokens': 0} and not engine.slots.live
    engine.close()


def test_the_line_has_an_end(tokenizer):
    model = small.untaught('T5', len(tokenizer))
    engine, ids = Seq2SeqEngine(model, tokenizer, slots=1, max_context=64, queue=1), tokenizer('good day')['input_ids']
    gate = threading.Event()
    blocked = engine.alone(gate.wait)
    engine.submit(ids, Sampling(4), lambda pieces: None)
    with pytest.raises(ServerBusy): engine.submit(ids, Sampling(4), lambda pieces: None)
    while engine._tasks: time.sleep(.01)
    engine.alone(lambda: None)
    with pytest.raises(ServerBusy): engine.alone(lambda: None)
    gate.set()
    blocked.result(20)
    assert idle(engine) and engine.stats.refused == 2
    engine.close()


def test_what_kind_a_folder_is(tmp_path):
    kinds = {'t5': ('encoder-decoder', 'chat'), 'bart': ('encoder-decoder', 'chat'), 'llama': ('decoder', 'chat'),
             'whisper': ('encoder-decoder', 'transcribe'), 'speech_to_text': ('encoder-decoder', 'transcribe')}
    for kind, expected in kinds.items():
        transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path/kind)
        assert kind_of(tmp_path/kind) == expected
    assert kind_of(tmp_path/'llama', 'encoder-decoder', 'transcribe') == ('encoder-decoder', 'transcribe')
    with pytest.raises(NoSuchModel): kind_of(tmp_path)
    with pytest.raises(BadInput, match='only Whisper'): speech.open_service(tmp_path/'speech_to_text', 'cpu')


# -- text: over HTTP ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def model(tokenizer): return small.t5(tokenizer)


@pytest.fixture(scope='module')
def folder(model, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp('t5')
    model.save_pretrained(place); tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope='module')
def text(folder):
    service = seq2seq.open_service(folder, 'cpu', name='small', max_model_len=64, max_concurrent=400)
    with served(service) as url: yield url, service
    service.engine.close()


def asked(question, **how):
    return dict(model='small', messages=[{'role': 'user', 'content': question}], max_tokens=30, temperature=0) | how


def test_the_sdk(text):
    with sdk(text[0]) as client:
        assert client.models.list().data[0].id == 'small'
        for question, expected in small.ANSWERS.items():
            whole = client.chat.completions.create(**asked(question), logprobs=True, top_logprobs=3)
            choice = whole.choices[0]
            assert (choice.message.content, choice.finish_reason) == (expected, 'stop')
            rows = choice.logprobs.content
            assert b''.join(bytes(r.bytes) for r in rows).decode() == expected
            assert all(r.top_logprobs[0].token == r.token and len(r.top_logprobs) == 3 for r in rows)
            chunks = list(client.chat.completions.create(**asked(question), stream=True,
                                                         stream_options={'include_usage': True}))
            assert ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices) == expected
            assert chunks[-1].usage == whole.usage
        both = client.completions.create(model='small', prompt=list(small.ANSWERS), max_tokens=30, temperature=0,
                                         echo=True)
        assert [c.text for c in both.choices] == [q + a for q, a in small.ANSWERS.items()]
        short = client.chat.completions.create(**asked('What is the capital of Peru?', max_tokens=3)).choices[0]
        assert short.finish_reason == 'length' and small.ANSWERS['What is the capital of Peru?'].startswith(
            short.message.content)
        stopped = client.chat.completions.create(**asked('What is the capital of Peru?', stop=[', by', 'x']))
        assert stopped.choices[0].message.content == 'It is Lima' and stopped.choices[0].finish_reason == 'stop'
        vectors = client.embeddings.create(model='small', input=['Paris', 'good day'])
        assert len(vectors.data[0].embedding) == 48


def test_replies_are_openais(text, wrong):  # noqa: F811
    with sdk(text[0]) as client:
        ask = asked('thank you', n=2, logprobs=True, top_logprobs=2)
        chat = client.chat.completions.with_raw_response.create(**ask)
        more = client.completions.with_raw_response.create(model='small', prompt='thank', max_tokens=5, logprobs=2)
        assert not wrong('CreateChatCompletionResponse', json.loads(chat.text))
        assert not wrong('CreateCompletionResponse', json.loads(more.text))


def test_nothing_asked_is_null(text):
    names = ('temperature', 'top_p', 'n', 'seed', 'stop', 'max_tokens', 'logit_bias', 'presence_penalty', 'tools',
             'frequency_penalty', 'logprobs', 'user', 'stream', 'stream_options', 'response_format', 'tool_choice')
    body = asked('thank you') | dict.fromkeys(names)
    request = urllib.request.Request(text[0] + '/chat/completions', json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as reply: assert json.loads(reply.read())['choices']


def test_a_seed_says_the_same_in_any_company(text):
    with sdk(text[0]) as client:
        def ask(seed, **how):
            made = client.chat.completions.create(**asked('What is the sea?', seed=seed, temperature=1.5) | how)
            return [c.message.content for c in made.choices]
        alone = ask(5)
        with ThreadPoolExecutor(8) as pool: crowd = list(pool.map(ask, [5, 6, 7, 5, 8, 9, 10, 5]))
        assert crowd[0] == crowd[3] == crowd[7] == alone and len({c for c, in crowd}) > 3
        assert ask(5, n=3)[0] == alone[0]


def test_beams_are_generates(text, model, tokenizer):
    ids, beams = tokenizer('What is the sea?')['input_ids'], {'num_beams': 4}
    out = model.generate(torch.tensor([ids]), num_beams=4, num_return_sequences=3, max_new_tokens=12, do_sample=False)
    slow = [tokenizer.decode(row, skip_special_tokens=True) for row in out]
    with sdk(text[0]) as client:
        ask = asked('What is the sea?', n=3, max_tokens=12)
        made = client.chat.completions.create(**ask, extra_body=beams)
        assert [c.message.content for c in made.choices] == slow
        more = client.completions.create(model='small', prompt=['What is the sea?', 'thank you'], max_tokens=12, n=1,
                                         temperature=0, extra_body=beams)
        assert [c.index for c in more.choices] == [0, 1] and more.choices[0].text == slow[0]
        whole = client.chat.completions.create(**ask, extra_body=beams | {'ignore_eos': True})
        assert whole.usage.completion_tokens == 3*12 and {c.finish_reason for c in whole.choices} == {'length'}
        with pytest.raises(openai.BadRequestError) as e:
            client.chat.completions.create(**ask, logprobs=True, extra_body=beams)
        assert status(e) == (400, 'logprobs')


def test_what_cannot_be_done_is_said(text):
    tool = {'type': 'function', 'function': {'name': 'look'}}
    refused = {'tools': {'tools': [tool]}, 'max_tokens': {'max_tokens': 65}, 'temperature': {'temperature': 9},
               'messages': {'messages': [{'role': 'user', 'content': 'good day '*90}]},
               'temprature': {'extra_body': {'temprature': 1}},
               'prompt_logprobs': {'extra_body': {'prompt_logprobs': 1}}}
    with sdk(text[0]) as client:
        for param, how in refused.items():
            with pytest.raises(openai.BadRequestError) as e: client.chat.completions.create(**asked('Hi') | how)
            assert status(e) == (400, param)
        with pytest.raises(openai.BadRequestError) as e:
            client.completions.create(model='small', prompt='a', echo=True, logprobs=1)
        assert status(e) == (400, 'logprobs')
        with pytest.raises(openai.BadRequestError) as e:
            client.audio.transcriptions.create(model='small', file=('a.wav', b'RIFF'))
        assert status(e) == (400, 'model')
        with pytest.raises(openai.NotFoundError): client.chat.completions.create(**asked('Hi', model='other'))
    request = urllib.request.Request(text[0].removesuffix('/v1') + '/logits', b'{"input": "a"}')
    with pytest.raises(urllib.error.HTTPError) as e: urllib.request.urlopen(request, timeout=20)
    assert e.value.code == 400


def test_who_hangs_up_leaves_no_work_behind(text, monkeypatch):
    url, service = text
    forward = type(service.engine.slots)._forward
    monkeypatch.setattr(type(service.engine.slots), '_forward', lambda *a: (time.sleep(.02), forward(*a))[1])
    cancelled = service.engine.stats.cancelled
    async def leave():
        async with openai.AsyncOpenAI(base_url=url, api_key='none', max_retries=0) as client:
            async def begin(i):
                ask = asked('good day', max_tokens=60, temperature=1, extra_body={'ignore_eos': True})
                if i % 2:
                    async for _ in await client.chat.completions.create(**ask, stream=True): break
                else: await asyncio.wait_for(client.chat.completions.create(**ask), .3)
            await asyncio.gather(*(begin(i) for i in range(8)), return_exceptions=True)
    asyncio.run(leave())
    assert idle(service.engine) and not service.engine.slots.live
    assert service.engine.stats.cancelled - cancelled >= 6


def test_a_search_that_nobody_waits_for_ends(text, monkeypatch):
    url, service = text
    model, steps = service.engine.slots.model, []
    forward = model.forward
    def slow(*a, **k): steps.append(time.sleep(.1)); return forward(*a, **k)
    monkeypatch.setattr(model, 'forward', slow)
    ask = asked('What is the sea?', max_tokens=60, extra_body={'num_beams': 4, 'ignore_eos': True})
    with sdk(url) as client, pytest.raises(openai.APITimeoutError):  # the whole search would take six seconds
        client.with_options(timeout=.5).chat.completions.create(**ask)
    assert idle(service.engine) and len(steps) < 55


# -- speech ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def ear():
    tokenizer = small.whisper_tokenizer()
    return (*small.whisper(tokenizer), tokenizer)


@pytest.fixture(scope='module')
def speaking(ear, tmp_path_factory):
    place = tmp_path_factory.mktemp('whisper')
    for part in ear: part.save_pretrained(place)
    service = speech.open_service(place, 'cpu', name='ear', max_seconds=300)
    with served(service, max_audio=2_000_000) as url: yield url, service
    service.engine.close()


def sound(samples, format='WAV', rate=small.RATE, **how):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=format, **how)
    return (f'a.{format.lower()}', out.getvalue())


HIGH = small.tone(880)
LONG = np.concatenate([small.tone(f) for f in (440, 220, 1760, 880)])


def heard(ear, samples, **how):
    model, features, tokenizer = ear
    x = features([samples], sampling_rate=small.RATE, return_tensors='pt', truncation=False, return_attention_mask=True,
                 padding='longest' if 'return_timestamps' in how else 'max_length')
    return model.generate(**x, task='transcribe', **how)


@pytest.mark.parametrize('format', ['WAV', 'FLAC', 'MP3', 'OGG'])
def test_it_transcribes_what_generate_hears(speaking, ear, format):
    with sdk(speaking[0]) as client:
        for hertz, said in small.TONES.items():
            name, data = sound(small.tone(hertz), format)
            samples, _ = soundfile.read(io.BytesIO(data), dtype='float32')
            text = client.audio.transcriptions.create(model='ear', file=(name, data)).text
            assert text == ear[2].decode(heard(ear, samples)[0], skip_special_tokens=True).strip()
            if format in ('WAV', 'FLAC'): assert text == said.strip()


def test_all_forms(speaking, ear, wrong):  # noqa: F811
    segments = heard(ear, LONG, return_timestamps=True, return_segments=True)['segments'][0]
    with sdk(speaking[0]) as client:
        def ask(form, **how):
            made = client.audio.transcriptions.with_raw_response.create(model='ear', file=sound(LONG, 'FLAC'),
                                                                        response_format=form, **how)
            return made.text if form in ('text', 'srt', 'vtt') else json.loads(made.text)
        plain = ask('json', include=['logprobs'])
        text = ''.join(ear[2].decode(s['tokens'], skip_special_tokens=True) for s in segments).strip()
        assert plain['text'] == text and ask('text') == text + '\n'
        assert ''.join(row['token'] for row in plain['logprobs']).strip() == text
        assert not wrong('CreateTranscriptionResponseJson', plain)
        full = ask('verbose_json', timestamp_granularities=['word', 'segment'])
        assert wrong('CreateTranscriptionResponseVerboseJson', full) == ['unknown: task']  # in its example only
        assert [s['tokens'] for s in full['segments']] == [s['tokens'].tolist() for s in segments]
        assert [s['start'] for s in full['segments']] == [float(s['start']) for s in segments]
        assert ' '.join(w['word'] for w in full['words']) == text
        assert all(a['start'] <= a['end'] <= b['end'] for a, b in zip(full['words'], full['words'][1:]))
        assert (full['duration'], full['language']) == (8., 'german')
        assert 'words' not in ask('verbose_json')
        assert 'segments' not in ask('verbose_json', timestamp_granularities=['word'])
        srt, vtt = ask('srt'), ask('vtt')
        assert srt.startswith('1\n00:00:00,000 --> 00:00:02,000\nIn the middle, März.\n\n2\n') and srt.count('-->') == 4
        assert vtt.startswith('WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n') and vtt.count('-->') == 4
        def parsed(**how): return client.audio.transcriptions.create(model='ear', file=sound(LONG), **how)
        assert isinstance(parsed(), Transcription) and isinstance(parsed(response_format='srt'), str)
        assert isinstance(parsed(response_format='verbose_json'), TranscriptionVerbose)


def test_logprobs_are_the_models(speaking, ear):
    model, features, tokenizer = ear
    with sdk(speaking[0]) as client:
        made = client.audio.transcriptions.create(model='ear', file=sound(small.tone(1760)), include=['logprobs'])
    x = features(small.tone(1760), sampling_rate=small.RATE, return_tensors='pt').input_features
    out = model.generate(x, task='transcribe', language='en', return_dict_in_generate=True, output_scores=True,
                         return_timestamps=False, force_unique_generate_call=True)
    ids = out.sequences[0, 4:]
    slow = [float(s[0].log_softmax(-1)[i]) for s, i in zip(out.scores, ids)]
    assert np.allclose([row.logprob for row in made.logprobs], slow[:len(made.logprobs)], atol=1e-4)


@pytest.mark.parametrize('samples', [small.tone(440), LONG], ids=['one window', 'several'])
def test_a_stream_adds_up(speaking, wrong, samples):  # noqa: F811
    with sdk(speaking[0]) as client:
        whole = client.audio.transcriptions.create(model='ear', file=sound(samples), include=['logprobs'])
        *deltas, done = client.audio.transcriptions.create(model='ear', file=sound(samples), stream=True,
                                                           include=['logprobs'])
        assert ''.join(d.delta for d in deltas) == done.text == whole.text and len(deltas) > 1
        rows = [row for d in deltas for row in d.logprobs]
        assert [r.token for r in rows] == [r.token for r in whole.logprobs] == [r.token for r in done.logprobs]
        assert done.usage.total_tokens == done.usage.input_tokens + len(rows)
        for event in deltas: assert not wrong('TranscriptTextDeltaEvent', json.loads(event.to_json()))
        assert not wrong('TranscriptTextDoneEvent', json.loads(done.to_json()))


def test_a_crowd_hears_what_one_hears(speaking):
    files = [sound(small.tone(f, s)) for f in small.TONES for s in (small.WINDOW, 1.)]
    with sdk(speaking[0]) as client:
        def ask(i): return client.audio.transcriptions.create(model='ear', file=files[i % len(files)]).text
        alone = [ask(i) for i in range(len(files))]
        with ThreadPoolExecutor(16) as pool: crowd = list(pool.map(ask, range(32)))
    assert crowd == alone*4


def test_language_prompt_temperature_and_seed(speaking, ear):
    def said(ids): return ear[2].decode(ids[0], skip_special_tokens=True).strip()
    with sdk(speaking[0]) as client:
        def ask(samples=HIGH, **how):
            return client.audio.transcriptions.create(model='ear', file=sound(samples), **how)
        assert ask(language='de', response_format='verbose_json').language == 'german'
        assert ask(language='english', response_format='verbose_json').language == 'english'
        for prompt in ('Low', 'In the middle, März. High', 'Low, high, '*200):
            ids = ear[2].get_prompt_ids(prompt, return_tensors='pt')
            ids = torch.cat([ids[:1], ids[1:][-30:]])  # 64 places, half of them for what came before
            slow = heard(ear, small.tone(880), prompt_ids=ids, language='en', force_unique_generate_call=True)
            assert ask(prompt=prompt, language='en').text == said(slow[:, len(ids) + 4:])
        seeds = [ask(temperature=1., extra_body={'seed': s}, language='de').text for s in (1, 2, 3, 1)]
        assert seeds[0] == seeds[3]
        whole = ask(LONG, response_format='verbose_json', language='en', prompt='Low')
        assert len(whole.segments) >= 4
        attends = speaking[1].engine.model.config._attn_implementation
        ask(LONG, response_format='verbose_json', timestamp_granularities=['word'])
        assert speaking[1].engine.model.config._attn_implementation == attends != 'eager'


def test_a_model_without_times_goes_window_by_window(ear):
    model, features, tokenizer = ear
    config = model.generation_config
    first, off = config.no_timestamps_token_id, config.to_dict()
    try:
        del config.no_timestamps_token_id
        service = SpeechService(Transcriber(model, tokenizer, features), 'ear')
        with served(service) as url, sdk(url) as client:
            full = client.audio.transcriptions.create(model='ear', file=sound(LONG), response_format='verbose_json')
            assert len(full.segments) == 4 and [s.start for s in full.segments] == [0, 2, 4, 6]
            assert full.segments[-1].end == 8.
        service.engine.close()
    finally: config.no_timestamps_token_id = first
    assert off == config.to_dict()


def form(url, fields, file=None, kind=None):
    "Status and error of a form sent by hand."
    def part(name, data, more=''):
        return f'--edge\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b'\r\n'
    parts = [part(k, v.encode()) for k, v in fields]
    if file is not None: parts.append(part('file', file, '; filename="a.wav"'))
    request = urllib.request.Request(url + '/audio/transcriptions', b''.join(parts) + b'--edge--\r\n',
                                     {'content-type': kind or 'multipart/form-data; boundary=edge'})
    try: return urllib.request.urlopen(request, timeout=60).status, None
    except urllib.error.HTTPError as e: return e.code, json.loads(e.read())['error']['param']


def test_what_is_wrong_with_a_recording_is_said(speaking):
    url, service = speaking
    good, me = sound(small.tone(440))[1], [('model', 'ear')]
    assert form(url, me, good) == (200, None)
    assert form(url, [*me, ('language', ''), ('prompt', '')], good) == (200, None)
    for bad in (b'', b'no sound', good[:30], sound(small.tone(440, .05))[1], sound(np.zeros(0))[1]):
        assert form(url, me, bad) == (400, 'file')
    unreal = sound(np.full(16_000, np.inf, np.float32), subtype='FLOAT')[1]
    assert form(url, me, unreal) == (400, 'file')
    assert form(url, me, sound(np.zeros(400*8000), 'FLAC', 8000)[1]) == (400, 'file')  # longer than 300 s
    assert form(url, me) == (400, 'file')
    assert form(url, [*me, ('file', 'words')]) == (400, 'file')
    assert form(url, [('model', 'whisper-1')], good) == (404, 'model')
    assert form(url, [], good) == (400, 'model')
    bad = {'language': 'xx', 'temperature': '2', 'response_format': 'diarized_json', 'stream': 'perhaps',
           'timestamp_granularities[]': 'word', 'prompt': '<|en|>', 'keywords[]': 'a', 'what': '1'}
    for name, value in bad.items():
        assert form(url, [*me, (name, value)], good) == (400, name.removesuffix('[]')), name
    letters = [('timestamp_granularities[]', 'letter'), ('response_format', 'verbose_json')]
    assert form(url, [*me, *letters], good)[0] == 400
    assert form(url, me, good, 'application/json')[0] == 400
    assert form(url, me, good, 'multipart/form-data')[0] == 400
    assert form(url, me, good, 'multipart/form-data; boundary=other')[0] == 400
    assert form(url, me, b'0'*2_000_001) == (413, None)
    with sdk(url) as client, pytest.raises(openai.BadRequestError, match='/v1/audio/transcriptions'):
        client.chat.completions.create(model='ear', messages=[{'role': 'user', 'content': 'Hi'}])
    assert service.engine.stats.errors == 0 and form(url, me, good) == (200, None)


def test_broken_files_are_the_clients_fault(speaking):
    rng, whole = random.Random(3), [sound(small.tone(440, .3), f)[1] for f in ('WAV', 'FLAC', 'MP3', 'OGG')]
    for i in range(120):
        data = bytearray(whole[i % 4])
        for _ in range(rng.randint(1, 12)): data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < .4: data = data[:rng.randrange(len(data))]
        assert form(speaking[0], [('model', 'ear')], bytes(data))[0] in (200, 400), i
    assert speaking[1].engine.stats.errors == 0


def test_who_stops_listening_is_forgotten(speaking, monkeypatch):
    url, service = speaking
    model, steps = service.engine.model, []
    forward = model.forward
    def slow(*a, **k): steps.append(time.sleep(.02)); return forward(*a, **k)
    monkeypatch.setattr(model, 'forward', slow)
    cancelled, endless = service.engine.stats.cancelled, sound(np.concatenate([LONG]*20), 'FLAC')
    with sdk(url) as client:
        for _ in client.audio.transcriptions.create(model='ear', file=endless, stream=True): break
    with sdk(url) as client, pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=.5).audio.transcriptions.create(model='ear', file=endless)
    assert idle(service.engine, 10)
    n = len(steps)
    time.sleep(.2)
    assert len(steps) == n and service.engine.stats.cancelled - cancelled == 2


def test_too_many_are_told_to_come_again(ear):
    model, features, tokenizer = ear
    engine = Transcriber(model, tokenizer, features, max_concurrent=2)
    gate = threading.Event()
    engine.alone(gate.wait)
    with served(SpeechService(engine, 'ear')) as url, sdk(url) as client, ThreadPoolExecutor(2) as pool:
        def ask(): return client.audio.transcriptions.create(model='ear', file=sound(small.tone(880))).text
        first = [pool.submit(ask) for _ in range(2)]
        while engine.load['waiting'] < 2: time.sleep(.01)
        with pytest.raises(openai.RateLimitError) as e: ask()
        assert int(e.value.response.headers['retry-after']) >= 1
        gate.set()
        assert [f.result(60) for f in first] == ['High']*2
    engine.close()


def test_a_model_that_fails_fails_one_request(speaking, monkeypatch):
    url, service = speaking
    def broken(*a, **k): raise RuntimeError('out of memory')
    with sdk(url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(service.engine.model, 'generate', broken)
            with pytest.raises(openai.InternalServerError):
                client.audio.transcriptions.create(model='ear', file=sound(small.tone(880)))
        assert client.audio.transcriptions.create(model='ear', file=sound(small.tone(880))).text == 'High'
    service.engine.stats.errors = 0


def test_a_key_is_asked_for(ear):
    model, features, tokenizer = ear
    engine = Transcriber(model, tokenizer, features)
    with served(SpeechService(engine, 'ear'), api_keys=['k']) as url:
        assert form(url, [('model', 'ear')], b'...')[0] == 401
    engine.close()


def test_the_extra_is_named(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name == 'soxr' else find(name, *a))
    with pytest.raises(ImportError, match='pip install soxr'): speech.open_service(tmp_path)
