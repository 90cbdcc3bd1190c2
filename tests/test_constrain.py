"Whatever the model says: constrained answers follow their schemas, and tool calls are found however the text is cut."
import copy
import enum
import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal
from uuid import UUID

import jsonschema
import pytest
import torch
from openai import pydantic_function_tool
from openai.lib._parsing._completions import type_to_response_format_param
from openai.lib.streaming._deltas import accumulate_delta
from pydantic import BaseModel, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_distill.models import load_tokenizer, token_bytes
from llm_distill.serving.constrain import Constraints, calls_grammar, masks
from llm_distill.serving.tools import (CallParser, choose_tools, encode_tools, force, forced_calls, mark_ids, notation,
                                       parse_calls)
from llm_distill.types import BadInput

PADDING = 100  # rows of the head that stand for no token


class Babbler:
    "A model without an idea: random logits, that lean the more to closing what is open the longer it talks."
    def __init__(self, tokenizer):
        self.tokens = token_bytes(tokenizer)
        self.width, self.end = len(self.tokens) + PADDING, tokenizer.eos_token_id
        self.constraints = Constraints(tokenizer, self.width)
        closes = [bool(t.strip(b' ')) and not t.strip(b' "]}') for t in self.tokens] + [False]*PADDING
        closes[self.end] = True
        self.closes = torch.tensor(closes).float()

    def __call__(self, matcher, seed, steps=500, patience=25):
        "The text, or None if it came to no end."
        random, said = torch.Generator().manual_seed(seed), b''
        for step in range(steps):
            mask = matcher.mask()
            assert mask.shape == (self.width,) and mask.any() and not mask[len(self.tokens):].any()
            logits = torch.randn(self.width, generator=random) + self.closes*max(0, step - patience)*.2
            token = int(logits.masked_fill_(~mask, -torch.inf).argmax())
            assert not matcher.done or token == self.end
            matcher.accept(token)
            if token == self.end: return said.decode()  # fails where a character is not whole
            said += self.tokens[token]


@pytest.fixture(scope='module')
def babbler(): return Babbler(load_tokenizer('smollm2'))


def sentencepiece():
    "In the manner of Llama 2: a space in front, bytes to fall back on, some of them twice."
    longer = '12 {" ": "} ", na me name ▁{ ▁" ▁[ 日本 ▁日 true false null tags Hi'
    words = ['\n', '▁', *'{}",:[]ané日本01.-txyl', *longer.split()]
    vocab = {t: i for i, t in enumerate(['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *words])}
    merges = ['{ "', '" :', '" }', '" ,', '▁ "', '▁ {', '▁ [', 'n a', '日 本', '▁ 日']
    merges = [tuple(m.split(' ')) for m in merges]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token='<unk>'))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token='<unk>', bos_token='<s>', eos_token='</s>')


def obj(**properties):
    return {'type': 'object', 'properties': properties, 'required': [*properties], 'additionalProperties': False}


def silent(**properties):
    "An object that does not say whether there may be other properties."
    return {k: v for k, v in obj(**properties).items() if k != 'additionalProperties'}


