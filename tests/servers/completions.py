"Legacy text completions."
from . import compat, toy
from .chat import CREATED, Ask, answers, common, told
from .common import Call, Events, Reply, identity
from .forms import check_known, check_number, check_present, refuse
from .rules import check_model, legacy, usage_of

PARAMS = set('''model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed
stop stream stream_options suffix temperature top_p user'''.split())


def check(body: dict):
    "What OpenAI insists on."
    model = body['model']
    if not legacy(model):
        refuse(404, 'This is a chat model and not supported in the v1/completions endpoint. '
               'Did you mean to use v1/chat/completions?', param='model')
    check_known(body, PARAMS)
    check_present(body, 'prompt')
    check_number(body, 'logprobs', 0, 5, True)
    check_number(body, 'temperature', 0, 2)
    check_number(body, 'n', 1, 128, True)
    check_number(body, 'max_tokens', 0, 16_384, True)
    if body.get('echo') and body.get('logprobs') is not None and 'instruct' in model:
        refuse(400, "Setting 'echo' and 'logprobs' at the same time is not supported for this model.", param='echo')


def prompts(prompt) -> list[list]:
    "Token ids of each prompt; it may come as text or ids, one or many."
    if isinstance(prompt, str): return [toy.tokenise(prompt)]
    if prompt and isinstance(prompt[0], int): return [prompt]
    return [toy.tokenise(p) if isinstance(p, str) else p for p in prompt]


def name_of(i: int, ask: Ask, openai: bool) -> str:
    "A token as text; OpenAI escapes one that holds a part of a character."
    if ask.as_ids: return f'token_id:{i}'
    text = toy.piece(i)
    if not openai or '\ufffd' not in text: return text
    return 'bytes:' + ''.join(chr(b) if 32 <= b < 127 else f'\\x{b:02x}' for b in toy.PIECES[i])


def columns(echoed: list, steps: list, ask: Ask, openai: bool, extra: bool) -> dict:
    "Log-probabilities in columns; the first token of a prompt has none."
    out = {'tokens': [], 'token_logprobs': [], 'top_logprobs': [], 'text_offset': []}
    offset = 0
    for n, s in enumerate([*echoed, *steps]):
        found, name = toy.dist(s.key, ask.view if n >= len(echoed) else 1.), name_of(s.id, ask, openai)
        none = n == 0 and echoed
        top = {name_of(i, ask, openai): found.logprobs[i] for i in found.ranked[:ask.k]}
        if extra: top.setdefault(name, found.logprobs[s.id])
        row = name, None if none else found.logprobs[s.id], None if none or not ask.k else top, offset
        for column, value in zip(out.values(), row): column.append(value)
        offset += len(toy.piece(s.id))
    return out


def choice(index: int, ids: list, found: toy.Answer, ask: Ask, body: dict, call: Call) -> dict:
    "One choice."
    flavour, echo = call.options.flavour, bool(body.get('echo'))
    echoed = [toy.Step(i, k) for i, k in zip(ids, toy.keys(ask.model, ids))] if echo and flavour != 'llama.cpp' else []
    made = {'index': index, 'text': (toy.untokenise(ids) if echo else '') + found.text, 'logprobs': None,
            'finish_reason': found.reason}
    if ask.k is not None and flavour == 'llama.cpp': made['logprobs'] = told(found.steps, ask)
    elif ask.k is not None: made['logprobs'] = columns(echoed, found.steps, ask, flavour == 'openai', True)
    if flavour == 'vllm': made['prompt_logprobs'] = compat.prompt_logprobs(body, ids, call.options)
    return made


def answer(call: Call) -> Reply:
    "POST /v1/completions"
    body, flavour = call.body, call.options.flavour
    check_model(body, call)
    if flavour == 'openai': check(body)
    elif body.get('prompt') is None: refuse(400, "'prompt' is required.", flavour, param='prompt')
    limit, model = body.get('max_tokens', 16), body.get('model') or call.options.model
    if flavour == 'vllm': compat.check_count(body.get('logprobs') or 0, call.options)
    choices, prompt, said = [], 0, 0
    for ids in prompts(body['prompt']):
        compat.check_ids(ids, flavour)
        ask = Ask(model, ids, limit, **common(body), k=body.get('logprobs'), with_ids=flavour == 'llama.cpp',
                  as_ids=flavour == 'vllm' and bool(body.get('return_tokens_as_token_ids')))
        if call.options.logprob_space == 'processed' and ask.temperature: ask.view = ask.temperature
        for found in answers(ask, call, limit):
            choices.append(choice(len(choices), ids, found, ask, body, call))
            said += len(found.steps)
        prompt += len(ids)
    head = {'id': identity('cmpl-', call.number), 'object': 'text_completion', 'created': CREATED, 'model': model}
    costs = {'tokens': prompt + said, 'reserve': prompt + (limit or 0)*len(choices)}
    usage = usage_of([], call)(prompt, said, 0)
    if not body.get('stream'): return Reply({**head, 'choices': choices, 'usage': usage}, **costs)
    return Reply(Events([*((None, {**head, 'choices': [c]}) for c in choices), (None, '[DONE]')]), **costs)
