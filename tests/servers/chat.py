"Chat completions: from messages to choices, whole or as a stream."
from dataclasses import dataclass
from functools import lru_cache

from . import toy
from .common import Call, Events, Reply, identity

CREATED = 1_790_000_000


@dataclass
class Ask:
    "What a model is asked for, whatever the protocol calls it."
    model: str
    ids: list
    limit: int|None = None
    n: int = 1
    temperature: float = 1.
    top_p: float = 1.
    seed: int|None = None
    stop: tuple = ()
    bias: tuple = ()
    thinks: bool = False
    k: int|None = None         # Candidates at each token; None is no logprobs
    view: float = 1.           # Temperature that logprobs are told at
    floor: bool = False        # Tell -9999 beyond the first 20
    with_ids: bool = False
    as_ids: bool = False       # Tokens told as "token_id:7"


def text_of(content) -> str:
    "The text of a message, which may come in parts."
    if isinstance(content, list): return ''.join(p.get('text', '') for p in content)
    return content or ''


def rendered(messages: list, prompt: bool = True) -> list:
    "Token ids of a conversation; `prompt` opens the assistant's turn."
    ids = []
    for m in messages: ids += [toy.IDS[f'<|{m["role"]}|>'.encode()], *toy.tokenise(text_of(m.get('content')))]
    return ids + ([toy.IDS[b'<|assistant|>']] if prompt else [])


def common(body: dict) -> dict:
    "Fields of an `Ask` that every endpoint names alike."
    stop = body.get('stop') or ()
    given = {k: body[k] for k in ('temperature', 'top_p', 'seed', 'n') if body.get(k) is not None}
    return given | {'stop': (stop,) if isinstance(stop, str) else tuple(stop),
                    'bias': tuple((int(i), b) for i, b in (body.get('logit_bias') or {}).items())}


def answers(ask: Ask, call: Call, limit: int|None = None) -> list[toy.Answer]:
    "All choices; without a seed they differ from call to call."
    turn = f's{ask.seed}' if ask.seed is not None else call.memory.turn((ask.model, toy.begin(ask.model, ask.ids)))
    length = 0 if call.blank else call.options.answer_tokens
    return [toy.generate(ask.model, ask.ids, limit, ask.temperature, ask.top_p, f'{turn}/{i}', ask.bias, ask.stop,
                         length) for i in range(ask.n)]


def think(ask: Ask) -> int:
    "How many tokens it thinks."
    return 16 + toy.begin(ask.model, ask.ids)[0] % 48 if ask.thinks else 0


def entry(i: int, logprob: float, ask_ids: tuple) -> dict:
    "One token with its log-probability."
    with_ids, as_ids = ask_ids
    made = {'token': f'token_id:{i}' if as_ids else toy.piece(i), 'logprob': logprob, 'bytes': list(toy.PIECES[i])}
    return made | ({'id': i} if with_ids else {})


@lru_cache(8192)
def candidates(key: tuple, view: float, k: int, ask_ids: tuple) -> list:
    "The likeliest tokens of a place."
    found = toy.dist(key, view)
    return [entry(i, found.logprobs[i], ask_ids) for i in found.ranked[:k]]


def row(step: toy.Step, ask: Ask) -> dict:
    "The log-probabilities of one place."
    found, how = toy.dist(step.key, ask.view), (ask.with_ids, ask.as_ids)
    lp = -9999. if ask.floor and found.rank[step.id] >= 20 else found.logprobs[step.id]
    return entry(step.id, lp, how) | {'top_logprobs': candidates(step.key, ask.view, ask.k, how)}


def told(steps: list, ask: Ask) -> dict|None:
    "The log-probabilities of an answer, where they are wanted."
    return {'content': [row(s, ask) for s in steps]} if ask.k is not None else None


def thought(ask: Ask) -> str: return ' '.join(['Let me think.']*(think(ask)//4 + 1))


def reply(ask: Ask, call: Call, usage, message: dict|None = None, more: dict|None = None) -> Reply:
    "A chat completion, whole or as a stream; `usage(prompt, visible, thinking)` tells what was used."
    thinking = think(ask)
    if ask.limit is not None: thinking = min(thinking, ask.limit)
    limit = None if ask.limit is None else ask.limit - thinking
    found = answers(ask, call, limit)
    spent = usage(len(ask.ids), sum(len(a.steps) for a in found), thinking*ask.n)
    room = ask.n*(ask.limit if ask.limit is not None else thinking + max(len(a.steps) for a in found))
    costs = {'tokens': spent['total_tokens'], 'reserve': len(ask.ids) + room}
    head = {'id': identity('chatcmpl-', ask.ids, call.number), 'created': CREATED, 'model': ask.model, **(more or {})}
    if call.body.get('stream'):
        wanted = call.body.get('stream_options') or {}
        return Reply(events(found, ask, head, spent, message or {}, wanted), **costs)
    choices = [{'index': i, 'message': {'role': 'assistant', 'content': a.text, **(message or {})},
                'logprobs': told(a.steps, ask), 'finish_reason': a.reason} for i, a in enumerate(found)]
    return Reply({'object': 'chat.completion', **head, 'choices': choices, 'usage': spent}, **costs)


def events(found: list, ask: Ask, head: dict, spent: dict, message: dict, options: dict) -> Events:
    "A chat completion as a stream."
    out = Events()
    def say(i, delta, logprobs=None, reason=None, **more):
        choice = {'index': i, 'delta': delta, 'logprobs': logprobs, 'finish_reason': reason}
        out.append((None, {'object': 'chat.completion.chunk', **head, 'choices': [choice], **more}))
    for i, a in enumerate(found):
        say(i, {'role': 'assistant', 'content': '', **{k: v for k, v in message.items() if k != 'reasoning_content'}})
        for word in message.get('reasoning_content', '').split():
            say(i, {'content': None, 'reasoning_content': f'{word} '})
        for s, part in zip(a.steps, a.parts): say(i, {'content': part}, told([s], ask))
        say(i, {}, None, a.reason)
    if options.get('include_usage'):
        out.append((None, {'object': 'chat.completion.chunk', **head, 'choices': [], 'usage': spent}))
    return Events([*out, (None, '[DONE]')])
