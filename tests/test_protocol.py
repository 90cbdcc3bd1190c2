"Does the server speak OpenAI's language: its document, its SDK's models, the bodies that clients send, and odd ones."
import codecs
import json
import math
import random

import numpy as np
import openai
import orjson
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from llm_distill.serving.words import Piece, PromptRows
from llm_distill.serving.protocol import (ChatRequest, CompletionRequest, EmbeddingRequest, Limits, Refused, error_body,
                                          explain, read_body)
from llm_distill.serving.replies import LOWEST, ChatReply, TextReply, best_answers, embeddings_reply, models_reply
from llm_distill.serving.sampling import Sampling
from llm_distill.teachers.compatible import _read_vllm
from llm_distill.teachers.decode import chat_completions, text_completions

HI = [{'role': 'user', 'content': 'Hi'}]
GOOD = {ChatRequest: {'model': 'm', 'messages': HI}, CompletionRequest: {'model': 'm', 'prompt': 'Hi'},
        EmbeddingRequest: {'model': 'm', 'input': 'Hi'}}
KINDS = {'chat': ChatRequest, 'text': CompletionRequest, 'embed': EmbeddingRequest}
WEATHER = {'type': 'function', 'function': {'name': 'weather', 'description': None, 'strict': True, 'parameters': {
    'type': 'object', 'properties': {'city': {'type': 'string'}}, 'required': ['city'], 'additionalProperties': False}}}
SCHEMA = {'name': 'Person', 'schema': {'type': 'object', 'properties': {'name': {'type': 'string'}}}}


def refusal(kind, limits=None, **params):
    "The error of a request; None where there is none."
    try: read_body(kind, orjson.dumps(GOOD[kind] | params), limits)
    except Refused as e: return e.body['error']


# -- requests that clients send --------------------------------------------------------------------------------------

NOTHING = dict.fromkeys(('temperature', 'top_p', 'n', 'seed', 'stop', 'max_tokens', 'logit_bias', 'presence_penalty',
                         'frequency_penalty', 'logprobs', 'user', 'stream', 'stream_options'))
RECORDED = {
    'openai: all of it null': ('chat', NOTHING | dict.fromkeys((
        'tools', 'tool_choice', 'response_format', 'parallel_tool_calls', 'functions', 'function_call', 'modalities',
        'audio', 'prediction', 'metadata', 'store', 'service_tier', 'reasoning_effort', 'verbosity',
        'web_search_options', 'max_completion_tokens', 'top_logprobs', 'safety_identifier', 'prompt_cache_key'))),
    'openai: what cannot matter': ('chat', {'user': 'u', 'metadata': {'a': 'b'}, 'store': False,
                                            'service_tier': 'auto', 'prompt_cache_key': 'k'}),
    'openai: stream helper': ('chat', {'stream': True}),
    'openai: parse': ('chat', {'response_format': {'type': 'json_schema', 'json_schema': SCHEMA | {'strict': True}}}),
    'openai: a call and its answer': ('chat', {'tools': [WEATHER], 'messages': [
        *HI, {'role': 'assistant', 'content': None, 'refusal': None, 'annotations': [], 'audio': None,
              'function_call': None, 'parsed': None, 'tool_calls': [
                  {'id': 'call_1', 'type': 'function', 'index': 0,
                   'function': {'name': 'weather', 'arguments': '{"city": "Rome"}', 'parsed_arguments': {}}}]},
        {'role': 'tool', 'tool_call_id': 'call_1', 'content': [{'type': 'text', 'text': 'sunny'}]}]}),
    'openai: embeddings': ('embed', {'input': ['a', 'b'], 'encoding_format': 'base64'}),
    'langchain: chat': ('chat', {'max_completion_tokens': 8, 'logprobs': True, 'top_logprobs': 3, 'stream': False,
                                 'temperature': 0.7, 'n': 1, 'stop': ['\n']}),
    'langchain: structured output': ('chat', {'response_format': {'type': 'json_schema', 'json_schema': {
        'name': 'Person', 'description': 'Somebody', 'strict': None} | SCHEMA}, 'parallel_tool_calls': False,
        'tools': [WEATHER]}),
    'langchain: completions': ('text', {'prompt': ['hi'], 'n': 1, 'logprobs': None, 'seed': None, 'best_of': 1,
                                        'frequency_penalty': 0, 'presence_penalty': 0, 'top_p': 1,
                                        'temperature': 0.7, 'max_tokens': 256, 'logit_bias': {}}),
    'langchain: embeddings': ('embed', {'input': [[15339, 1917]], 'encoding_format': 'base64'}),
    'instructor: tools': ('chat', {'tools': [WEATHER],
                                   'tool_choice': {'type': 'function', 'function': {'name': 'weather'}}}),
    'instructor: json': ('chat', {'messages': [{'role': 'system', 'content': 'As JSON: {}'}, *HI],
                                  'response_format': {'type': 'json_object'}}),
    'instructor: json schema': ('chat', {'response_format': {'type': 'json_schema', 'json_schema': SCHEMA}}),
    'llm: stream': ('chat', {'stream': True, 'stream_options': {'include_usage': True}}),
    'llm: plain': ('chat', {'stream': False, 'temperature': 0.5, 'max_tokens': 20}),
    'lm-eval: ids': ('text', {'prompt': [[5, 6, 7], [8]], 'max_tokens': 1, 'temperature': 0, 'logprobs': 1,
                              'echo': True, 'seed': 1234}),
    'lm-eval: text': ('text', {'prompt': ['a b', 'c'], 'max_tokens': 0, 'temperature': 0, 'logprobs': 1, 'echo': True,
                               'seed': 1234}),
    'lm-eval: generate': ('text', {'prompt': ['Q: 1+1?'], 'max_tokens': 64, 'temperature': 0, 'seed': 1234,
                                   'stop': ['Q:', '\n\n', '<|endoftext|>', '</s>', '<|im_end|>']}),
    'our own scorer': ('text', {'max_tokens': 1, 'prompt_logprobs': 20}),
    'transformers people': ('chat', {'do_sample': False, 'num_beams': 1, 'top_k': 50, 'min_p': 0.05, 'temperature': 0.7,
                                     'repetition_penalty': 1.1}),
    'vllm bench': ('text', {'ignore_eos': True, 'stream': True, 'stream_options': {'include_usage': True}}),
    'parts': ('chat', {'messages': [{'role': 'user', 'name': 'Ann', 'content': [{'type': 'text', 'text': 'a'},
                                                                               {'type': 'text', 'text': 'b'}]}]}),
    'message for content': ('chat', {'messages': [{'role': 'user', 'message': 'Hi'}]}),
}


