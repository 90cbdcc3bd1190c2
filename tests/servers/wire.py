"A real HTTP/1.1 server on 127.0.0.1, in a thread of this process, that speaks one provider's protocol."
import asyncio
import re
import socket
import threading
import time
from collections import deque
from urllib.parse import parse_qsl

from . import anthropic, deepseek, openai, rest
from .common import Call, Memory, Refusal, Reply
from .connection import Connection, Seen
from .faults import Fault, lowered, page
from .http11 import encoded
from .limiter import Limiter

PROTOCOLS = {'openai': openai, 'anthropic': anthropic, 'deepseek': deepseek, 'rest': rest}


class Provider:
    "A provider on 127.0.0.1."
    def __init__(
        self,
        protocol: str = 'openai',          # One of `PROTOCOLS`
        key: str|None = None,              # The API key that it insists on
        delay_s: float = 0.,               # How long it takes for each answer
        faults: tuple = (),                # What goes wrong with the first POSTs; None is nothing
        always: Fault|None = None,         # What goes wrong with all others
        limiter: Limiter|None = None,      # Rate limits
        **options,                         # Of the protocol
    ):
        self._speak = PROTOCOLS[protocol]
        self.key, self.delay_s, self.always, self.limiter = key, delay_s, always, limiter
        self.options, self.memory, self._faults = self._speak.options(options), Memory(), deque(faults)
        self.requests, self.gone, self._connections, self._at = [], [], set(), []
        listener = socket.create_server(('127.0.0.1', 0), backlog=2048)
        self.port = listener.getsockname()[1]
        self.root = f'http://127.0.0.1:{self.port}'
        self.url, self._ready = self.root + self._speak.ROOT, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(listener)), daemon=True)
        self._thread.start()
        self._ready.wait()

    async def _main(self, listener):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(lambda: Connection(self, self._loop), sock=listener, backlog=2048)
        self._ready.set()
        await self._stop.wait()
        server.close()
        for connection in list(self._connections): connection.transport_now.abort()
        await asyncio.sleep(0)

    def close(self):
        "Hang up on everybody and stop."
        if self._thread.is_alive(): self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    def __enter__(self): return self
    def __exit__(self, *_): self.close()

    @property
    def open(self) -> int: "TCP connections open now."; return len(self._connections)

    @property
    def batches(self) -> dict: "All batches by id, deleted ones too."; return dict(self.memory.batches)

    def until(self, test, seconds: float = 5.) -> bool:
        "Wait for `test(self)`; gives whether it came true."
        end = time.monotonic() + seconds
        while not (done := test(self)) and time.monotonic() < end: time.sleep(.01)
        return bool(done)

    def add(self, *faults: Fault|None): "Queue what goes wrong next."; self._faults.extend(faults)

    def at(self, where: str, *faults: Fault|None):
        "Queue what goes wrong with the next requests that a pattern finds, e.g. 'GET .*/content'."
        self._at.extend((where, fault) for fault in faults)

    def _arrived(self, seen: Seen) -> Fault|None:
        "Note a request; gives what goes wrong with it."
        self.requests.append(seen)
        here = next((pair for pair in self._at if re.search(pair[0], f'{seen.method} {seen.path}')), None)
        if here: self._at.remove(here)
        if here: return here[1]
        if seen.method != 'POST': return None
        return self._faults.popleft() if self._faults else self.always

    def _respond(self, seen: Seen, fault: Fault|None) -> tuple[int, dict, bytes]:
        "Status, headers and body."
        own = self._speak.own_headers(len(self.requests))
        def error(status): return self._speak.failure(status, None, self.options)
        wrong = page(fault, error) if fault else None
        if wrong: return wrong[0], own | wrong[1], wrong[2]
        path, _, query = seen.path.partition('?')
        call = Call(seen.method, path, seen.headers, seen.body, self.options, self.memory,
                    bool(fault and fault.kind == 'empty_answer'), len(self.requests), dict(parse_qsl(query)), seen.raw,
                    self.root)
        try: reply = self._answer(call)
        except Refusal as e: reply = Reply(e.payload, e.status, e.headers)
        except Exception as e:
            reply = Reply(self._speak.failure(500, f'a bug of this server: {e!r}', self.options), 500)
        kind, body = encoded(reply.payload)
        return reply.status, {'content-type': kind, **own, **reply.headers, **lowered(fault and fault.headers)}, body

    def _answer(self, call: Call) -> Reply:
        "Key, protocol, limits, in this order."
        self._check_key(call)
        try: reply = self._speak.answer(call)
        except Refusal as e: reply = Reply(e.payload, e.status)
        limited, told = self.limiter is not None and call.method == 'POST', {}
        if limited: told = self._limit(reply.reserve if self.limiter.charge == 'max_tokens' else reply.tokens)
        if reply.then: reply.then()
        return reply._replace(headers={**reply.headers, **told})

    def _check_key(self, call: Call):
        sent = self._speak.key_sent(call.headers)
        if self.key is None and (sent or not getattr(self.options, 'needs_key', False)): return
        if self.key is not None and sent == self.key: return
        message = f'Incorrect API key provided: {sent}.' if sent else 'You did not provide an API key.'
        raise Refusal(401, self._speak.failure(401, message, self.options))

    def _limit(self, tokens: int) -> dict:
        "Headers that tell the limits; a refusal where they are used up."
        verdict = self.limiter.take(tokens)
        told = getattr(self.limiter, f'{self._speak.LIMITS}_headers')()
        if verdict.ok: return told
        message = 'Request too large for the limit of tokens per min.' if verdict.too_large else (
            f'Rate limit reached on {verdict.what} per min. Please try again in {verdict.wait:.3f}s.')
        payload = self._speak.failure(429, message, self.options, kind=verdict.what)
        raise Refusal(429, payload, told | self.limiter.retry_headers(verdict))