STRING, NUMBER, INTEGER, NULL = ({'type': t} for t in ('string', 'number', 'integer', 'null'))
OPEN = {'additionalProperties': True}
POINT, POINTED = {'point': obj(x=NUMBER, y=NUMBER)}, {'$ref': '#/$defs/point'}
TREES = {'type': 'array', 'items': {'$ref': '#/$defs/tree'}, 'maxItems': 2}
SCHEMAS = {
    'enum': obj(colour={'enum': ['red', 'green', 'grün', 3, None, True, {'mix': ['a']}]}),
    'const': obj(kind={'const': 'point'}, version={'const': 2}),
    'nested': obj(who=obj(name=STRING, at=obj(x=NUMBER, y=NUMBER)), ok={'type': 'boolean'}),
    'array': obj(tags={'type': 'array', 'items': STRING, 'minItems': 2, 'maxItems': 4}),
    'tuple': {'type': 'array', 'prefixItems': [STRING, {'type': 'integer'}], 'items': False, 'minItems': 2},
    'anyOf': obj(value={'anyOf': [STRING, NUMBER, NULL, obj(x=NUMBER), {'type': 'array', 'items': NUMBER}]}),
    'types': obj(value={'type': ['string', 'integer', 'null']}),
    'ref': {'$defs': POINT, **obj(a=POINTED, b=POINTED)},
    'recursion': {'$defs': {'tree': obj(name=STRING, children=TREES)}, '$ref': '#/$defs/tree'},
    'linked': obj(value=INTEGER, next={'anyOf': [{'$ref': '#'}, NULL]}),
    'unicode': obj(**{'名前': STRING | {'minLength': 3, 'maxLength': 6}, 'é "quoted" \\': {'const': '日本 🙂\n'}}),
    'numbers': obj(small=INTEGER | {'minimum': -3, 'maximum': 12}, even=INTEGER | {'multipleOf': 2},
                   part=NUMBER | {'exclusiveMinimum': 0, 'maximum': 1}),
    'pattern': obj(code=STRING | {'pattern': '^[A-Z]{2}-[0-9]{3}$'}, day=STRING | {'format': 'date'},
                   id=STRING | {'format': 'uuid'}),
    'optional': obj(a=STRING, b=NUMBER, c={'type': 'boolean'}) | {'required': ['b']},
    'map': {'type': 'object', 'additionalProperties': INTEGER},
    'allOf': {'allOf': [obj(a=STRING) | OPEN, obj(b=NUMBER) | OPEN]},
    'allOf, silent': {'allOf': [silent(a=STRING), silent(b=NUMBER)]},
    'beside': {'$defs': {'base': silent(a=STRING)}, '$ref': '#/$defs/base', **silent(b=NUMBER)},
    'discriminated': {'oneOf': [obj(kind={'const': 'cat'}, lives=INTEGER), obj(kind={'const': 'dog'}, name=STRING)]},
    'scalar': {'type': 'integer', 'minimum': 10, 'maximum': 99},
}


@pytest.mark.parametrize('name', SCHEMAS)
def test_random_logits_write_what_the_schema_says(name, babbler):
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    said = [babbler(babbler.constraints.json_schema(schema, strict=True), seed) for seed in range(8)]
    finished = [s for s in said if s is not None]
    for answer in finished: jsonschema.Draft202012Validator(schema).validate(json.loads(answer))
    assert len(finished) >= 6, said


def test_spaces_come_to_an_end(babbler):
    "Small models write them for ever: one, or a line break with its indentation, is all there is."
    tokenizer, blank = load_tokenizer('smollm2'), {t: i for i, t in enumerate(babbler.tokens) if not t.strip(b' ')}
    def open_after(text):
        matcher = babbler.constraints.json_schema(obj(a=INTEGER))
        for token in tokenizer(text)['input_ids']: matcher.accept(token)
        mask = matcher.mask()
        return {t for t, i in blank.items() if t and mask[i]}
    assert open_after('{"a":') == {b' '} and not open_after('{"a": ') and b'    ' in open_after('{\n') <= {*blank}
    assert not open_after('{\n' + ' '*20)


class Colour(enum.Enum):
    red, blue = 'red', 'blue'


class Cat(BaseModel):
    kind: Literal['cat']
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal['dog']
    name: str = Field(max_length=8, description='What it listens to')


class Step(BaseModel):
    "One step of it."
    explanation: str
    parts: list['Step']


class Order(BaseModel):
    "An order."
    id: UUID
    colour: Colour
    pet: Cat | Dog
    step: Step
    note: str | None
    sizes: list[float]


class Loose(BaseModel):
    "With defaults, a union by its kind, a dict and limits, as they are in models for instructor."
    pet: Annotated[Cat | Dog, Field(discriminator='kind')]
    counts: dict[str, int] = {}
    code: Annotated[str, Field(pattern='^[a-z]{2,4}$')] = 'ab'
    pair: tuple[int, str]
    sizes: Annotated[list[int], Field(min_length=1, max_length=3)]
    note: str | None = None


def test_what_the_sdk_s_parse_sends(babbler):
    sent = type_to_response_format_param(Order)['json_schema']
    assert sent['strict'] is True
    said = [babbler(babbler.constraints.json_schema(sent['schema'], strict=True), seed) for seed in range(8)]
    orders = [Order.model_validate_json(s) for s in said if s is not None]
    assert len(orders) >= 6 and {type(o.pet) for o in orders} == {Cat, Dog}


