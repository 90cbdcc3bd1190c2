"What the batch APIs share: lines that are answered bit by bit, as somebody asks how far they are."
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .common import Call, Document, Refusal

OPTIONS = dict(
    batch_polls=2,     # GETs of a batch that find it unfinished
    batch_fault=None,  # From a custom_id and the number of its line, from 1, to None, "expired", "error" or an Outcome
)
DAY = 24*60*60


def check_options(options):
    "Options of batches that make sense."
    for name, least in (('batch_polls', 0), ('batch_max_requests', 1), ('batch_max_bytes', 1)):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f'{name} is a whole number from {least} on')
    if options.batch_fault is not None and not callable(options.batch_fault): raise TypeError('batch_fault is callable')


class Outcome(NamedTuple):
    "How a line ended."
    kind: str              # succeeded, errored, expired or canceled
    status: int|None = None
    payload: Any = None


@dataclass
class Batch:
    "A batch and how far it has come."
    id: str
    call: Call                                     # That made it
    endpoint: str                                  # Where its lines might have been posted
    requests: list                                 # Pairs of a custom_id and a body
    status: str                                    # In the provider's words
    polls: int = 0                                 # GETs of itself
    outcomes: list = field(default_factory=list)   # Of its first lines
    at: dict = field(default_factory=dict)         # When it came to each status
    facts: dict = field(default_factory=dict)      # What only one provider tells
    errors: list = field(default_factory=list)     # Why it failed as a whole
    deleted: bool = False

    def __post_init__(self): self.at['created'] = time.time()

    @property
    def counts(self) -> Counter: "How many lines ended how."; return Counter(o.kind for o in self.outcomes)

    def mark(self, status: str):
        "Come to a status, the first time at least."
        self.status = status
        self.at.setdefault(status, time.time())

    def advance(self, run: Callable) -> bool:
        "Answer a share of the lines; gives whether it has been asked often enough to end."
        needed, total = self.call.options.batch_polls, len(self.requests)
        over = self.polls > needed
        upto = total if over else total*self.polls//max(needed, 2)
        for n in range(len(self.outcomes), upto): self.outcomes.append(self.outcome(n, run))
        return over

    def outcome(self, n: int, run: Callable) -> Outcome:
        "Answer one line by `run(call, whether it goes wrong)`."
        custom_id, body = self.requests[n]
        fault = self.call.options.batch_fault
        what = fault(custom_id, n + 1) if fault else None
        if isinstance(what, Outcome): return what
        if what not in (None, 'expired', 'error'): raise ValueError(f'batch_fault gave {what!r}')
        if what == 'expired': return Outcome('expired')
        line = replace(self.call, path=self.endpoint, body=body, number=f'{self.id}/{n}', query={}, batched=True)
        try: return Outcome('succeeded', 200, run(line, what == 'error').payload)
        except Refusal as e: return Outcome('errored', e.status, e.payload)

    def cancel(self):
        "Give up the lines that have no answer."
        self.outcomes += [Outcome('canceled')]*(len(self.requests) - len(self.outcomes))


def mixed(rows: list, seed) -> list:
    "Rows in another order, always the same one."
    out = list(rows)
    random.Random(repr(seed)).shuffle(out)
    return out if out != rows else rows[1:] + rows[:1]


def jsonl(rows: list) -> bytes: return b''.join(json.dumps(row).encode() + b'\n' for row in rows)


def lines(rows: list) -> Document: return Document('application/x-jsonl', jsonl(rows))


def page(rows: list, query: dict, default: int, most: int, after: str = 'after', before: str = '') -> tuple[list, bool]:
    "The rows that a query asks for, and whether there are more; ValueError where it makes no sense."
    limit, ids = query.get('limit', str(default)), [row['id'] for row in rows]
    if not limit.isdecimal() or not 1 <= int(limit) <= most: raise ValueError(f'limit must be from 1 to {most}')
    limit = int(limit)
    for name in (after, before):
        if name in query and query[name] not in ids: raise ValueError(f'{name}: no such object: {query[name]}')
    if before in query:
        rows = rows[:ids.index(query[before])]
        return rows[-limit:], len(rows) > limit
    if after in query: rows = rows[ids.index(query[after]) + 1:]
    return rows[:limit], len(rows) > limit
