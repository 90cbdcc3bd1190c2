"The DeepSeek protocol: OpenAI's chat, which thinks unless told otherwise."
from types import SimpleNamespace

from . import toy
from .chat import Ask, common, rendered, reply, thought
from .common import Call, Reply
from .forms import check_number, refuse
from .forms import error as openai_error
from .openai import check_messages, key_sent, own_headers  # noqa: F401

ROOT, LIMITS = '', 'openai'
MODELS = ['deepseek-v4-pro', 'deepseek-v4-flash']
CODES = {400: 'invalid_request_error', 401: 'invalid_request_error', 402: 'invalid_request_error',
         429: 'rate_limit_error'}
KINDS = {401: 'authentication_error', 402: 'unknown_error', 429: 'rate_limit_error'}


def options(given: dict) -> SimpleNamespace:
    "Checked options."
    unknown = set(given) - {'answer_tokens'}
    if unknown: raise TypeError(f'no such options: {unknown}')
    return SimpleNamespace(**{'answer_tokens': None, 'flavour': 'deepseek'} | given)


def failure(status: int, message: str|None, options=None, **_) -> dict:
    "An error in DeepSeek's form."
    return openai_error(status, message, kind=KINDS.get(status), code=CODES.get(status))


def usage_of(ids: list, call: Call):
    "What was used, with the part of the prompt that was in the cache."
    hit = call.memory.cached(ids, 64)
    def usage(prompt, visible, thinking):
        said = visible + thinking
        return {'prompt_tokens': prompt, 'completion_tokens': said, 'total_tokens': prompt + said,
                'prompt_tokens_details': {'cached_tokens': hit}, 'prompt_cache_hit_tokens': hit,
                'prompt_cache_miss_tokens': prompt - hit} | (
                {'completion_tokens_details': {'reasoning_tokens': thinking}} if thinking else {})
    return usage


def check(body: dict):
    "What DeepSeek insists on; it ignores what it does not know."
    if body.get('model') not in MODELS: refuse(400, 'Model Not Exist')
    check_messages(body, 'openai')
    check_number(body, 'temperature', 0, 2)
    check_number(body, 'max_tokens', 1, 393_216, True)
    check_number(body, 'top_logprobs', 0, 20, True)
    if (body.get('thinking') or {}).get('type', 'enabled') not in ('enabled', 'disabled'):
        refuse(400, 'Invalid value for thinking.type.', param='thinking')


def chat(call: Call) -> Reply:
    "POST /chat/completions"
    body = call.body
    check(body)
    thinks = (body.get('thinking') or {}).get('type', 'enabled') == 'enabled'
    if not thinks and body.get('top_logprobs') is not None and not body.get('logprobs'):
        refuse(400, 'Invalid request: top_logprobs needs logprobs.', param='top_logprobs')
    ignored = {'n', 'seed', 'top_p', 'logit_bias'} | ({'temperature'} if thinks else set())
    ask = Ask(body['model'], rendered(body['messages']), body.get('max_tokens'),
              **common({k: v for k, v in body.items() if k not in ignored}), thinks=thinks,
              k=(body.get('top_logprobs') or 0) if body.get('logprobs') and not thinks else None)
    message = {'reasoning_content': thought(ask)} if thinks else {}
    more = {'system_fingerprint': f'fp_{toy.begin(ask.model)[0]:08x}_prod0820_fp8_kvcache'}
    return reply(ask, call, usage_of(ask.ids, call), message, more)


def answer(call: Call) -> Reply:
    "One request."
    at = call.method, call.path.removeprefix('/v1')
    if at == ('GET', '/models'):
        return Reply({'object': 'list', 'data': [{'id': m, 'object': 'model', 'owned_by': 'deepseek'} for m in MODELS]})
    if at != ('POST', '/chat/completions'): refuse(404, 'Not Found')
    if not isinstance(call.body, dict): refuse(400, 'Failed to parse the request body as JSON.')
    return chat(call)
