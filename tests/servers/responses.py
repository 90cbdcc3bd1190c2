"OpenAI's Responses."
from . import toy
from .chat import CREATED, Ask, answers, common, rendered, row, think
from .common import Call, Events, Reply, identity
from .forms import check_known, check_number, check_present, refuse, unsupported
from .rules import check_model, legacy, thinks

PARAMS = set('''access_programs background context_management conversation image include input instructions
max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls previous_response_id prompt
prompt_cache_key prompt_cache_options prompt_cache_retention reasoning safety_identifier service_tier store stream
stream_options temperature text tool_choice tools top_logprobs top_p truncation user'''.split())
LOGPROBS = 'message.output_text.logprobs'


def check(body: dict, thinking: bool):
    "What OpenAI insists on."
    check_known(body, PARAMS)
    check_present(body, 'input')
    if legacy(body['model']): refuse(400, 'The requested model is not supported with the Responses API.', param='model')
    check_number(body, 'max_output_tokens', 16, whole=True)
    check_number(body, 'top_logprobs', 0, 20, True)
    check_number(body, 'temperature', 0, 2)
    if not thinking: return
    if LOGPROBS in (body.get('include') or []) or body.get('top_logprobs'):
        unsupported('top_logprobs', 'logprobs are not supported with reasoning models.')
    for name in ('temperature', 'top_p'):
        if body.get(name) not in (None, 1):
            unsupported(name, f"Unsupported parameter: '{name}' is not supported with this model.")


def messages(body: dict) -> list:
    "The conversation."
    given = body['input']
    rows = [{'role': 'user', 'content': given}] if isinstance(given, str) else [m for m in given if 'role' in m]
    told = body.get('instructions')
    return ([{'role': 'developer', 'content': told}] if told else []) + rows


def output(found: toy.Answer, ask: Ask, cut: bool) -> list:
    "Items: what was thought, what is said."
    logprobs = [row(s, ask) for s in found.steps] if ask.k is not None else []
    text = {'type': 'output_text', 'annotations': [], 'logprobs': logprobs, 'text': found.text}
    items = [{'id': identity('rs_', ask.ids), 'type': 'reasoning', 'summary': []}] if ask.thinks else []
    if cut and not found.steps: return items
    return [*items, {'id': identity('msg_', ask.ids, found.text), 'type': 'message', 'role': 'assistant',
                     'content': [text], 'status': 'incomplete' if cut else 'completed'}]


def events(made: dict, found: toy.Answer) -> Events:
    "A response as a stream."
    out = [{'type': 'response.created', 'response': made | {'status': 'in_progress', 'output': []}}]
    item = made['output'][-1]['id'] if made['output'] else ''
    where = {'item_id': item, 'output_index': len(made['output']) - 1, 'content_index': 0}
    out += [{'type': 'response.output_text.delta', **where, 'delta': part, 'logprobs': []} for part in found.parts]
    out += [{'type': f'response.{made["status"]}', 'response': made}]
    return Events((e['type'], e | {'sequence_number': n}) for n, e in enumerate(out))


def answer(call: Call) -> Reply:
    "POST /v1/responses"
    body = call.body
    check_model(body, call)
    thinking = thinks(body['model'], (body.get('reasoning') or {}).get('effort'))
    check(body, thinking)
    k = body.get('top_logprobs') or 0 if LOGPROBS in (body.get('include') or []) else None
    ask = Ask(body['model'], rendered(messages(body)), body.get('max_output_tokens'), **common(body), thinks=thinking,
              floor=True, k=k)
    spent = min(think(ask), ask.limit or 10**9)
    found = answers(ask, call, None if ask.limit is None else ask.limit - spent)[0]
    cut, said = found.reason == 'length', spent + len(found.steps)
    cached = call.memory.cached(ask.ids, 128, 1024)
    made = {'id': identity('resp_', ask.ids, call.number), 'object': 'response', 'created_at': CREATED,
            'model': ask.model, 'error': None, 'status': 'incomplete' if cut else 'completed',
            'output': output(found, ask, cut), 'parallel_tool_calls': True, 'instructions': body.get('instructions'),
            'incomplete_details': {'reason': 'max_output_tokens'} if cut else None,
            'metadata': {}, 'tool_choice': 'auto', 'tools': [], 'temperature': ask.temperature, 'top_p': ask.top_p,
            'top_logprobs': body.get('top_logprobs') or 0, 'store': body.get('store') is not False,
            'usage': {'input_tokens': len(ask.ids), 'output_tokens': said, 'total_tokens': len(ask.ids) + said,
                      'input_tokens_details': {'cached_tokens': cached, 'cache_write_tokens': 0},
                      'output_tokens_details': {'reasoning_tokens': spent}}}
    if made['store']: call.memory.stored[made['id']] = made
    costs = {'tokens': len(ask.ids) + said, 'reserve': len(ask.ids) + (ask.limit or said)}
    return Reply(events(made, found) if body.get('stream') else made, **costs)


def stored(call: Call) -> Reply:
    "GET /v1/responses/{id}"
    found = call.memory.stored.get(call.path.removeprefix('/v1/responses/'))
    return Reply(found) if found else refuse(404, 'Response not found.')
