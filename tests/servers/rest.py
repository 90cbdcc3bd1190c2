"Somebody's own server: text from one address, logits of every token from another."
import base64
import random
import struct
from types import SimpleNamespace

from . import toy
from .common import Call, Refusal, Reply
from .openai import key_sent, own_headers  # noqa: F401

ROOT, LIMITS = '', 'openai'
OPTIONS = dict(generate='/generate', logits='/logits', input_field='input', text_field='text', logits_field='logits',
               encoding='list', vocab=32, model='rest', answer_tokens=None)


def options(given: dict) -> SimpleNamespace:
    "Checked options."
    if set(given) - set(OPTIONS): raise TypeError(f'no such options: {set(given) - set(OPTIONS)}')
    made = SimpleNamespace(**OPTIONS | given)
    if made.encoding not in ('list', 'base64'): raise ValueError('encoding is "list" or "base64"')
    return made


def failure(status: int, message: str|None = None, options=None, **_) -> dict:
    "An error in nobody's form but its own."
    return {'error': message or f'HTTP {status}'}


def refuse(message: str, status: int = 400): raise Refusal(status, failure(status, message))


def rows_of(ids: list, options) -> list:
    "Logits of every token, (T, V), exact in float16."
    def row(key):
        rng = random.Random(f'{key}')
        return [rng.randrange(-64, 65)/8 for _ in range(options.vocab)]
    return [row((key, i)) for i, key in zip(ids, toy.keys(options.model, ids))]


def logits(call: Call, text: str) -> Reply:
    "POST /logits"
    if call.body.get('return_logits') is not True: refuse('return_logits must be true')
    ids = toy.tokenise(text)
    rows, name = rows_of(ids, call.options), call.options.logits_field
    if call.options.encoding == 'list': return Reply({name: [rows]}, tokens=len(ids), reserve=len(ids))
    flat = [x for row in rows for x in row]
    packed = base64.b64encode(struct.pack(f'<{len(flat)}e', *flat)).decode()
    told = {name: packed, 'shape': [1, len(rows), call.options.vocab], 'dtype': 'float16'}
    return Reply(told, tokens=len(ids), reserve=len(ids))


def generate(call: Call, text: str) -> Reply:
    "POST /generate"
    ids, most = toy.tokenise(text), call.body.get('max_tokens') or 16
    seed, temperature = call.memory.turn(text), call.body.get('temperature')
    found = toy.generate(call.options.model, ids, most, 1. if temperature is None else temperature, seed=seed,
                         length=0 if call.blank else call.options.answer_tokens)
    return Reply({call.options.text_field: found.text}, tokens=len(ids) + len(found.steps), reserve=len(ids) + most)


def answer(call: Call) -> Reply:
    "One request."
    found = {call.options.generate: generate, call.options.logits: logits}.get(call.path)
    if call.method != 'POST' or found is None: refuse('no such address', 404)
    if not isinstance(call.body, dict): refuse('the body is not a JSON object')
    text = call.body.get(call.options.input_field)
    if not isinstance(text, str): refuse(f'{call.options.input_field} must be a string')
    return found(call, text)