@pytest.mark.parametrize('model', [Order, Loose])
def test_what_instructor_sends(model, babbler):
    schema = model.model_json_schema()
    for make in (babbler.constraints.json_schema,
                 lambda s: babbler.constraints(calls_grammar([{'name': model.__name__, 'parameters': s}]))):
        said = [babbler(make(schema), seed) for seed in range(6)]
        answers = [json.loads(s) for s in said if s is not None]
        assert len(answers) >= 4
        for a in answers: model.model_validate(a['arguments'] if a.keys() == {'name', 'arguments'} else a)


def test_forced_calls_name_a_tool_and_follow_its_schema(babbler):
    tools = [pydantic_function_tool(m)['function'] for m in (Order, Cat, Dog)] + [{'name': 'now'}]
    one, many = calls_grammar(tools, 'parameters'), calls_grammar(tools, array=True, most=3)
    kinds = {'Order': Order, 'Cat': Cat, 'Dog': Dog}
    said = [babbler(babbler.constraints(one), seed) for seed in range(12)]
    calls = [json.loads(s) for s in said if s is not None]
    lists = [json.loads(s) for s in (babbler(babbler.constraints(many), seed, patience=60) for seed in range(6)) if s]
    assert len(calls) >= 9 and lists and all(1 <= len(x) <= 3 for x in lists) and max(map(len, lists)) > 1
    for call in calls + sum(lists, []):
        arguments = call.get('parameters', call.get('arguments'))
        if call['name'] == 'now': assert arguments == {}
        else: kinds[call['name']].model_validate(arguments)
    assert len({c['name'] for c in calls}) > 1


def test_objects_have_no_properties_that_nobody_named(babbler):
    schema = {'$defs': {'inner': silent(x=INTEGER) | {'required': []}},
              **silent(a={'$ref': '#/$defs/inner'}, b={'type': 'array', 'items': {'anyOf': [silent(y=INTEGER), NULL]}})}
    said = [babbler(babbler.constraints.json_schema(schema), seed, patience=60) for seed in range(8)]
    answers = [json.loads(s) for s in said if s is not None]
    inner = [a['a'] for a in answers] + [x for a in answers for x in a['b'] if x is not None]
    assert len(inner) > 8 and all(a.keys() == {'a', 'b'} for a in answers)
    assert {key for x in inner for key in x} == {'x', 'y'}


def test_any_object(babbler):
    said = [babbler(babbler.constraints.json_object(), seed) for seed in range(8)]
    answers = [json.loads(s) for s in said if s is not None]
    assert len(answers) >= 6 and all(isinstance(a, dict) for a in answers) and any(answers)


@pytest.mark.parametrize('name', ['enum', 'nested', 'array', 'unicode', 'recursion', 'numbers'])
def test_a_vocabulary_in_sentencepiece_s_manner(name):
    babbler = Babbler(sentencepiece())
    assert babbler.constraints.json_schema(SCHEMAS[name]).mask().sum() < 5
    said = [babbler(babbler.constraints.json_schema(SCHEMAS[name], strict=True), seed) for seed in range(8)]
    finished = [s for s in said if s is not None]
    for answer in finished: jsonschema.validate(json.loads(answer), SCHEMAS[name])
    assert len(finished) >= 6, said


def test_both_of_two_tokens_that_mean_the_same_may_come():
    babbler = Babbler(sentencepiece())
    allowed = babbler.constraints.json_schema({'type': 'integer', 'minimum': 0}).mask().nonzero()[:, 0].tolist()
    assert [babbler.tokens[i] for i in allowed].count(b'1') == 2


GOOD = ['{"a": "日本 🙂"}', '{"a":"\\u0007"}', '{\n  "a": "x\\ny"\n}', '{"a": "\\"<|x|>\\""}']


@pytest.mark.parametrize('text', GOOD)
def test_good_answers_are_possible_byte_by_byte_and_in_the_usual_tokens(text, babbler):
    schema = obj(a=STRING)
    tokenizer = babbler.constraints.tokenizer
    single = {t: i for i, t in enumerate(babbler.tokens) if len(t) == 1}
    for ids in (tokenizer(text)['input_ids'], [single[bytes([b])] for b in text.encode()]):
        matcher = babbler.constraints.json_schema(schema, strict=True)
        for i in ids: matcher.accept(i)
        assert matcher.done and matcher.mask().nonzero()[:, 0].tolist() == [tokenizer.eos_token_id]
    usual = babbler.constraints.json_schema(schema, strict=True)
    for i in tokenizer(text)['input_ids']: assert usual.mask()[i], babbler.tokens[i]; usual.accept(i)