@pytest.mark.parametrize('name', RECORDED)
def test_recorded_requests_are_accepted(name):
    kind, params = RECORDED[name]
    body = read_body(KINDS[kind], orjson.dumps(GOOD[KINDS[kind]] | params))
    if kind == 'embed': return
    sampling = body.sampling(16)
    assert isinstance(sampling, Sampling)
    if kind == 'chat': assert json.dumps([m.as_message() for m in body.messages])


def test_a_null_is_the_same_as_nothing():
    for kind, good in GOOD.items():
        plain = read_body(kind, good)
        for name in {*kind.model_fields, *kind._ignored, *kind._neutral} - set(good):
            assert read_body(kind, good | {name: None}) == plain, name


def test_every_parameter_that_openai_knows_has_a_place(document):
    schemas = document['components']['schemas']
    def names(schema):
        schema = schemas[schema['$ref'].split('/')[-1]] if '$ref' in schema else schema
        return set(schema.get('properties', ())).union(*map(names, schema.get('allOf', ())))
    for kind, name in ((ChatRequest, 'CreateChatCompletionRequest'), (CompletionRequest, 'CreateCompletionRequest'),
                       (EmbeddingRequest, 'CreateEmbeddingRequest')):
        theirs, beyond = names({'$ref': name}), kind._ignored | set(kind._neutral)
        assert theirs <= set(kind.model_fields) | beyond and len(theirs) > 4
        assert beyond <= theirs and not beyond & set(kind.model_fields)  # nothing else is let through


def test_what_was_asked_reaches_the_engine():
    given = {'temperature': 0.5, 'top_p': 0.9, 'top_k': 40, 'min_p': 0.1, 'repetition_penalty': 1.2, 'stop': ['a', ''],
             'presence_penalty': -1, 'frequency_penalty': 1.5, 'logit_bias': {'7': -100, '8': 2.5}, 'seed': 5,
             'ignore_eos': True, 'prompt_logprobs': 2}
    same = {k: v for k, v in given.items() if k not in ('logit_bias', 'stop')}
    wanted = Sampling(max_tokens=9, top_logprobs=3, logit_bias={7: -100., 8: 2.5}, stop=['a'], **same)
    chat = read_body(ChatRequest, GOOD[ChatRequest] | given | {'max_tokens': 9, 'logprobs': True, 'top_logprobs': 3})
    text = read_body(CompletionRequest, GOOD[CompletionRequest] | given | {'max_tokens': 9, 'logprobs': 3})
    assert chat.sampling(1) == text.sampling(1) == wanted
    assert read_body(ChatRequest, GOOD[ChatRequest]).sampling(11) == Sampling(max_tokens=11)
    assert read_body(CompletionRequest, GOOD[CompletionRequest]).sampling() == Sampling(max_tokens=16)


def test_what_is_said_about_tools():
    one = {'type': 'function', 'function': {'name': 'weather'}}
    for choice in (None, 'none', 'required', one,
                   {'type': 'allowed_tools', 'allowed_tools': {'mode': 'required', 'tools': [one]}}):
        body = read_body(ChatRequest, GOOD[ChatRequest] | {'tools': [WEATHER], 'tool_choice': choice})
        tools, chosen, parallel = body.calling
        assert chosen == choice and parallel is None
        assert tools[0]['function'] == {k: v for k, v in WEATHER['function'].items() if v is not None}
    assert read_body(ChatRequest, GOOD[ChatRequest]).calling == ([], None, None)


def test_greedy_beams_and_seeds():
    def sampling(choice=0, **params):
        return read_body(ChatRequest, GOOD[ChatRequest] | params, Limits(max_beams=8)).sampling(4, choice)
    assert sampling(do_sample=False, temperature=.7).temperature == sampling(num_beams=4).temperature == 0
    assert sampling(do_sample=True).temperature == 1 and sampling(top_k=-1).top_k == 0
    assert 0 < sampling(top_p=0).top_p < 1e-3
    seeds = [sampling(i, seed=s, n=8).seed for s in range(50) for i in range(8)]
    assert len(set(seeds)) == 400 and all(0 <= s < 2**63 for s in seeds)
    assert [sampling(i, seed=7, n=3).seed for i in range(3)] == [sampling(i, seed=7, n=3).seed for i in range(3)]
    assert sampling(0, seed=7).seed == 7 and sampling(3).seed is None


# -- requests that are refused ---------------------------------------------------------------------------------------

def said(**message): return {'messages': [message]}


