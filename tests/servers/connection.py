"One TCP connection: requests in, answers out, and what goes wrong on the way."
import asyncio
import socket
import struct
import time
from dataclasses import dataclass

from .faults import Fault
from .http11 import head_of, parsed, read_request


@dataclass
class Seen:
    "A request that arrived."
    path: str
    headers: dict          # By lower-case names
    body: dict|list|None   # What its JSON says
    at: float              # time.monotonic()
    status: int|None = None # Of the answer; None while there is none
    method: str = 'POST'
    raw: bytes = b''       # What came, JSON or not


class Connection(asyncio.StreamReaderProtocol):
    "One TCP connection."
    def __init__(self, provider, loop):
        super().__init__(asyncio.StreamReader(limit=2**20, loop=loop), self.serve, loop=loop)
        self.provider, self.left, self.transport_now = provider, asyncio.Event(), None

    def connection_made(self, transport):
        self.transport_now = transport
        self.provider._connections.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc):
        self.provider._connections.discard(self)
        self.left.set()
        super().connection_lost(exc)

    def eof_received(self): self.left.set(); return super().eof_received()

    async def serve(self, reader, writer):
        "Requests of this connection, one after the other."
        try:
            while request := await read_request(reader, writer):
                if not await self.answer(request, writer): break
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError): pass
        finally: writer.close()

    async def gone_within(self, seconds: float) -> bool:
        "Wait, unless the client leaves."
        if seconds <= 0: return self.left.is_set()
        try: await asyncio.wait_for(self.left.wait(), seconds)
        except asyncio.TimeoutError: return False
        return True

    async def answer(self, request: tuple, writer) -> bool:
        "Answer one request; gives whether the connection goes on."
        method, target, headers, data, keep = request
        seen = Seen(target, headers, parsed(data) if data else None, time.monotonic(), None, method, data)
        fault = self.provider._arrived(seen)
        if fault and fault.kind == 'reset': return self.reset()
        if fault and fault.kind == 'hang':
            await self.left.wait()
            return self.lost(seen)
        status, told, body = self.provider._respond(seen, fault)
        if await self.gone_within(self.provider.delay_s): return self.lost(seen)
        if not keep: told['connection'] = 'close'
        seen.status = status
        try: sent = await self.send(writer, status, told, body, fault)
        except ConnectionError: sent = False
        if not sent: return self.lost(seen)
        return keep and not (fault and fault.kind == 'cut')

    def lost(self, seen: Seen) -> bool:
        "The client left before it was answered."
        seen.status = None
        self.provider.gone.append(seen)
        return False

    def reset(self) -> bool:
        "Hang up the hard way."
        raw = self.transport_now.get_extra_info('socket')
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.transport_now.abort()
        return False

    async def send(self, writer, status: int, headers: dict, body: bytes, fault: Fault|None) -> bool:
        "Send an answer, at once or in drops; gives whether the client was there to the end."
        kind = fault.kind if fault else None
        if kind == 'cut_json': body = body[:len(body)//2]
        chunked = headers.get('content-type', '').startswith('text/event-stream')
        writer.write(head_of(status, headers, len(body)))
        if kind == 'drip': await writer.drain()
        if kind == 'cut': body = body[:len(body)//2]
        drops = [body]
        if kind == 'drip':
            size = max(1, -(-len(body)//200), 8)
            drops = [body[i:i + size] for i in range(0, len(body), size)]
        for drop in drops:
            writer.write(b'%x\r\n%s\r\n' % (len(drop), drop) if chunked and drop else drop)
            await writer.drain()
            if kind == 'drip' and await self.gone_within(fault.seconds/len(drops)): return False
        if chunked and kind != 'cut': writer.write(b'0\r\n\r\n')
        await writer.drain()
        return True
