"The Anthropic protocol: Messages."
from types import SimpleNamespace

from . import anthropic_batches, batches, toy
from .anthropic_forms import check_headers, failure, refuse  # noqa: F401
from .chat import Ask, answers, rendered, text_of, think, thought
from .common import Call, Events, Reply, identity

ROOT, LIMITS = '', 'anthropic'
OPTIONS = dict(answer_tokens=None, **batches.OPTIONS, batch_max_requests=100_000, batch_max_bytes=256_000_000)
MODELS = ['claude-opus-5', 'claude-sonnet-5', 'claude-sonnet-4-6', 'claude-haiku-4-5']
PARAMS = set('''max_tokens messages model cache_control container diagnostics inference_geo metadata output_config
service_tier speed stop_sequences stream system thinking tool_choice tools user_profile_id workspace_id temperature
top_p top_k'''.split())
SAMPLING, NO_SAMPLING, MOST = ('temperature', 'top_p', 'top_k'), '2026-10-21', 21_333


def options(given: dict) -> SimpleNamespace:
    "Checked options."
    unknown = set(given) - set(OPTIONS)
    if unknown: raise TypeError(f'no such options: {unknown}')
    made = SimpleNamespace(**OPTIONS | given, needs_key=True)
    batches.check_options(made)
    return made


def key_sent(headers: dict) -> str|None:
    "The key of a request, in either header."
    bearer = headers.get('authorization', '')
    return bearer[7:] if bearer.startswith('Bearer ') else headers.get('x-api-key')


def own_headers(number: int) -> dict: return {'request-id': identity('req_', number)}


def check_messages(messages):
    "A conversation of user and assistant."
    if not isinstance(messages, list): refuse('messages: Field required')
    if not messages: refuse('messages: at least one message is required')
    for n, m in enumerate(messages):
        role = m.get('role') if isinstance(m, dict) else None
        if role == 'system':
            refuse('messages: Unexpected role "system". The Messages API accepts a top-level `system` parameter, not '
                   '"system" as an input message role.')
        if role not in ('user', 'assistant'): refuse(f"messages.{n}.role: Input should be 'user' or 'assistant'")
        if not m.get('content'): refuse(f'messages.{n}: all messages must have non-empty content')


def check_sampling(body: dict, version: str):
    "No sampling knobs since a version; before, within bounds."
    for name in SAMPLING:
        if name not in body: continue
        if version >= NO_SAMPLING: refuse(f'`{name}` is deprecated for this model.')
        value, most = body[name], 1 if name != 'top_k' else 10**9
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
            refuse(f'{name}: Input should be less than or equal to {most}')


def check(body: dict, version: str, batched: bool = False):
    "What Anthropic insists on."
    for name in body:
        if name not in PARAMS: refuse(f'{name}: Extra inputs are not permitted')
    for name in ('model', 'max_tokens'):
        if body.get(name) is None: refuse(f'{name}: Field required')
    if not str(body['model']).startswith('claude-'): refuse(f'model: {body["model"]}', 404)
    most = body['max_tokens']
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        refuse('max_tokens: Input should be greater than or equal to 1')
    if most > MOST and not body.get('stream') and not batched:
        refuse('Streaming is required for operations that may take longer than 10 minutes.')
    check_messages(body.get('messages'))
    check_sampling(body, version)
    thinking = body.get('thinking') or {}
    if thinking.get('type') != 'enabled': return
    budget = thinking.get('budget_tokens') or 0
    if budget < 1024: refuse('thinking.enabled.budget_tokens: Input should be greater than or equal to 1024')
    if budget >= most: refuse('`max_tokens` must be greater than `thinking.budget_tokens`.')


def rendered_request(body: dict) -> list:
    "Token ids of a request."
    system = [{'role': 'system', 'content': text_of(body['system'])}] if body.get('system') else []
    return rendered([*system, *body['messages']])


