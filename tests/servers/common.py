"What the protocols share: a request, its answer, a refusal, a memory."
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from zlib import crc32


class Refusal(Exception):
    "Ends a request with an error in the provider's own form."
    def __init__(self, status: int, payload: Any, headers: dict|None = None):
        self.status, self.payload, self.headers = status, payload, headers or {}


class Events(list):
    "An answer as server-sent events: pairs of a name or None and a payload, a string as it is."


@dataclass(frozen=True)
class Document:
    "An answer that is no JSON."
    kind: str    # Its content type
    data: bytes


class Reply(NamedTuple):
    "What a protocol answers, and what a limiter may charge for it."
    payload: Any
    status: int = 200
    headers: dict = {}
    tokens: int = 0   # Tokens of prompt and answer
    reserve: int = 0  # Tokens of the prompt and all that the answer was allowed
    then: Callable|None = None  # What is done once the limits have let it pass


class Memory:
    "What a server remembers from one request to the next."
    def __init__(self):
        self.turns, self.stored, self.prefixes = Counter(), {}, set()
        self.files, self.batches = {}, {}

    def turn(self, what) -> int:
        "How often this was asked before."
        self.turns[what] += 1
        return self.turns[what] - 1

    def cached(self, ids: list, block: int = 64, least: int = 0) -> int:
        "How many leading tokens came before, in whole blocks."
        mark, hit = 0, 0
        for end in range(block, len(ids) + 1, block):
            mark = crc32(b','.join(b'%d' % i for i in ids[end - block:end]), mark)
            if (end, mark) in self.prefixes: hit = end
            self.prefixes.add((end, mark))
        return hit if hit >= least else 0


@dataclass
class Call:
    "One request on its way through a protocol."
    method: str
    path: str
    headers: dict
    body: Any
    options: Any
    memory: Memory = field(default_factory=Memory)
    blank: bool = False  # Answer in form, with no text
    number: int|str = 0
    query: dict = field(default_factory=dict)
    raw: bytes = b''
    root: str = ''         # Of the server
    batched: bool = False  # A line of a batch


def identity(prefix: str, *parts) -> str:
    "An id that only depends on its parts."
    return f'{prefix}{crc32(repr(parts).encode()):08x}{crc32(repr(parts[::-1]).encode(), 7):08x}'
