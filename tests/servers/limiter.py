"Rate limits as providers keep them: requests and tokens a minute."
import math
import threading
import time
from datetime import datetime, timezone
from email.utils import formatdate
from typing import NamedTuple


class Bucket:
    "Fills all the time, up to what it holds."
    def __init__(self, per_minute: float, burst: float, window_s: float):
        self.limit, self.rate, self.size = per_minute, per_minute/60, max(1., per_minute*burst)
        self.level, self.at = self.size, None

    def have(self, now: float) -> float:
        if self.at is not None: self.level = min(self.size, self.level + (now - self.at)*self.rate)
        self.at = now
        return self.level

    def wait(self, now: float, cost: float) -> float: return max(0., (cost - self.have(now))/self.rate)
    def full_in(self, now: float) -> float: return (self.size - self.have(now))/self.rate
    def most(self, seconds: float) -> float: return self.size + self.rate*seconds
    def take(self, cost: float): self.level -= cost


class Window:
    "Gives its allowance anew at the start of each window; the first begins with the first request."
    def __init__(self, per_minute: float, burst: float, window_s: float):
        self.limit, self.length, self.size = per_minute, window_s, max(1., per_minute*window_s/60)
        self.level, self.began = self.size, None

    def have(self, now: float) -> float:
        if self.began is None: self.began = now
        over = int((now - self.began)//self.length)
        if over: self.began, self.level = self.began + over*self.length, self.size
        return self.level

    def wait(self, now: float, cost: float) -> float: return 0. if self.have(now) >= cost else self.full_in(now)
    def full_in(self, now: float) -> float: self.have(now); return self.began + self.length - now
    def most(self, seconds: float) -> float: return self.size*(int(seconds//self.length) + 1)
    def take(self, cost: float): self.level -= cost


class Verdict(NamedTuple):
    "Whether a request may pass, and if not, what is used up and for how long."
    ok: bool
    what: str = ''
    wait: float = 0.
    too_large: bool = False  # It never could


def duration(seconds: float) -> str:
    "Seconds as OpenAI writes them: 120ms, 1.2s, 6m0s."
    if seconds < 1: return f'{math.ceil(seconds*1000)}ms'
    minutes, rest = divmod(math.ceil(seconds*1000)/1000, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f'{f"{hours}h" if hours else ""}{f"{minutes}m" if hours or minutes else ""}{round(rest, 3):g}s'


class Limiter:
    "Lets requests through while both their number and their tokens are within limits."
    def __init__(
        self,
        requests_per_minute: float = 300,
        tokens_per_minute: float = 20_000,
        burst: float = 1.,                # Fraction of a minute's allowance that a bucket holds
        kind: str = 'bucket',             # Or "window"
        headers: bool = True,             # Whether answers tell what is left
        retry_after: str|None = 'seconds', # Or "date", or None
        charge: str = 'actual',           # Or "max_tokens": all that an answer was allowed
        window_s: float = 60.,            # Length of a window; the allowance is scaled to it
    ):
        meter = {'bucket': Bucket, 'window': Window}[kind]
        self.requests, self.tokens = (meter(n, burst, window_s) for n in (requests_per_minute, tokens_per_minute))
        self.headers, self.retry_after, self.charge, self._lock = headers, retry_after, charge, threading.Lock()
        self.admitted = self.refused = self.tokens_admitted = 0

    def take(self, tokens: float) -> Verdict:
        "Admit one request of so many tokens, or refuse it."
        with self._lock:
            now = time.monotonic()
            waits = {'requests': self.requests.wait(now, 1), 'tokens': self.tokens.wait(now, tokens)}
            what = max(waits, key=waits.get)
            if waits[what] > 0:
                self.refused += 1
                return Verdict(False, what, waits[what], tokens > self.tokens.size)
            self.requests.take(1); self.tokens.take(tokens)
            self.admitted += 1
            self.tokens_admitted += tokens
            return Verdict(True)

    def allowed(self, seconds: float) -> tuple[float, float]:
        "Requests and tokens that pass at most in so many seconds from the first request on."
        return self.requests.most(seconds), self.tokens.most(seconds)

    def retry_headers(self, verdict: Verdict) -> dict:
        "When to come back, as far as it tells."
        if self.retry_after is None or verdict.too_large: return {}
        if self.retry_after == 'seconds': return {'retry-after': str(math.ceil(verdict.wait))}
        return {'retry-after': formatdate(math.ceil(time.time() + verdict.wait), usegmt=True)}

    def _left(self) -> dict:
        "Limit, what is left and seconds to full, of requests and of tokens."
        with self._lock:
            now, meters = time.monotonic(), {'requests': self.requests, 'tokens': self.tokens}
            return {k: (int(m.limit), max(0, int(m.have(now))), m.full_in(now)) for k, m in meters.items()}

    def openai_headers(self) -> dict:
        "As OpenAI tells it."
        if not self.headers: return {}
        return {f'x-ratelimit-{name}-{what}': str(value) for what, (limit, left, full) in self._left().items()
                for name, value in (('limit', limit), ('remaining', left), ('reset', duration(full)))}

    def anthropic_headers(self) -> dict:
        "As Anthropic tells it; input and output tokens share one allowance here."
        if not self.headers: return {}
        left = self._left()
        rows = {what: left['requests' if what == 'requests' else 'tokens']
                for what in ('requests', 'tokens', 'input-tokens', 'output-tokens')}
        def at(wait):
            moment = datetime.fromtimestamp(math.ceil(time.time() + wait), timezone.utc)
            return moment.strftime('%Y-%m-%dT%H:%M:%SZ')
        return {f'anthropic-ratelimit-{what}-{name}': str(value) for what, (limit, remaining, full) in rows.items()
                for name, value in (('limit', limit), ('remaining', remaining), ('reset', at(full)))}