def usage_of(ids: list, said: int, call: Call) -> dict:
    "What was used; cached input is counted apart, and only where the request asks for a cache."
    hit = call.memory.cached(ids, 64) if 'cache_control' in repr(call.body) else 0
    return {'input_tokens': len(ids) - hit, 'output_tokens': said, 'cache_creation_input_tokens': 0,
            'cache_read_input_tokens': hit, 'service_tier': 'standard'}


def message(call: Call) -> Reply:
    "POST /v1/messages"
    body = call.body
    check(body, check_headers(call), call.batched)
    ask = Ask(body['model'], rendered_request(body), body['max_tokens'], temperature=body.get('temperature', 1.),
              top_p=body.get('top_p', 1.), stop=tuple(body.get('stop_sequences') or ()),
              thinks=(body.get('thinking') or {}).get('type') in ('enabled', 'adaptive'))
    spent = min(think(ask), ask.limit)
    found = answers(ask, call, ask.limit - spent)[0]
    content = []
    if ask.thinks:
        content.append({'type': 'thinking', 'thinking': thought(ask), 'signature': identity('sig', ask.ids)})
    if found.text: content.append({'type': 'text', 'text': found.text})
    usage = usage_of(ask.ids, spent + len(found.steps), call)
    reason = 'stop_sequence' if found.matched else {'stop': 'end_turn', 'length': 'max_tokens'}[found.reason]
    made = {'id': identity('msg_', ask.ids, call.number), 'type': 'message', 'role': 'assistant', 'model': ask.model,
            'content': content, 'stop_reason': reason, 'stop_sequence': found.matched, 'usage': usage}
    costs = {'tokens': len(ask.ids) + usage['output_tokens'], 'reserve': len(ask.ids) + ask.limit}
    return Reply(events(made, found) if body.get('stream') else made, **costs)


def deltas(block: dict, found: toy.Answer) -> list:
    "What a block is told in."
    if block['type'] == 'text': return [{'type': 'text_delta', 'text': part} for part in found.parts if part]
    words = [{'type': 'thinking_delta', 'thinking': f'{w} '} for w in block['thinking'].split()]
    return [*words, {'type': 'signature_delta', 'signature': block['signature']}]


def events(made: dict, found: toy.Answer) -> Events:
    "A message as a stream."
    blank = {'text': {'text': ''}, 'thinking': {'thinking': '', 'signature': ''}}
    start = {'content': [], 'stop_reason': None, 'stop_sequence': None, 'usage': made['usage'] | {'output_tokens': 1}}
    out = [{'type': 'message_start', 'message': made | start}]
    for i, block in enumerate(made['content']):
        opened = {'type': block['type'], **blank[block['type']]}
        out.append({'type': 'content_block_start', 'index': i, 'content_block': opened})
        if i == 0: out.append({'type': 'ping'})
        out += [{'type': 'content_block_delta', 'index': i, 'delta': d} for d in deltas(block, found)]
        out.append({'type': 'content_block_stop', 'index': i})
    out.append({'type': 'message_delta', 'delta': {k: made[k] for k in ('stop_reason', 'stop_sequence')},
                'usage': {'output_tokens': made['usage']['output_tokens']}})
    return Events((e['type'], e) for e in [*out, {'type': 'message_stop'}])


def models(call: Call) -> Reply:
    "GET /v1/models"
    check_headers(call)
    rows = [{'type': 'model', 'id': m, 'display_name': m, 'created_at': '2026-02-19T00:00:00Z'} for m in MODELS]
    return Reply({'data': rows, 'has_more': False, 'first_id': MODELS[0], 'last_id': MODELS[-1]})


def answer(call: Call) -> Reply:
    "One request."
    at = call.method, call.path
    if at == ('GET', '/v1/models'): return models(call)
    if anthropic_batches.knows(call.path): return anthropic_batches.answer(call, message)
    if at not in (('POST', '/v1/messages'), ('POST', '/v1/messages/count_tokens')): refuse('Not found', 404)
    if not isinstance(call.body, dict): refuse('The request body is not valid JSON')
    if at[1] == '/v1/messages': return message(call)
    check_headers(call)
    check_messages(call.body.get('messages'))
    return Reply({'input_tokens': len(rendered_request(call.body))})