BAD = [
    ('chat', {'temperature': 2.1}, 'temperature'), ('chat', {'temperature': '1'}, 'temperature'),
    ('chat', {'temperature': True}, 'temperature'), ('chat', {'top_p': -.1}, 'top_p'), ('chat', {'top_k': -2}, 'top_k'),
    ('chat', {'top_k': 1.5}, 'top_k'), ('chat', {'min_p': 2}, 'min_p'), ('chat', {'n': 0}, 'n'),
    ('chat', {'n': 129}, 'n'), ('chat', {'repetition_penalty': 0}, 'repetition_penalty'),
    ('chat', {'presence_penalty': 3}, 'presence_penalty'), ('chat', {'frequency_penalty': -3}, 'frequency_penalty'),
    ('chat', {'logit_bias': {'a': 1}}, 'logit_bias.a'), ('chat', {'logit_bias': {'5': 101}}, 'logit_bias.5'),
    ('chat', {'logit_bias': {'5.0': 1}}, 'logit_bias.5.0'), ('chat', {'logit_bias': {'-1': 1}}, 'logit_bias.-1'),
    ('chat', {'user': 5}, 'user'), ('embed', {'user': []}, 'user'),
    ('chat', {'logit_bias': [5]}, 'logit_bias'), ('chat', {'seed': 1.5}, 'seed'), ('chat', {'seed': 2**64 - 1}, 'seed'),
    ('chat', {'stop': 5}, 'stop'), ('chat', {'stop': ['a', 5]}, 'stop[1]'), ('chat', {'stop': ['a']*17}, 'stop'),
    ('chat', {'max_tokens': 0}, 'max_tokens'), ('chat', {'max_tokens': 5, 'max_completion_tokens': 6}, 'max_tokens'),
    ('chat', {'logprobs': 5}, 'logprobs'), ('chat', {'top_logprobs': 3}, 'top_logprobs'),
    ('chat', {'logprobs': True, 'top_logprobs': 21}, 'top_logprobs'),
    ('chat', {'prompt_logprobs': 21}, 'prompt_logprobs'),
    ('chat', {'prompt_logprobs': 1, 'stream': True}, 'prompt_logprobs'), ('chat', {'stream': 'yes'}, 'stream'),
    ('chat', {'stream_options': {'include_usage': True}}, 'stream_options'),
    ('chat', {'stream': True, 'stream_options': {'usage': True}}, 'stream_options.usage'),
    ('chat', {'do_sample': True, 'temperature': 0}, 'do_sample'), ('chat', {'num_beams': 2}, 'num_beams'),
    ('chat', {'response_format': {'type': 'xml'}}, 'response_format.type'),
    ('chat', {'response_format': {'type': 'json_schema'}}, 'response_format.json_schema'),
    ('chat', {'response_format': {'type': 'json_schema', 'json_schema': {'schema': {}}}},
     'response_format.json_schema.name'),
    ('chat', {'tools': [{'type': 'custom', 'custom': {'name': 'x'}}]}, 'tools[0].custom'),
    ('chat', {'tools': [{'type': 'function'}]}, 'tools[0].function'),
    ('chat', {'tools': [WEATHER, WEATHER]}, 'tools[1].function.name'),
    ('chat', {'tool_choice': 'required'}, 'tool_choice'),
    ('chat', {'tool_choice': 'any', 'tools': [WEATHER]}, 'tool_choice'),
    ('chat', {'tools': [WEATHER], 'tool_choice': {'type': 'function', 'function': {'name': 'f'}}},
     'tool_choice.function.name'),
    ('chat', {'tools': [WEATHER], 'tool_choice': {'type': 'function'}}, 'tool_choice.function'),
    ('chat', {'tools': [WEATHER], 'tool_choice': {'type': 'allowed_tools'}}, 'tool_choice.allowed_tools'),
    ('chat', {'tools': [WEATHER], 'tool_choice': {'type': 'custom', 'custom': {'name': 'f'}}}, 'tool_choice.custom'),
    ('chat', {'tools': [WEATHER], 'tool_choice': {'type': 'allowed_tools', 'allowed_tools': {'mode': 'auto', 'tools': [
        {'type': 'function', 'function': {'name': 'f'}}]}}}, 'tool_choice.allowed_tools.tools[0].function.name'),
    ('chat', {'tools': [WEATHER], 'tool_choice': 5}, 'tool_choice'), ('text', {'prompt': [2**31]}, 'prompt[0]'),
    ('chat', {'functions': [{'name': 'f'}]}, 'functions'), ('chat', {'modalities': ['text', 'audio']}, 'modalities'),
    ('chat', {'reasoning_effort': 'high'}, 'reasoning_effort'),
    ('chat', {'web_search_options': {}}, 'web_search_options'),
    ('chat', {'audio': {'voice': 'ash', 'format': 'wav'}}, 'audio'), ('chat', {'guided_json': {}}, 'guided_json'),
    ('chat', {'best_of': 2}, 'best_of'), ('chat', {'messages': []}, 'messages'),
    ('chat', {'messages': None}, 'messages'),
    ('chat', {'model': None}, 'model'), ('chat', {'model': 5}, 'model'), ('chat', {'messages': 'Hi'}, 'messages'),
    ('chat', said(role='king', content='a'), 'messages[0].role'), ('chat', said(content='a'), 'messages[0].role'),
    ('chat', said(role='user'), 'messages[0].content'), ('chat', said(role='user', content=5), 'messages[0].content'),
    ('chat', said(role='user', content=['a']), 'messages[0].content[0]'),
    ('chat', said(role='user', content=[{'type': 'text', 'text': 5}]), 'messages[0].content[0].text'),
    ('chat', said(role='user', content=[{'type': 'text'}]), 'messages[0].content[0].text'),
    ('chat', said(role='assistant', content=[{'type': 'refusal', 'text': 'a'}]), 'messages[0].content[0].refusal'),
    ('chat', said(role='user', content=[{'type': 'image_url', 'image_url': {}}]), 'messages[0].content[0].image_url'),
    ('chat', said(role='user', content='a', message='b'), 'messages[0].message'),
    ('chat', said(role='user', content='a', colour='red'), 'messages[0].colour'),
    ('chat', said(role='tool', content='a'), 'messages[0].tool_call_id'),
    ('chat', said(role='assistant', content=None), 'messages[0].content'),
    ('chat', said(role='assistant', tool_calls=[]), 'messages[0].content'),
    ('chat', said(role='user', content='a', tool_calls=[{'id': '1', 'function': {'name': 'f'}}]),
     'messages[0].tool_calls'),
    ('chat', said(role='assistant', tool_calls=[{'function': {'name': 'f'}}]), 'messages[0].tool_calls[0].id'),
    ('text', {'prompt': []}, 'prompt'), ('text', {'prompt': None}, 'prompt'), ('text', {'prompt': {}}, 'prompt'),
    ('text', {'prompt': ['a', 5]}, 'prompt[1]'), ('text', {'prompt': [5, 'a']}, 'prompt[1]'),
    ('text', {'prompt': [[5], []]}, 'prompt[1]'), ('text', {'prompt': [[5], 'a']}, 'prompt[1]'),
    ('text', {'prompt': [[5, -1]]}, 'prompt[0][1]'), ('text', {'prompt': [True]}, 'prompt[0]'),
    ('text', {'prompt': [[[5]]]}, 'prompt[0][0]'), ('text', {'suffix': 'x'}, 'suffix'),
    ('text', {'logprobs': True}, 'logprobs'), ('text', {'logprobs': 21}, 'logprobs'), ('text', {'echo': 1}, 'echo'),
    ('text', {'max_tokens': -1}, 'max_tokens'), ('text', {'n': 3, 'best_of': 2}, 'best_of'),
    ('text', {'best_of': 2, 'stream': True}, 'best_of'), ('text', {'prompt': ['a']*2049}, 'prompt'),
    ('text', {'prompt': ['a']*40, 'n': 100}, 'n'), ('text', {'messages': HI}, 'messages'),
    ('text', {'metadata': {}}, 'metadata'),
    ('embed', {'input': ''}, 'input[0]'), ('embed', {'input': ['a', '']}, 'input[1]'),
    ('embed', {'input': []}, 'input'),
    ('embed', {'encoding_format': 'hex'}, 'encoding_format'), ('embed', {'dimensions': 0}, 'dimensions'),
    ('embed', {'input': ['a']*2049}, 'input'), ('embed', {'temperature': 1}, 'temperature'),
]