def test_special_tokens_never_come_inside_and_several_ends_may_come(babbler):
    tokenizer = babbler.constraints.tokenizer
    constraints = Constraints(tokenizer, ends={0, 2})
    matcher = constraints.json_schema({'type': 'string'})
    special = torch.tensor(sorted(tokenizer.added_tokens_decoder))
    for i in tokenizer('"abc')['input_ids']: matcher.accept(i)
    assert not matcher.mask()[special].any()
    matcher.accept(tokenizer('"')['input_ids'][0])
    assert matcher.mask().nonzero()[:, 0].tolist() == [0, 2]


def test_a_scalar_may_end_or_go_on(babbler):
    matcher = babbler.constraints.json_schema({'type': 'integer'})
    for i in babbler.constraints.tokenizer('12')['input_ids']: matcher.accept(i)
    assert not matcher.done and matcher.mask()[babbler.end] and matcher.mask().sum() > 1


def test_answers_of_one_schema_do_not_disturb_each_other(babbler):
    schema = SCHEMAS['nested']
    alone = [babbler(babbler.constraints.json_schema(schema), seed) for seed in range(3)]
    first = babbler.constraints.json_schema(schema)
    babbler(babbler.constraints.json_schema(schema), 7)
    assert babbler(first, 0) == alone[0]
    many = [babbler.constraints.json_schema(s) for s in (schema, {'type': 'object'}, SCHEMAS['tuple'])]
    assert torch.equal(masks(many), torch.stack([m.mask() for m in many]))


def test_other_threads_may_use_the_tokenizer_meanwhile(babbler):
    tokenizer, grammar = babbler.constraints.tokenizer, calls_grammar([{'name': 'get_weather'}, {'name': 'get_time'}])
    chat, alone = '<|im_start|>user\nHi<|im_end|>\n', babbler(babbler.constraints(grammar), 0)
    ids = tokenizer(chat)['input_ids']
    with ThreadPoolExecutor(3) as pool:
        said = [pool.submit(lambda: babbler(babbler.constraints(grammar), 0)) for _ in range(12)]
        while not all(s.done() for s in said): assert tokenizer(chat)['input_ids'] == ids
    assert {s.result() for s in said} == {alone}


def test_a_head_narrower_than_the_vocabulary(babbler):
    tokenizer = babbler.constraints.tokenizer
    matcher = Constraints(tokenizer, width=1000).json_object()
    assert matcher.mask().shape == (1000,) and matcher.mask().any()
    with pytest.raises(BadInput, match='end token'): Constraints(tokenizer, width=2)


BAD = {'uniqueItems': {'type': 'array', 'uniqueItems': True}, 'not': {'not': {}}, 'if': {'if': {}, 'then': {}},
       'unevaluatedProperties': {'type': 'object', 'unevaluatedProperties': False}, 'zip': STRING | {'format': 'zip'},
       'oneOf': {'oneOf': [obj(a=STRING), obj(a=STRING)]}}


@pytest.mark.parametrize('word', BAD)
def test_what_cannot_be_enforced_is_named_or_left_out(word, babbler):
    with pytest.raises(BadInput, match=word): babbler.constraints.json_schema(obj(x=BAD[word]), strict=True)
    matcher = babbler.constraints.json_schema(obj(x=BAD[word]))
    assert any(word in said for said in matcher.ignored) and matcher.mask().any()


# Tools

WEATHER = {'name': 'get_weather', 'parameters': obj(city=STRING)}
TOOLS = [{'type': 'function', 'function': f} for f in (WEATHER, {'name': 'f'})]
NAMES = ['get_weather', 'f']
ROME, DEEP = '{"city": "Rome"}', '{"a": [{"b": "} ] \\" </tool_call> \\\\"}], "c": null}'


def call(name, arguments='{}', key='arguments'): return f'{{"name": "{name}", "{key}": {arguments}}}'
def hermes(*args): return f'<tool_call>\n{call(*args)}\n</tool_call>'


