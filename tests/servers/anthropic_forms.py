"How Anthropic says no."
import re

from .common import Call, Refusal, identity

KINDS = {400: 'invalid_request_error', 401: 'authentication_error', 402: 'billing_error', 403: 'permission_error',
         404: 'not_found_error', 413: 'request_too_large', 429: 'rate_limit_error', 500: 'api_error',
         504: 'timeout_error', 529: 'overloaded_error'}
MESSAGES = {429: 'This request would exceed your rate limit. Please try again later.', 500: 'Internal server error',
            529: 'Overloaded'}


def failure(status: int, message: str|None = None, options=None, **_) -> dict:
    "An error in Anthropic's form."
    said = message or MESSAGES.get(status, 'Error')
    return {'type': 'error', 'error': {'type': KINDS.get(status, 'api_error'), 'message': said},
            'request_id': identity('req_', said)}


def refuse(message: str, status: int = 400): raise Refusal(status, failure(status, message))


def check_headers(call: Call) -> str:
    "The version that was asked for."
    version = call.headers.get('anthropic-version')
    if not version: refuse('anthropic-version: header is required')
    if not re.fullmatch(r'\d{4}-\d\d-\d\d', version): refuse(f'anthropic-version: "{version}" is not a valid version')
    return version