@pytest.mark.parametrize('kind, params, param', BAD)
def test_refusals_name_the_parameter(kind, params, param):
    error = refusal(KINDS[kind], **params)
    assert error and error['param'] == param and error['code'] and error['type'] == 'invalid_request_error'
    assert param in error['message'] and error['message'].endswith('.')


def test_limits_of_the_server():
    small = Limits(max_logprobs=2, vocabulary=100, dimensions=8, max_answers=4, max_beams=3)
    ok = [('chat', {'logprobs': True, 'top_logprobs': 2}), ('chat', {'num_beams': 3}),
          ('chat', {'logit_bias': {'99': 1}}),
          ('chat', {'num_beams': 3, 'do_sample': False, 'temperature': .7, 'n': 3}),
          ('text', {'prompt': [99]}), ('embed', {'dimensions': 8, 'input': [[99]]})]
    bad = [('chat', {'logprobs': True, 'top_logprobs': 3}, 'top_logprobs'), ('chat', {'num_beams': 4}, 'num_beams'),
           ('chat', {'num_beams': 3, 'temperature': 1}, 'num_beams'), ('chat', {'num_beams': 3, 'n': 4}, 'n'),
           ('chat', {'num_beams': 3, 'do_sample': True}, 'num_beams'),
           ('chat', {'num_beams': 3, 'stream': True}, 'num_beams'),
           ('chat', {'logit_bias': {'5': 1, '100': 1}}, 'logit_bias'),
           ('chat', {'prompt_logprobs': 3}, 'prompt_logprobs'),
           ('text', {'prompt': [[1], [100]]}, 'prompt[1][0]'), ('text', {'logprobs': 3}, 'logprobs'),
           ('text', {'prompt': ['a']*5}, 'prompt'), ('chat', {'n': 5}, 'n'), ('text', {'n': 3, 'best_of': 5}, 'n'),
           ('embed', {'dimensions': 9}, 'dimensions'), ('embed', {'input': [[15339, 1917]]}, 'input[0][0]')]
    for kind, params in ok: assert refusal(KINDS[kind], small, **params) is None, params
    for kind, params, param in bad: assert refusal(KINDS[kind], small, **params)['param'] == param, params
    assert 'check_embedding_ctx_length' in refusal(EmbeddingRequest, small, input=[[15339]])['message']


def test_a_guess_at_what_was_meant():
    assert "did you mean 'temperature'" in refusal(ChatRequest, temprature=1)['message']
    assert refusal(ChatRequest, temprature=1)['code'] == 'unknown_parameter'


@pytest.mark.parametrize('data', [b'', b'{', b'[]', b'null', b'"a"', b'\xff\xfe', b'{"model": "\xc3\x28"}',
                                  b'['*10**5,
                                  b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
                                  b'{"temperature": NaN}', b'{"temperature": 1e999, "model": "m", "messages": []}'])
def test_broken_bodies(data):
    for kind in GOOD:
        with pytest.raises(Refused) as caught: read_body(kind, data)
        assert caught.value.status == 400 and caught.value.body['error']['message'] == str(caught.value)


ODD = [0, 1, -1, 2, 5, 20, 21, 0.5, -0.5, 1e308, 2**31, 2**63, 2**64 - 1, -2**63, True, False, '', 'a', '1',
       'text', 'auto', 'none', 'float', '日'*50, '\x00', '{x}', '%s', [], [1], ['a'], [''], [[]], [[1]], [['a']],
       [None], [{}], {}, {'a': 1}, {'1': 1}, {'1': None}, {'type': 'text'}, {'type': 'function'},
       {'type': 'json_object'}, [{'type': 'function'}], {'type': 'json_schema', 'json_schema': {'name': 'x',
       'schema': {'$ref': '#'}}}, {'': {}}, [[1], 'a'], [1, [2]]]


def every_value(value, deep=2):
    "A value, and itself with each of its parts replaced by something odd."
    yield from ODD
    if deep and isinstance(value, dict):
        for k in value:
            yield {n: v for n, v in value.items() if n != k}
            for part in every_value(value[k], deep - 1): yield value | {k: part}
        yield value | {'odd': 1}
    if deep and isinstance(value, list):
        for i, one in enumerate(value):
            for part in every_value(one, deep - 1): yield [*value[:i], part, *value[i + 1:]]


