"Whatever the model says: constrained answers follow their schemas, and tool calls are found however the text is cut."
import enum
import json
from typing import Annotated, Literal, Optional, Union
from uuid import UUID

import pytest
import torch
from openai import pydantic_function_tool
from openai.lib._parsing._completions import type_to_response_format_param
from pydantic import BaseModel, Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_distill.models import load_tokenizer, token_bytes
from llm_distill.serving.constrain import Constraints, calls_grammar, masks
from llm_distill.types import BadInput

jsonschema = pytest.importorskip('jsonschema')
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
    words = ['▁', '{', '}', '"', '▁{', '{"', '":', '▁"', '"}', '",', ',', ':', '[', ']', '▁[', 'a', 'n', 'na', 'me', 'name', 'é', '日',
             '本', '日本', '▁日', '0', '1', '12', '.', '-', 't', 'true', 'x', 'y', 'l', 'false', 'null', 'tags', 'Hi', '▁Hi', '\n']
    vocab = {t: i for i, t in enumerate(['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *words])}
    merges = [('{', '"'), ('"', ':'), ('"', '}'), ('"', ','), ('▁', '"'), ('▁', '{'), ('▁', '['), ('n', 'a'), ('日', '本'), ('▁', '日')]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token='<unk>'))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first')
    made.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token='<unk>', bos_token='<s>', eos_token='</s>')


def obj(**properties):
    return {'type': 'object', 'properties': properties, 'required': [*properties], 'additionalProperties': False}


STRING, NUMBER = {'type': 'string'}, {'type': 'number'}
SCHEMAS = {
    'enum': obj(colour={'enum': ['red', 'green', 'grün', 3, None, True, {'mix': ['a']}]}),
    'const': obj(kind={'const': 'point'}, version={'const': 2}),
    'nested': obj(who=obj(name=STRING, at=obj(x=NUMBER, y=NUMBER)), ok={'type': 'boolean'}),
    'array': obj(tags={'type': 'array', 'items': STRING, 'minItems': 2, 'maxItems': 4}),
    'tuple': {'type': 'array', 'prefixItems': [STRING, {'type': 'integer'}], 'items': False, 'minItems': 2},
    'anyOf': obj(value={'anyOf': [STRING, NUMBER, {'type': 'null'}, obj(x=NUMBER), {'type': 'array', 'items': NUMBER}]}),
    'types': obj(value={'type': ['string', 'integer', 'null']}),
    'ref': {'$defs': {'point': obj(x=NUMBER, y=NUMBER)}, **obj(a={'$ref': '#/$defs/point'}, b={'$ref': '#/$defs/point'})},
    'recursion': {'$defs': {'tree': obj(name=STRING, children={'type': 'array', 'items': {'$ref': '#/$defs/tree'}, 'maxItems': 2})},
                  '$ref': '#/$defs/tree'},
    'linked': obj(value={'type': 'integer'}, next={'anyOf': [{'$ref': '#'}, {'type': 'null'}]}),
    'unicode': obj(**{'名前': {'type': 'string', 'minLength': 3, 'maxLength': 6}, 'é "quoted" \\': {'const': '日本 🙂\n'}}),
    'numbers': obj(small={'type': 'integer', 'minimum': -3, 'maximum': 12}, part={'type': 'number', 'exclusiveMinimum': 0, 'maximum': 1},
                   even={'type': 'integer', 'multipleOf': 2}),
    'pattern': obj(code={'type': 'string', 'pattern': '^[A-Z]{2}-[0-9]{3}$'}, day={'type': 'string', 'format': 'date'}, id={'type': 'string', 'format': 'uuid'}),
    'optional': {'type': 'object', 'properties': {'a': STRING, 'b': NUMBER, 'c': {'type': 'boolean'}}, 'required': ['b']},
    'map': {'type': 'object', 'additionalProperties': {'type': 'integer'}},
    'allOf': {'allOf': [obj(a=STRING) | {'additionalProperties': True}, {'type': 'object', 'properties': {'b': NUMBER}, 'required': ['b']}]},
    'discriminated': {'oneOf': [obj(kind={'const': 'cat'}, lives={'type': 'integer'}), obj(kind={'const': 'dog'}, name=STRING)]},
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
    pet: Union[Cat, Dog]
    step: Step
    note: Optional[str]
    sizes: list[float]


class Loose(BaseModel):
    "With defaults, a union by its kind, a dict and limits, as they are in models for instructor."
    pet: Annotated[Union[Cat, Dog], Field(discriminator='kind')]
    counts: dict[str, int] = {}
    code: Annotated[str, Field(pattern='^[a-z]{2,4}$')] = 'ab'
    pair: tuple[int, str]
    sizes: Annotated[list[int], Field(min_length=1, max_length=3)]
    note: Optional[str] = None


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


@pytest.mark.parametrize('text', ['{"a": "日本 🙂"}', '{"a":"\\u0007"}', '{\n  "a": "x\\ny"\n}', '{"a": "\\"<|x|>\\""}'])
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
    many = [babbler.constraints.json_schema(schema), babbler.constraints.json_object(), babbler.constraints.json_schema(SCHEMAS['tuple'])]
    assert torch.equal(masks(many), torch.stack([m.mask() for m in many]))


def test_a_head_narrower_than_the_vocabulary(babbler):
    tokenizer = babbler.constraints.tokenizer
    matcher = Constraints(tokenizer, width=1000).json_object()
    assert matcher.mask().shape == (1000,) and matcher.mask().any()
    with pytest.raises(BadInput, match='end token'): Constraints(tokenizer, width=2)


BAD = {'uniqueItems': {'type': 'array', 'uniqueItems': True}, 'not': {'not': {}}, 'if': {'if': {}, 'then': {}},
       'unevaluatedProperties': {'type': 'object', 'unevaluatedProperties': False}, 'zip': {'type': 'string', 'format': 'zip'},
       'oneOf': {'oneOf': [obj(a=STRING), obj(a=STRING)]}}


@pytest.mark.parametrize('word', BAD)
def test_what_cannot_be_enforced_is_named_or_left_out(word, babbler):
    with pytest.raises(BadInput, match=word): babbler.constraints.json_schema(obj(x=BAD[word]), strict=True)
    matcher = babbler.constraints.json_schema(obj(x=BAD[word]))
    assert any(word in said for said in matcher.ignored) and matcher.mask().any()
