"What may go wrong with an answer."
import json
from dataclasses import dataclass

KINDS = ('status', 'hang', 'drip', 'cut', 'cut_json', 'garbled', 'empty', 'html', 'reset', 'empty_answer')
LOGIN = '<!DOCTYPE html><html><head><title>Sign in</title></head><body><form>Please sign in</form></body></html>'


@dataclass(frozen=True)
class Fault:
    "One thing that goes wrong with one request."
    kind: str                         # One of `KINDS`
    status: int|None = None           # 500 for "status", else 200
    headers: dict|None = None         # Sent as well, or in place of ours
    body: dict|list|str|bytes|None = None  # None is the provider's own error, or the kind's own page
    seconds: float = 1.               # How long "drip" takes

    def __post_init__(self):
        if self.kind not in KINDS: raise ValueError(f'no such fault: {self.kind}; there are {", ".join(KINDS)}')


def page(fault: Fault, error) -> tuple[int, dict, bytes]|None:
    "Status, headers and body of a fault that needs no answer; None for the others."
    types = {'status': 'application/json', 'garbled': 'application/json', 'empty': 'application/json',
             'html': 'text/html; charset=utf-8'}
    if fault.kind not in types: return None
    status = fault.status or (500 if fault.kind == 'status' else 200)
    own = {'garbled': '{"id": "x", "choices": [}} oops', 'empty': '', 'html': LOGIN}
    body = fault.body if fault.body is not None else own.get(fault.kind)
    if body is None: body = error(status)
    if isinstance(body, (dict, list)): body = json.dumps(body)
    data = body.encode() if isinstance(body, str) else body
    return status, {'content-type': types[fault.kind], **lowered(fault.headers)}, data


def lowered(headers: dict|None) -> dict:
    "Headers by lower-case names."
    return {k.lower(): str(v) for k, v in (headers or {}).items()}