def test_odd_values_are_taken_or_refused_by_name():
    rich = {ChatRequest: {'messages': [*HI, {'role': 'assistant', 'content': None, 'tool_calls': [
                {'id': '1', 'type': 'function', 'function': {'name': 'weather', 'arguments': '{}'}}]}],
                          'tools': [WEATHER], 'tool_choice': {'type': 'function', 'function': {'name': 'weather'}},
                          'response_format': {'type': 'json_schema', 'json_schema': SCHEMA}, 'logit_bias': {'5': 1}},
            CompletionRequest: {'prompt': [[1, 2], [3]]}, EmbeddingRequest: {'input': ['a', 'b']}}
    taken = refused = 0
    for kind, good in GOOD.items():
        good = good | rich[kind]
        read_body(kind, good)
        for name in {*kind.model_fields, *kind._neutral, *kind._ignored, 'odd'}:
            for value in every_value(good.get(name), 3):
                data = orjson.dumps(good | {name: value})
                try: body = read_body(kind, data, Limits(vocabulary=1000, dimensions=64))
                except Refused as e:
                    refused += 1
                    error = e.body['error']
                    place = error['param'].split('.')[0].split('[')[0]
                    assert place == name or (name, place) == ('tools', 'tool_choice'), (name, value, error)
                    assert orjson.loads(orjson.dumps(e.body)) == e.body and error['code'] and error['message']
                    continue
                taken += 1
                if kind is EmbeddingRequest: continue
                s = body.sampling(16, 1)
                assert 0 <= s.temperature <= 2 and 0 < s.top_p <= 1 and s.top_k >= 0 and 0 <= s.min_p <= 1
                assert s.max_tokens >= 0 and s.repetition_penalty > 0 and all(s.stop)
                assert 0 <= (s.top_logprobs or 0) <= 20
                assert all(0 <= i < 1000 and math.isfinite(v) for i, v in s.logit_bias.items())
    assert taken > 300 and refused > 2000


def test_odd_names_are_refused_by_name():
    for name in ('[x]', '[0]', 'a.b', '日', ' ', 'model_config', '_ignored', 'model_fields', 'copy', '__class__', 'top',
                 'draws', 'a'*100_000, '{said}', 'body', 'schema_'):
        for kind in GOOD:
            error = refusal(kind, **{name: 1})
            assert error['param'] == name[:64] and error['code'] == 'unknown_parameter', (name, error)
            assert len(error['message']) < 200
        error = refusal(ChatRequest, messages=[HI[0] | {name: 1}])
        assert error['param'].startswith('messages[0]') and error['param'].endswith(name[:64]), (name, error)
    assert refusal(ChatRequest, **{'': 1})['code'] == 'unknown_parameter'


def test_explain_reads_what_fastapi_finds():
    at = {'loc': ('body', 'messages', 0, 'role'), 'type': 'missing', 'msg': 'Field required', 'input': {}}
    wanted = error_body('', 'messages[0].role', 'missing_required_parameter')['error']
    assert explain([at])['error'] | {'message': ''} == wanted
    broken = {'loc': ('body', 17), 'type': 'json_invalid', 'msg': 'JSON decode error', 'input': {}}
    assert explain([broken])['error']['param'] is None


# -- replies: OpenAI's document, the SDK's models, our own reader ----------------------------------------------------

def strictly(kind, reply):
    "A reply as the SDK's model, which must know all of it."
    model = kind.model_validate_json(orjson.dumps(reply), strict=True)
    def known(x):
        if isinstance(x, BaseModel):
            assert not x.model_extra, x.model_extra
            for name in type(x).model_fields: known(getattr(x, name))
        elif isinstance(x, list):
            for one in x: known(one)
    known(model)
    return model


