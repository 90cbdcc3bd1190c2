"A toy language model: byte-level vocabulary, next-token distributions from a hash of the context."
import codecs
import itertools
import math
import random
import re
from functools import lru_cache
from string import ascii_lowercase
from typing import NamedTuple
from zlib import crc32

WORDS = '''the of and to in is it that was for on are as with they be at one have this from or had by hot but some
what there we can out other were all your when up use word how said an each she which do their time if will way about
many then them would write like so these her long make thing see him two has look more day could go come did my sound
no most number who over know water than call first people may down side been now find any new work part take get place
made live where after back little only round man year came show every good me give our under name very through just
form much great think say help low line before turn cause same mean differ move right boy old too does tell sentence
set three want air well also play small end put home read hand port large spell add even land here must big high such
follow act why ask men change went light kind off need house picture try us again animal point mother world near build
self earth father'''.split()
STARTS = 'The It This That One Some Most We They There'.split()
ROLES = ['system', 'developer', 'user', 'assistant', 'tool', 'function']
SPLIT = [(' café'.encode(), 5), (' 🌍'.encode(), 4)]  # Characters that fall apart into two tokens, and where
PIECES = list(dict.fromkeys([
    *(bytes([i]) for i in range(256)), *(f'<|{r}|>'.encode() for r in ROLES), *(s.encode() for s in STARTS),
    *(f' {w}'.encode() for w in WORDS), *(part for text, at in SPLIT for part in (text[:at], text[at:])),
    *(f' {c}'.encode() for c in ascii_lowercase),
    *(''.join(p).encode() for p in itertools.product(ascii_lowercase, repeat=2))]))
IDS = {piece: i for i, piece in enumerate(PIECES)}
PAIRS = {IDS[text[:at]]: IDS[text[at:]] for text, at in SPLIT}
MARKS = {IDS[f'<|{r}|>'.encode()] for r in ROLES}
OPENERS = [IDS[s.encode()] for s in STARTS]
CANDIDATES = sorted({*OPENERS, *(IDS[f' {w}'.encode()] for w in WORDS), IDS[b'.'], IDS[b',']})
BANKS, SLOT = 32, (8, 4)
_pattern = re.compile(b'|'.join(map(re.escape, sorted(PIECES[256:], key=len, reverse=True))) + b'|.', re.S)


class Step(NamedTuple):
    "A token that was said and the distribution that it came from."
    id: int
    key: tuple


class Answer(NamedTuple):
    "Tokens, the text each adds, and why it ended."
    steps: list
    parts: list
    reason: str = 'stop'
    matched: str|None = None

    @property
    def text(self) -> str: return ''.join(self.parts)


class Dist:
    "Log-probabilities of the next token."
    def __init__(self, logits: list):
        top = max(logits)
        total = top + math.log(sum(math.exp(x - top) for x in logits))
        self.logprobs = [round(x - total, 7) for x in logits]
        self.ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
        self.rank = {i: r for r, i in enumerate(self.ranked)}


def tokenise(text: str) -> list:
    "Ids of a text; `piece` undoes it."
    return [IDS[p] for p in _pattern.findall(text.encode('utf-8', 'surrogatepass'))]


def piece(i: int) -> str:
    "A token as text: U+FFFD where it holds a part of a character."
    return PIECES[i].decode('utf-8', 'replace')


def untokenise(ids: list) -> str:
    "The text of ids."
    return b''.join(PIECES[i] for i in ids).decode('utf-8', 'replace')


def step(state: tuple, i: int) -> tuple:
    "The context after one more token: its hash, tokens since a role began, the last token."
    mark, since, _ = state
    return crc32(b'%d,' % i, mark), 0 if i in MARKS else since + 1, i


def begin(model: str, ids: list = ()) -> tuple:
    "The context after some tokens."
    state = crc32(model.encode()), 0, None
    for i in ids: state = step(state, i)
    return state


def key(state: tuple) -> tuple:
    "Names the distribution that follows a context."
    mark, since, last = state
    if last in PAIRS: return 'after', last
    kind = 'start' if since == 0 else 'slot' if since % SLOT[0] == SLOT[1] else 'word'
    return kind, mark % BANKS


def keys(model: str, ids: list) -> list:
    "Names of the distributions that each of some tokens came from."
    state, found = begin(model), []
    for i in ids:
        found.append(key(state))
        state = step(state, i)
    return found


@lru_cache(1024)
def dist(key: tuple, temperature: float = 1.) -> Dist:
    "The distribution of a name."
    kind, which = key
    rng = random.Random(f'{key}')
    logits = [-12 + rng.random() for _ in PIECES]
    for i in CANDIDATES: logits[i] = rng.gauss(0, 2.8)
    for i in OPENERS: logits[i] += 9 if kind == 'start' else -9
    if kind == 'slot': logits[list(PAIRS)[which % len(PAIRS)]] = max(logits) + 5
    if kind == 'after': logits[PAIRS[which]] = max(logits) + 9
    return Dist([x/temperature for x in logits])


@lru_cache(4096)
def _lottery(key: tuple, temperature: float, top_p: float, bias: tuple) -> tuple:
    "Tokens that may be said and their cumulative weights."
    found, wanted = dist(key), dict(bias)
    logits = sorted(((found.logprobs[i] + wanted.get(i, 0))/temperature, i) for i in CANDIDATES)[::-1]
    weights = [math.exp(x - logits[0][0]) for x, _ in logits]
    sums = list(itertools.accumulate(weights))
    keep = next((n + 1 for n, s in enumerate(sums) if s >= top_p*sums[-1]), len(sums))
    return [i for _, i in logits[:keep]], sums[:keep]


def pick(key: tuple, temperature: float, rng: random.Random, top_p: float, bias: tuple) -> int:
    "The next token; a split character always comes where it is due."
    if key[0] in ('slot', 'after'): return dist(key).ranked[0]
    ids, sums = _lottery(key, temperature or 1., top_p, bias)
    return rng.choices(ids, cum_weights=sums)[0] if temperature else ids[0]


def decoded(steps: list) -> list:
    "The text that each token adds; part of a character waits for its rest."
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    parts = [decoder.decode(PIECES[s.id]) for s in steps]
    if parts: parts[-1] += decoder.decode(b'', True)
    return parts


def cut(answer: Answer, stop: tuple) -> Answer:
    "An answer up to the first of some strings."
    found = sorted((answer.text.index(s), s) for s in stop if s and s in answer.text)
    if not found: return answer
    at, parts = found[0][0], []
    for part in answer.parts:
        if at <= 0: break
        parts.append(part[:at])
        at -= len(part)
    return Answer(answer.steps[:len(parts)], parts, 'stop', found[0][1])


def generate(model: str, ids: list, limit: int|None = None, temperature: float = 1., top_p: float = 1., seed='',
             bias: tuple = (), stop: tuple = (), length: int|None = None) -> Answer:
    "An answer of `length` tokens, or as many as a hash says, within the limit."
    state, steps = begin(model, ids), []
    if length is None: length = 8 + state[0] % 17
    rng = random.Random(f'{seed}/{state[0]}')
    while len(steps) < length or state[2] in PAIRS:  # it never ends by itself within a character
        if len(steps) == limit: break
        name = key(state)
        steps.append(Step(pick(name, temperature, rng, top_p, bias), name))
        state = step(state, steps[-1].id)
    over = length and len(steps) == limit
    return cut(Answer(steps, decoded(steps), 'length' if over else 'stop'), stop)
