"How servers of the OpenAI family say no."
from .common import Refusal

OPENAI = {401: ('invalid_request_error', 'invalid_api_key'), 403: ('invalid_request_error', 'unsupported_country'),
          429: ('requests', 'rate_limit_exceeded'), 400: ('invalid_request_error', None),
          404: ('invalid_request_error', None)}
NAMES = {400: 'BadRequestError', 401: 'AuthenticationError', 404: 'NotFoundError', 429: 'RateLimitError'}
LLAMA = {400: 'invalid_request_error', 401: 'authentication_error', 404: 'not_found_error', 503: 'unavailable_error'}
MESSAGES = {400: 'Bad request.', 401: 'Incorrect API key provided.', 402: 'Insufficient Balance', 403: 'Forbidden.',
            404: 'Not found.', 429: 'Rate limit reached. Please slow down.', 500: 'The server had an error.',
            503: 'The engine is currently overloaded, please try again later.'}


def error(status: int, message: str|None = None, flavour: str = 'openai', param=None, code=None, kind=None) -> dict:
    "An error as a flavour writes it."
    message = message or MESSAGES.get(status, 'Something went wrong.')
    if flavour == 'llama.cpp':
        return {'error': {'code': status, 'message': message, 'type': LLAMA.get(status, 'server_error')}}
    named = {'message': message, 'type': NAMES.get(status, 'InternalServerError'), 'param': param, 'code': status}
    if flavour == 'vllm': return {'error': named}
    if flavour == 'sglang': return {'object': 'error', **named}
    own_kind, own_code = OPENAI.get(status, ('server_error', None))
    return {'error': {'message': message, 'type': kind or own_kind, 'param': param, 'code': code or own_code}}


def refuse(status: int, message: str, flavour: str = 'openai', **more):
    "End the request."
    raise Refusal(status, error(status, message, flavour, **more))


def unsupported(param: str, message: str): refuse(400, message, param=param, code='unsupported_parameter')


def check_known(body: dict, known: set):
    "Nothing that the endpoint has not heard of."
    for name in body:
        if name not in known: refuse(400, f"Unknown parameter: '{name}'.", param=name, code='unknown_parameter')


def check_present(body: dict, *names: str):
    "Nothing missing."
    for name in names:
        if body.get(name) in (None, []):
            refuse(400, f"Missing required parameter: '{name}'.", param=name, code='missing_required_parameter')


def check_number(body: dict, name: str, low: float, high: float = float('inf'), whole: bool = False,
                 flavour: str = 'openai'):
    "A number within bounds, or nothing."
    value = body.get(name)
    if value is None: return
    wanted = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted):
        refuse(400, f"Invalid type for '{name}': expected {'an integer' if whole else 'a number'}.", flavour,
               param=name, code='invalid_type')
    if not low <= value <= high:
        side, bound = ('below minimum', low) if value < low else ('above maximum', high)
        refuse(400, f"Invalid '{name}': {value} is {side} value {bound}.", flavour, param=name,
               code=f'integer_{side.replace(" ", "_")}_value')