def answer(text, seed=0, k=2, end=True):
    "An answer's pieces with its bytes cut anywhere, as an engine writes them."
    rng, data, decode = random.Random(seed), text.encode(), codecs.getincrementaldecoder('utf-8')('replace').decode
    cuts = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(len(data)//2 + 1))})
    tokens = [data[a:b] for a, b in zip(cuts, cuts[1:])]
    out = []
    for i, token in enumerate(tokens):
        top = [(300 + j, rng.choice([b' x', b'\xe6', b'\xe6\x97', 'ß'.encode()]) + bytes([65 + j]), -j - .5)
               for j in range(k)]
        out.append(Piece(decode(token, i == len(tokens) - 1), 5 + i, token, -rng.random(), top, tokens=i + 1))
    if end: out.append(Piece('', 0, b'', -.1, [(0, b'', -.1)], 'stop', len(tokens) + 1))
    else: out[-1].finish = 'length'
    return out


TEXTS = ['Hello there', '日本語のテキスト', 'a😀b👩‍👩‍👧c', 'naïve café', ' ', 'x']


def call(name, arguments='', **index):
    return {**index, 'id': f'call_{name}', 'type': 'function', 'function': {'name': name, 'arguments': arguments}}


def test_chats_are_what_openai_says(wrong):
    for k, n in ((None, 1), (0, 2), (2, 3)):
        reply = ChatReply('m', 7, k, cached_tokens=3)
        whole = reply.whole([answer(TEXTS[i], i) for i in range(n)])
        assert wrong('CreateChatCompletionResponse', whole) == []
        model = strictly(ChatCompletion, whole)
        assert [c.message.content for c in model.choices] == TEXTS[:n]
        assert [c.index for c in model.choices] == list(range(n)) and model.usage.prompt_tokens == 7
        assert (model.choices[0].logprobs is None) == (k is None)
    cut = ChatReply('m', 7).whole([answer('abc', end=False)])
    assert wrong('CreateChatCompletionResponse', cut) == [] and cut['choices'][0]['finish_reason'] == 'length'
    calls = [call('weather', '{"city": "Rome"}'), call('f', '{}')]
    called = ChatReply('m', 7).whole([answer('...')], [{'content': None, 'tool_calls': calls}])
    assert wrong('CreateChatCompletionResponse', called) == []
    choice = strictly(ChatCompletion, called).choices[0]
    assert (choice.finish_reason, choice.message.content) == ('tool_calls', None)
    assert [c.function.name for c in choice.message.tool_calls] == ['weather', 'f']
    cut = ChatReply('m', 7).whole([answer('...', end=False)], [{'content': 'a', 'tool_calls': calls}])
    assert cut['choices'][0]['finish_reason'] == 'length' and cut['choices'][0]['message']['content'] == 'a'


def test_the_check_can_fail(wrong):
    whole = ChatReply('m', 7).whole([answer('abc')])
    for spoil in ({'object': 'x'}, {'choices': None}, {'created': 'now'}, {'extra': 1}):
        assert wrong('CreateChatCompletionResponse', whole | spoil)
    with pytest.raises((ValueError, AssertionError)): strictly(ChatCompletion, whole | {'extra': 1})


def test_chunks_put_together_are_the_whole(wrong):
    answers = [answer(text, i) for i, text in enumerate(TEXTS)]
    whole = ChatReply('m', 7, 2).whole(answers)
    reply, rng = ChatReply('m', 7, 2, include_usage=True), random.Random(0)
    chunks, left = [reply.opening(i)[0] for i in range(len(answers))], {i: list(a) for i, a in enumerate(answers)}
    while left:  # answers that grow at the same time
        i = rng.choice(list(left))
        chunks += reply.chunks(left[i].pop(0), i)
        if not left[i]: del left[i]
    chunks.append(reply.closing(sum(a[-1].tokens for a in answers)))
    for chunk in chunks:
        assert wrong('CreateChatCompletionStreamResponse', chunk) == []
        strictly(ChatCompletionChunk, chunk)
        assert 'usage' in chunk and (chunk['usage'] is None) == bool(chunk['choices'])
    assert chunks[-1]['usage'] == whole['usage'] and len({c['id'] for c in chunks}) == 1
    for i, choice in enumerate(whole['choices']):
        mine = [c['choices'][0] for c in chunks if c['choices'] and c['choices'][0]['index'] == i]
        assert mine[0]['delta'] == {'role': 'assistant', 'content': ''}
        assert ''.join(c['delta'].get('content', '') for c in mine) == choice['message']['content']
        assert [r for c in mine for r in (c['logprobs'] or {'content': []})['content']] == choice['logprobs']['content']
        assert [c['finish_reason'] for c in mine] == [None]*(len(mine) - 1) + [choice['finish_reason']]
        assert all(c['delta']['content'] and c['logprobs']['content'] for c in mine[1:-1])


def test_bytes_that_are_no_text():
    rng = random.Random(0)
    for case in range(60):
        data = bytes(rng.choice(b'a \\\xe6\x97\xa5\xff\xf0\x9f\x98\x80\xc3') for _ in range(rng.randrange(1, 30)))
        decode = codecs.getincrementaldecoder('utf-8')('replace').decode
        cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(rng.randrange(12)))})
        tokens = [data[a:b] for a, b in zip(cuts, cuts[1:])]
        pieces = [Piece(decode(t, i == len(tokens) - 1), i, t, -i - .5, [(i, t, -i - .5)], tokens=i + 1)
                  for i, t in enumerate(tokens)]
        pieces[-1].finish, text = 'length', data.decode('utf-8', 'replace')
        for kind, read in ((ChatReply, chat_completions), (TextReply, text_completions)):
            whole, stream = kind('m', 1, 1).whole([pieces]), kind('m', 1, 1)
            found = read(orjson.dumps(whole), 'm')[0]
            assert found.text == text and found.logprobs.tokens == tokens, (case, data)
            assert [row[0] for row in found.logprobs.top_tokens] == tokens
            chunks = [c['choices'][0] for p in pieces for c in stream.chunks(p)]
            assert ''.join(c['text'] if kind is TextReply else c['delta']['content'] for c in chunks if
                           kind is TextReply or c['delta']) == text
        columns = whole['choices'][0]['logprobs']
        assert columns['text_offset'] == sorted(columns['text_offset']) and columns['text_offset'][0] == 0
        assert columns['text_offset'][-1] <= len(text)
        assert [o for c in chunks for o in c['logprobs']['text_offset']] == columns['text_offset']


def test_streamed_tool_calls(wrong):
    reply = ChatReply('m', 7, 0)
    def more(text): return {'tool_calls': [{'index': 0, 'function': {'arguments': text}}]}
    deltas = [[], [{'content': 'Let me see.'}, {'tool_calls': [call('weather', index=0)]}], [], [more('{"city": ')],
              [more('"Rome"'), more('}')]]
    pieces = [Piece('.', 1, b'.', -.5, [], tokens=i + 1) for i in range(4)] + [Piece('', 0, finish='stop', tokens=5)]
    chunks = [*reply.opening(), *(c for p, d in zip(pieces, deltas) for c in reply.chunks(p, 0, d))]
    assert len(chunks) == 6 and [len((c['choices'][0]['logprobs'] or {'content': []})['content']) for c in chunks] == [
        0, 2, 0, 2, 0, 0]
    for chunk in chunks:
        assert wrong('CreateChatCompletionStreamResponse', chunk) == []
        strictly(ChatCompletionChunk, chunk)
    assert [c['choices'][0]['finish_reason'] for c in chunks] == [None]*5 + ['tool_calls'] and 'usage' not in chunks[0]


def prompt(text, seed=0, start=True):
    "What a model thought of a prompt, with a token in front that its text does not show."
    pieces = answer(text, seed)[:-1]
    tokens = [b'<s>']*start + [p.token for p in pieces]
    first = [] if start else pieces[:1]  # of which the model thinks nothing
    return PromptRows(list(range(5 - start, 5 + len(pieces))), tokens,
                      [None] + [p.logprob for p in pieces[len(first):]], [None] + [p.top for p in pieces[len(first):]])


def without_null(reply):
    "OpenAI sends a null for a text's first token; neither its document nor its SDK's types have a word for that."
    for choice in reply['choices']:
        columns = choice['logprobs']
        if columns and columns['token_logprobs'][:1] == [None]:
            assert columns['top_logprobs'][0] is None
            columns['token_logprobs'][0], columns['top_logprobs'][0] = 0., {}
    return reply


