"The OpenAI protocol, and what other servers make of it."
from types import SimpleNamespace

from . import batches, compat, completions, openai_batches, responses, toy
from .chat import CREATED, Ask, common, rendered, reply
from .common import Call, Reply, identity
from .forms import check_known, check_number, check_present, error, refuse, unsupported
from .rules import check_model, legacy, reasons, thinks, usage_of

ROOT, LIMITS = '/v1', 'openai'
FLAVOURS = ('openai', 'vllm', 'sglang', 'llama.cpp', 'plain', 'dropper')
OPTIONS = dict(flavour='openai', model=None, logprob_space='raw', answer_tokens=None, max_logprobs=20,
               **batches.OPTIONS, batch_max_requests=50_000, batch_max_bytes=200_000_000)
MODELS = ['gpt-4o', 'gpt-4o-mini', 'gpt-4.1', 'gpt-4.1-mini', 'gpt-5', 'gpt-5-mini', 'gpt-5-chat-latest', 'gpt-5-pro',
          'gpt-5.1', 'gpt-5.1-codex', 'o3', 'o4-mini', 'gpt-3.5-turbo', 'gpt-3.5-turbo-instruct', 'davinci-002',
          'babbage-002']
PARAMS = set('''messages model audio frequency_penalty function_call functions logit_bias logprobs
max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls prediction presence_penalty
prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed
service_tier stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity
web_search_options'''.split())
FIXED = {'temperature': 1, 'top_p': 1, 'presence_penalty': 0, 'frequency_penalty': 0}
KEPT = ('model', 'messages', 'prompt', 'max_tokens', 'stream')


def options(given: dict) -> SimpleNamespace:
    "Checked options."
    if set(given) - set(OPTIONS): raise TypeError(f'no such options: {set(given) - set(OPTIONS)}')
    made = SimpleNamespace(**OPTIONS | given)
    if made.flavour not in FLAVOURS: raise ValueError(f'no such flavour: {made.flavour}; there are {FLAVOURS}')
    if made.logprob_space not in ('raw', 'processed'): raise ValueError('logprob_space is "raw" or "processed"')
    batches.check_options(made)
    if made.model is None and made.flavour != 'openai': made.model = 'm'
    return made


def key_sent(headers: dict) -> str|None:
    "The key of a request."
    sent = headers.get('authorization', '')
    return sent[7:] if sent.startswith('Bearer ') else None


def failure(status: int, message: str|None, options, **more) -> dict:
    "An error in the form of a flavour."
    return error(status, message, options.flavour, **more)


def own_headers(number: int) -> dict: return {'x-request-id': identity('req_', number)}


def check_messages(body: dict, flavour: str):
    "A conversation."
    messages = body.get('messages')
    if not isinstance(messages, list) or not messages:
        refuse(400, "'messages' must be a non-empty array.", flavour, param='messages')
    for n, m in enumerate(messages):
        if not isinstance(m, dict) or m.get('role') not in toy.ROLES:
            name = f'messages[{n}].role'
            refuse(400, f"Invalid value for '{name}'.", flavour, param=name, code='invalid_value')


def check_chat(body: dict):
    "What OpenAI insists on."
    model, effort = body['model'], body.get('reasoning_effort')
    check_known(body, PARAMS)
    check_present(body, 'messages')
    if '-pro' in model or 'codex' in model:
        refuse(404, 'This model is only supported in v1/responses and not in v1/chat/completions.', param='model')
    if legacy(model):
        refuse(404, 'This is not a chat model and thus not supported in the v1/chat/completions endpoint. '
               'Did you mean to use v1/completions?', param='model')
    for name, high in (('temperature', 2), ('top_p', 1)): check_number(body, name, 0, high)
    for name, high in (('n', 128), ('max_tokens', 10**7), ('max_completion_tokens', 10**7)):
        check_number(body, name, 1, high, True)
    check_number(body, 'top_logprobs', 0, 20, True)
    if body.get('top_logprobs') is not None and body.get('logprobs') is not True:
        refuse(400, "'logprobs' must be true when 'top_logprobs' is set.", param='top_logprobs', code='invalid_value')
    if body.get('stream_options') and not body.get('stream'):
        refuse(400, "'stream_options' is only allowed when 'stream' is enabled.", param='stream_options')
    if effort is not None and not reasons(model):
        unsupported('reasoning_effort', "Unsupported parameter: 'reasoning_effort' is not supported with this model.")
    if effort == 'none' and thinks(model, effort):
        refuse(400, "Unsupported value: 'none' is not supported with this model.", param='reasoning_effort',
               code='unsupported_value')
    if thinks(model, effort): check_reasoning(body)