# What is written, what of it is content, and the calls in it.
TEXTS = {
    'hermes': (hermes('get_weather', ROME), None, [('get_weather', ROME)]),
    'after text': ('Let me look.\n\n' + hermes('get_weather', ROME) + '\n', 'Let me look.', [('get_weather', ROME)]),
    'two, and text between': (hermes('f', '{}') + '\nand \n' + hermes('f', DEEP), 'and', [('f', '{}'), ('f', DEEP)]),
    'two in one mark': (f'<tool_call>[{call("f")}, {call("f")}]</tool_call>', None, [('f', '{}')]*2),
    'unknown name with a mark': (hermes('other', '{}'), None, [('other', '{}')]),
    'keys turned round': ('<tool_call>{"arguments": ' + DEEP + ', "name": "f"}</tool_call>', None, [('f', DEEP)]),
    'arguments in a string': (hermes('f', json.dumps(ROME)), None, [('f', ROME)]),
    'no arguments': ('<tool_call>{"name": "f"}</tool_call>', None, [('f', '{}')]),
    'a bracket short': ('<tool_call>{"name": "f", "arguments": ' + ROME + '</tool_call> ok', 'ok', [('f', ROME)]),
    'cut off': ('<tool_call>{"name": "f", "arguments": {"city": "Ro', None, [('f', '{"city": "Ro')]),
    'llama': (call('get_weather', ROME, 'parameters'), None, [('get_weather', ROME)]),
    'llama, with type': (' {"type": "function", "name": "f", "parameters": {}}', None, [('f', '{}')]),
    'llama, several': (f'<|python_tag|>{call("f", "{}", "parameters")}; {call("f", DEEP, "parameters")}', None,
                       [('f', '{}'), ('f', DEEP)]),
    'mistral': (f'[TOOL_CALLS] [{call("f")}, {call("get_weather", ROME)}]', None, [('f', '{}'), ('get_weather', ROME)]),
    'granite': (f'<|tool_call|>[{call("f")}, {call("f", DEEP)}]', None, [('f', '{}'), ('f', DEEP)]),
    'mistral, later': ('[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]get_weather[CALL_ID]123456789[ARGS]' + ROME, None,
                       [('f', '{}'), ('get_weather', ROME)]),
    'text': (' Just <b>text</b>, 1 < 2 [TOOL_CALL] {"name": "f"} \n', None, []),
    'json': ('{"name": "Ada", "parameters": {}}\n', None, []),
    'other json': ('[{"city": "Rome"}, 2]', None, []),
    'a mark in text': ('Write <tool_call> and {"name": 1}', None, []),
    'a mark at the end': ('so: [TOOL_CALLS]', None, []),
    'half a mark': ('a \n <tool_', None, []),
    'not json': ('<tool_call>\n{nothing}\n</tool_call> \n', None, []),
    'then a call': ('<tool_call> no ' + hermes('f', '{}'), '<tool_call> no', [('f', '{}')]),
    'unicode': (hermes('f', '{"日本": "🙂 \\u00e9"}'), None, [('f', '{"日本": "🙂 \\u00e9"}')]),
    'empty': ('', None, []),
}


def streamed(pieces, names=NAMES):
    "Content and calls, put together from the deltas as openai's SDK does it."
    parser, message = CallParser(names), {}
    deltas = [d for piece in pieces for d in parser.feed(piece)] + parser.finish()
    for delta in deltas: message = accumulate_delta(message, copy.deepcopy(delta))
    calls = [(c['function']['name'], c['function']['arguments']) for c in message.get('tool_calls', [])]
    assert calls == [tuple(c['function'].values()) for c in parser.calls]
    assert parser.content == message.get('content', '')
    return parser.content, calls


def cuts(text, places): return [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]


@pytest.mark.parametrize('name', TEXTS)
def test_calls_are_found_however_the_text_is_cut(name):
    text, content, calls = TEXTS[name]
    expected = (text if not calls else content or ''), calls
    assert streamed([text])== expected
    n, rng = len(text), random.Random(0)
    ways = [[a] for a in range(n)] + [[*range(step, n, step)] for step in range(1, n)]
    ways += [[a, b] for a in range(n) for b in range(a, n)] if n < 90 else []
    ways += [sorted(rng.sample(range(n), rng.randrange(n))) for _ in range(200 if n else 0)]
    for way in ways: assert streamed(cuts(text, way))== expected, cuts(text, way)