@pytest.mark.parametrize('k', [None, 0, 2])
@pytest.mark.parametrize('echo', [False, True])
def test_completions_are_what_openai_says(wrong, k, echo):
    rows = [prompt(text, i) for i, text in enumerate(TEXTS)]
    answers = [answer(text, i + 9) for i, text in enumerate(reversed(TEXTS))]
    reply = TextReply('m', 7, k, echo=echo)
    whole = reply.whole(answers, TEXTS, rows)
    again = orjson.dumps(whole)
    assert wrong('CreateCompletionResponse', without_null(whole)) == []
    strictly(Completion, whole)
    whole = orjson.loads(again)
    for i, (text, choice) in enumerate(zip(TEXTS, whole['choices'])):
        assert choice['text'] == (text if echo else '') + TEXTS[-1 - i] and choice['index'] == i
        if k is None: assert choice['logprobs'] is None; continue
        columns, pieces = choice['logprobs'], answers[i]
        tokens = (rows[i].tokens if echo else []) + [p.token for p in pieces]
        assert {len(c) for c in columns.values()} == {len(tokens)}
        assert all(len(t) <= k + 1 for t in columns['top_logprobs'] if t) and columns['tokens'][-1] == ''
        assert all(t in top for t, top in zip(columns['tokens'], columns['top_logprobs']) if top)
        # Where tokens begin, counted one by one: after the whole characters before them
        shown, wanted = b'' if echo else text.encode(), []
        for j, token in enumerate(tokens):
            wanted.append(len(shown.decode('utf-8', 'ignore')))
            if not (echo and j == 0): shown += token
        assert columns['text_offset'] == wanted
        read = text_completions(again, 'm')[i].logprobs
        assert read.tokens == tokens
        assert read.logprobs[-len(pieces):].tolist() == pytest.approx([p.logprob for p in pieces], rel=1e-6)


def test_completions_in_chunks(wrong):
    rows, answers = prompt(TEXTS[1], 3), [answer(text, i) for i, text in enumerate(TEXTS)]
    whole = TextReply('m', 7, 2, echo=True).whole(answers, [TEXTS[1]]*len(answers), [rows]*len(answers))
    reply = TextReply('m', 7, 2, echo=True, include_usage=True)
    for i, pieces in enumerate(answers):
        chunks = [*reply.opening(i, TEXTS[1], rows), *(c for p in pieces for c in reply.chunks(p, i))]
        mine = [c['choices'][0] for c in chunks]
        assert ''.join(c['text'] for c in mine) == whole['choices'][i]['text']
        for name, column in whole['choices'][i]['logprobs'].items():
            assert [x for c in mine for x in c['logprobs'][name]] == column
        for chunk in chunks:
            strictly(Completion, without_null(chunk) | {'choices': [c | {'finish_reason': c['finish_reason'] or 'stop'}
                                                                    for c in chunk['choices']]})
    assert TextReply('m', 7).opening(0, 'Hi') == []
    assert wrong('CreateCompletionResponse', reply.closing(9)) == []


def test_columns_of_odd_tokens():
    "Twins, impossible tokens, and SentencePiece's space before the first word."
    twins = [(3, b'a', -.5), (4, b'a', -2.), (5, b'b', -math.inf)]
    rows = PromptRows([1, 6, 7], [b'<s>', b' Hi', b' you'], [None, -1., -math.inf], [None, twins, twins])
    said = [Piece('a', 4, b'a', -2., twins, 'length', 1)]
    columns = TextReply('m', 3, 3, echo=True).whole([said], ['Hi you'], [rows])['choices'][0]['logprobs']
    assert columns['text_offset'] == [0, 0, 2, 6] and columns['token_logprobs'] == [None, -1, LOWEST, -2]
    assert columns['top_logprobs'][1:] == [{'a': -.5, 'b': LOWEST, ' Hi': -1}, {'a': -.5, 'b': LOWEST, ' you': LOWEST},
                                           {'a': -.5, 'b': LOWEST}]
    row = ChatReply('m', 3, 3).whole([said])['choices'][0]['logprobs']['content'][0]
    assert [t['logprob'] for t in row['top_logprobs']] == [-.5, -2, LOWEST]


def test_scoring_as_lm_eval_reads_it():
    ids = prompt('one two three', 4, start=False)
    for pieces in ([], [Piece('', 0, b'', -2., [(0, b'', -2.)], 'stop', 1)], answer('x', end=False)):
        choice = TextReply('m', 3, 1, echo=True).whole([pieces], ['one two three'], [ids])['choices'][0]
        asked = len(pieces)  # max_tokens
        scores = choice['logprobs']['token_logprobs'][:len(choice['logprobs']['tokens']) - asked]
        assert len(scores) == len(ids.ids) and scores[0] == ids.logprobs[0]
        assert sum(scores[1:]) == pytest.approx(sum(ids.logprobs[1:]))
        assert choice['finish_reason'] == ('stop' if pieces and pieces[0].finish == 'stop' else 'length')


def test_our_own_teacher_reads_them():
    pieces = answer(TEXTS[2], 5)
    pieces[0].top[1] = (9, b'no', -math.inf)
    read = chat_completions(orjson.dumps(ChatReply('m', 7, 2).whole([pieces])), 'm')[0]
    assert read.text == TEXTS[2] and read.logprobs.tokens == [p.token for p in pieces[:-1]]
    assert read.logprobs.top_tokens == [[t for _, t, _ in p.top] for p in pieces[:-1]]
    assert read.logprobs.top_logprobs[0][1] == LOWEST
    rows = prompt('one two', 6)
    for whole in (ChatReply('m', 7).whole([pieces], prompt=rows),
                  TextReply('m', 7).whole([pieces], ['one two'], [rows], prompt_logprobs=True)):
        scored = _read_vllm(orjson.dumps(whole), 'm', 5).logprobs
        assert scored.tokens[1:] == rows.tokens[1:] and np.isnan(scored.logprobs[0])
        assert scored.logprobs[1:].tolist() == pytest.approx(rows.logprobs[1:], rel=1e-6)
        assert scored.top_ids[2].tolist()[0] in (rows.ids[2], rows.top[2][0][0])