def check_reasoning(body: dict):
    "What a model that thinks does not take."
    if body.get('logprobs') or body.get('top_logprobs') is not None:
        unsupported('logprobs', 'logprobs are not supported with reasoning models.')
    if body.get('max_tokens') is not None:
        unsupported('max_tokens', "Unsupported parameter: 'max_tokens' is not supported with this model. "
                    "Use 'max_completion_tokens' instead.")
    if body.get('logit_bias'):
        unsupported('logit_bias', "Unsupported parameter: 'logit_bias' is not supported with this model.")
    for name, only in FIXED.items():
        if body.get(name, only) not in (None, only):
            refuse(400, f"Unsupported value: '{name}' does not support {body[name]} with this model. "
                   f'Only the default ({only}) value is supported.', param=name, code='unsupported_value')


def count_of(body: dict, options) -> int|None:
    "How many candidates a flavour gives."
    if not body.get('logprobs'): return None
    k, flavour = body.get('top_logprobs') or 0, options.flavour
    if flavour == 'vllm': compat.check_count(k, options)
    return min(k, 5) if flavour == 'plain' else k if k >= 0 else len(toy.PIECES)


def chat(call: Call) -> Reply:
    "POST /v1/chat/completions"
    body, flavour = call.body, call.options.flavour
    check_model(body, call)
    check_messages(body, flavour)
    if flavour == 'openai': check_chat(body)
    else: compat.check_chat(body, flavour)
    limit = body.get('max_completion_tokens') or body.get('max_tokens')
    processed = call.options.logprob_space == 'processed'
    ids = rendered(body['messages'], compat.opens(body, call.options))
    ask = Ask(body.get('model') or call.options.model, ids, limit, **common(body),
              thinks=flavour == 'openai' and thinks(body['model'], body.get('reasoning_effort')),
              k=count_of(body, call.options), floor=flavour == 'openai', with_ids=flavour == 'llama.cpp',
              as_ids=flavour == 'vllm' and bool(body.get('return_tokens_as_token_ids')))
    if processed and ask.temperature: ask.view = ask.temperature
    more = {'system_fingerprint': identity('fp_', ask.model), 'service_tier': 'default'} if flavour == 'openai' else {}
    if flavour == 'vllm': more['prompt_logprobs'] = compat.prompt_logprobs(body, ask.ids, call.options)
    message = {'refusal': None, 'annotations': []} if flavour == 'openai' else {}
    return reply(ask, call, usage_of(ask.ids, call), message, more)


def models(call: Call) -> Reply:
    "GET /v1/models and /v1/models/{id}"
    names = [call.options.model] if call.options.model else MODELS
    rows = [{'id': n, 'object': 'model', 'created': CREATED, 'owned_by': 'system'} for n in names]
    if call.path == '/v1/models': return Reply({'object': 'list', 'data': rows})
    found = [r for r in rows if r['id'] == call.path.removeprefix('/v1/models/')]
    if not found: refuse(404, 'The model does not exist.', call.options.flavour, code='model_not_found')
    return Reply(found[0])


def answer(call: Call) -> Reply:
    "One request."
    flavour, at = call.options.flavour, (call.method, call.path)
    routes = {('POST', '/v1/chat/completions'): chat, ('GET', '/v1/models'): models}
    if flavour != 'plain': routes['POST', '/v1/completions'] = completions.answer
    if flavour == 'openai': routes['POST', '/v1/responses'] = responses.answer
    routes |= compat.ROUTES.get(flavour, {})
    if call.method == 'GET' and call.path.startswith('/v1/models/'): return models(call)
    if flavour == 'openai' and call.method == 'GET' and call.path.startswith('/v1/responses/'):
        return responses.stored(call)
    if flavour not in ('plain', 'dropper') and openai_batches.knows(call.path):
        return openai_batches.answer(call, answer)
    if at not in routes: refuse(404, f'Invalid URL ({call.method} {call.path})', flavour)
    if call.method == 'POST' and not isinstance(call.body, dict):
        refuse(400, 'We could not parse the JSON body of your request.', flavour)
    if flavour == 'dropper': call.body = {k: v for k, v in call.body.items() if k in KEPT} if call.body else None
    return routes[at](call)