@pytest.mark.parametrize('text', ['[TOOL_CALLS]f{}', '{"name":"f" , 1', 'a [TOOL_CALL x'])
def test_every_way_to_cut_a_short_text(text):
    expected, n = streamed([text]), len(text)
    for mask in range(2**(n - 1)):
        assert streamed(cuts(text, [i for i in range(1, n) if mask >> (i - 1) & 1]))== expected


def test_nonsense_is_read_the_same_in_any_pieces():
    rng = random.Random(1)
    bits = ['<tool_call>', '</tool_call>', '[TOOL_CALLS]', '<|python_tag|>', '[ARGS]', '{"name": "f", "arguments": ',
            '{"name": "f"', '"arguments": {}', 'text', ', ', *'{}"[]f \n\\<1;']
    for _ in range(1500):
        text = ''.join(rng.choices(bits, k=rng.randrange(1, 9)))
        whole = streamed([text])
        assert streamed(text) == whole, text
        assert whole[1] or whole[0] == text


def test_text_is_not_kept_back_longer_than_needed():
    parser = CallParser(NAMES)
    assert [parser.feed(t)[0]['content'] for t in ('Hello', ' wor', 'ld <')] == ['Hello', ' wor', 'ld']
    parser = CallParser(NAMES)
    assert parser.feed('{"answer') == [{'content': '{"answer'}]  # JSON that cannot become a call is shown at once
    parser = CallParser(NAMES)
    assert parser.feed('<tool_call>{"name": "f", "arguments"') == []
    first, then = parser.feed(': {"a')
    assert first['tool_calls'][0].keys() == {'index', 'id', 'type', 'function'}
    assert first['tool_calls'][0]['function'] == {'name': 'f', 'arguments': ''}
    assert then == {'tool_calls': [{'index': 0, 'function': {'arguments': '{"a'}}]}
    assert parser.feed('": 1') == [{'tool_calls': [{'index': 0, 'function': {'arguments': '": 1'}}]}]


TWO = [hermes('f', '{"a": 1}') + 'Then\n' + hermes('get_weather', '{}'),
       call('f', '{"a": 1}', 'parameters') + '; ' + call('get_weather', '{}', 'parameters'),
       f"""[TOOL_CALLS] [{call('f', '{"a": 1}')}, {call('get_weather', '{}')}]"""]


@pytest.mark.parametrize('text', TWO)
def test_no_second_call_where_none_is_wanted(text):
    single, several = (choose_tools(TOOLS, 'auto', parallel).single for parallel in (False, None))
    assert (single, several) == (True, False) and len(parse_calls(text, NAMES)['tool_calls']) == 2
    whole = parse_calls(text, NAMES, single)
    assert [c['function'] for c in whole['tool_calls']] == [{'name': 'f', 'arguments': '{"a": 1}'}]
    assert whole['content'] is None
    parser = CallParser(NAMES, single)
    for c in text: parser.feed(c)
    parser.finish()
    assert (parser.content, [c['function'] for c in parser.calls]) == ('', [c['function'] for c in whole['tool_calls']])


TOOLS_FIRST = "{% for t in tools or [] %}{{ t | tojson }}{{ '\n' }}{% endfor %}"
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}CALLS{{ '\n' }}{% endfor %}assistant: "
CALLS = {
    'hermes': "{% for c in m.tool_calls %}<tool_call>{{ '\n' }}{{ c.function | tojson }}{{ '\n' }}</tool_call>"
              "{% endfor %}",
    'llama': "{% for c in m.tool_calls %}{\"name\": \"{{ c.function.name }}\", \"parameters\": "
             "{{ c.function.arguments | tojson }}}{% endfor %}",
    'mistral': "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
               "{{ raise_exception('ids have 9') }}{% endif %}{{ c.function | tojson }}{% endfor %}]{% endif %}",
}
TEMPLATES = {name: TOOLS_FIRST + TURNS.replace('CALLS', calls) for name, calls in CALLS.items()}
TEMPLATES |= {'without tools': TURNS.replace('CALLS', ''), 'no template': None}
ID = '123456789'
CONVERSATION = [{'role': 'system', 'content': 'Be brief.'},
                {'role': 'user', 'content': [{'type': 'text', 'text': 'Rain?'}]},
                {'role': 'assistant', 'content': None, 'tool_calls': [
                    {'id': ID, 'type': 'function', 'function': {'name': 'get_weather', 'arguments': ROME}}]},
                {'role': 'tool', 'tool_call_id': ID, 'content': 'dry'},
                {'role': 'tool', 'tool_call_id': ID, 'content': 'warm'}]