def test_embeddings_models_and_errors(wrong):
    vectors = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    plain = embeddings_reply('m', vectors, 9)
    assert wrong('CreateEmbeddingResponse', plain) == []
    model = strictly(CreateEmbeddingResponse, plain)
    assert np.array_equal(np.array([d.embedding for d in model.data], np.float32), vectors)
    short = np.array([d['embedding'] for d in embeddings_reply('m', vectors, 9, dimensions=4)['data']])
    assert short.shape == (3, 4)
    assert np.allclose(np.linalg.norm(short, axis=1), np.linalg.norm(vectors, axis=1), rtol=1e-5)
    assert np.allclose(short[:, 0]/short[:, 1], vectors[:, 0]/vectors[:, 1], rtol=1e-4)
    assert embeddings_reply('m', np.zeros((1, 4)), 1, dimensions=2)['data'][0]['embedding'] == [0, 0]
    assert wrong('ListModelsResponse', models_reply(['a', 'b'], 5)) == []
    for card in models_reply(['a', 'b'])['data']: assert wrong('Model', card) == []; strictly(Model, card)
    assert wrong('ErrorResponse', error_body('no', 'n', 'c')) == wrong('ErrorResponse', error_body('no')) == []
    assert wrong('ErrorResponse', {'error': refusal(ChatRequest, n=0)}) == []


def test_the_best_of_more():
    far, near = answer('aaaa', 1), answer('bb', 2)
    for p in far: p.logprob = -1.
    for p in near: p.logprob = -.5
    drawn = [far, near, far]
    assert best_answers(drawn, 2) == [near, far]
    told = TextReply('m', 3).whole(best_answers(drawn, 1), tokens=sum(a[-1].tokens for a in drawn))
    assert told['usage']['completion_tokens'] > near[-1].tokens and len(told['choices']) == 1
    asked = read_body(CompletionRequest, GOOD[CompletionRequest] | {'best_of': 3})
    assert (asked.draws, asked.logprobs, asked.sampling().top_logprobs) == (3, None, 0)


# -- the official SDK, over our protocol -----------------------------------------------------------------------------

@pytest.fixture
def client():
    "The SDK with a transport that answers by our protocol, from canned pieces."
    http = pytest.importorskip(openai.DefaultHttpxClient.__mro__[1].__module__.split('.')[0])
    def sse(events): return b''.join(b'data: ' + orjson.dumps(e) + b'\n\n' for e in events) + b'data: [DONE]\n\n'
    def respond(request):
        kind = {'completions': CompletionRequest, 'embeddings': EmbeddingRequest}[request.url.path.split('/')[-1]]
        kind = ChatRequest if 'chat' in request.url.path else kind
        try: body = read_body(kind, request.content)
        except Refused as e: return http.Response(e.status, json=e.body)
        if kind is EmbeddingRequest:
            vectors = np.arange(4*len(body.input), dtype=np.float32).reshape(-1, 4)
            return http.Response(200, json=embeddings_reply('m', vectors, 3, body.encoding_format, body.dimensions))
        if kind is CompletionRequest:
            reply = TextReply('m', 3, body.logprobs, body.include_usage, echo=bool(body.echo))
            answers = [answer(p, i) for i, p in enumerate(body.prompt) for _ in range(body.draws)]
            prompts = [p for p in body.prompt for _ in range(body.draws)]
        else:
            text = '{"name": "日"}' if body.response_format else 'Grüße'
            reply = ChatReply('m', 3, body.top, body.include_usage)
            answers, prompts = [answer(text, i) for i in range(body.draws)], None
        if not body.stream: return http.Response(200, json=reply.whole(answers, *([prompts] if prompts else [])))
        events = [c for i in range(len(answers)) for c in reply.opening(i)]
        events += [c for i, pieces in enumerate(answers) for p in pieces for c in reply.chunks(p, i)]
        if body.include_usage: events.append(reply.closing(sum(a[-1].tokens for a in answers)))
        return http.Response(200, content=sse(events), headers={'content-type': 'text/event-stream'})
    with openai.OpenAI(base_url='http://server/v1', api_key='-', max_retries=0,
                       http_client=openai.DefaultHttpxClient(transport=http.MockTransport(respond))) as made: yield made


class Person(BaseModel):
    name: str


def test_the_official_sdk(client):
    ask = {'model': 'm', 'messages': HI}
    chat = client.chat.completions.create(**ask, n=2, logprobs=True, top_logprobs=2, seed=1, stop=['x'], user='me')
    assert [c.message.content for c in chat.choices] == ['Grüße']*2
    assert client.chat.completions.parse(**ask, response_format=Person).choices[0].message.parsed == Person(name='日')
    with client.chat.completions.stream(**ask, logprobs=True, stream_options={'include_usage': True}) as stream:
        final = [*stream] and stream.get_final_completion()
    assert final.choices[0].message.content == 'Grüße' and final.usage.prompt_tokens == 3
    assert b''.join(bytes(r.bytes) for r in final.choices[0].logprobs.content).decode() == 'Grüße'
    told = client.chat.completions.create(model='m', messages=[*HI, chat.choices[0].message, *HI])
    assert told.choices[0].finish_reason == 'stop'
    text = client.completions.create(model='m', prompt=['a', '日本'], logprobs=2, echo=True, max_tokens=4)
    assert [c.text for c in text.choices] == ['aa', '日本日本']
    parts = [*client.completions.create(model='m', prompt='日本', stream=True)]
    assert ''.join(p.choices[0].text for p in parts) == '日本'
    found = client.embeddings.create(model='m', input=['a', 'b'])  # asks for base64 and unpacks it
    assert [d.embedding for d in found.data] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**ask, extra_body={'colour': 1})
    assert (caught.value.param, caught.value.code) == ('colour', 'unknown_parameter')