@pytest.fixture(params=TEMPLATES)
def writer(request, babbler):
    tokenizer = copy.deepcopy(babbler.constraints.tokenizer)
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def test_conversations_with_tools_are_written_and_read_again(writer):
    text = writer.decode(encode_tools(writer, CONVERSATION, choose_tools(TOOLS)))
    assert all(w in text for w in ('Be brief.', 'Rain?', 'dry', 'warm', '"city": {"type": "string"}'))
    assert 'None' not in text
    line = next(part for part in text.split('\n') if 'Rome' in part)
    start = max(text.find('<tool_call>', text.find('Rain?')), text.find('[TOOL_CALLS]', text.find('Rain?')))
    found = parse_calls(text[start:] if start >= 0 else line.split(': ', 1)[1], NAMES)['tool_calls']
    assert [tuple(c['function'].values()) for c in found] == [('get_weather', ROME)]
    assert 'city": {' not in writer.decode(encode_tools(writer, CONVERSATION, choose_tools(TOOLS, 'none')))


F = {'type': 'function', 'function': {'name': 'f'}}


@pytest.mark.parametrize('choice, parallel', [('required', None), ('required', True), (F, True)])
def test_a_forced_call_is_the_whole_answer(choice, parallel, writer, babbler):
    choice, form = choose_tools(TOOLS, choice, parallel), notation(writer)
    prompt = writer.decode(encode_tools(writer, CONVERSATION[:2], choice))
    assert prompt.endswith(form.start if form.array or not choice.parallel else ': ' if writer.chat_template else '\n')
    for seed in range(3):
        said = babbler(babbler.constraints(forced_calls(writer, choice)), seed)
        assert said is not None
        message = parse_calls(said, choice.allowed)
        assert message['content'] is None
        assert len(message['tool_calls']) == (len(json.loads(said)) if said[0] == '[' else 1)
        calls = [tuple(c['function'].values()) for c in message['tool_calls']]
        assert streamed(said, choice.allowed)[1] == calls
        for name, arguments in calls:
            assert name in choice.allowed
            jsonschema.validate(json.loads(arguments), WEATHER['parameters'] if name == 'get_weather' else obj())


def test_the_tool_that_cannot_be_forced_is_named(babbler):
    odd = {'name': 'odd', 'strict': True, 'parameters': obj(x={'not': {}})}
    tools = [*TOOLS, {'type': 'function', 'function': odd}]
    with pytest.raises(BadInput, match='tools: odd: .*not supported: not'):
        force(babbler.constraints, choose_tools(tools, 'required'))
    assert babbler(force(babbler.constraints, choose_tools(TOOLS, 'required')), 0)


def test_a_template_s_refusal_is_the_client_s_error(babbler):
    tokenizer = copy.deepcopy(babbler.constraints.tokenizer)
    tokenizer.chat_template = TEMPLATES['mistral']
    wrong = copy.deepcopy(CONVERSATION)
    wrong[2]['tool_calls'][0]['id'] = 'call_1'
    with pytest.raises(BadInput, match='ids have 9'): encode_tools(tokenizer, wrong, choose_tools(TOOLS))
    made = parse_calls(hermes('f', '{}'), NAMES)['tool_calls'][0]['id']
    wrong[2]['tool_calls'][0]['id'] = made
    assert encode_tools(tokenizer, wrong, choose_tools(TOOLS))


def test_marks_that_are_special_tokens_are_known(babbler):
    tokenizer = copy.deepcopy(babbler.constraints.tokenizer)
    tokenizer.add_special_tokens({'additional_special_tokens': ['[TOOL_CALLS]', '[ARGS]', '[INST]']})
    assert sorted(tokenizer.convert_ids_to_tokens(sorted(mark_ids(tokenizer)))) == ['[ARGS]', '[TOOL_CALLS]']
