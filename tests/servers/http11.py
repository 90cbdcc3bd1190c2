"Reading requests and writing answers as HTTP/1.1."
import asyncio
import json
import time
from http import HTTPStatus

from .common import Document, Events

REASONS = {s.value: s.phrase for s in HTTPStatus}


async def read_body(reader, headers: dict) -> bytes:
    "The body of a request, in chunks or of a length told ahead."
    if 'chunked' not in headers.get('transfer-encoding', '').lower():
        return await reader.readexactly(int(headers.get('content-length') or 0))
    parts = []
    while size := int((await reader.readline()).split(b';')[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readline()
    while (await reader.readline()).strip(): pass
    return b''.join(parts)


async def read_request(reader, writer) -> tuple|None:
    "Method, target, headers, body and whether to keep the connection; None at its end."
    try: head = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1')
    except (asyncio.IncompleteReadError, ConnectionError): return None
    first, *lines = head.strip().split('\r\n')
    method, target, version = first.split(' ', 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(':') for line in lines)}
    if headers.get('expect', '').lower() == '100-continue': writer.write(b'HTTP/1.1 100 Continue\r\n\r\n')
    body = await read_body(reader, headers)
    return method, target, headers, body, version == 'HTTP/1.1' and headers.get('connection', '').lower() != 'close'


def parsed(data: bytes):
    "What JSON says, or nothing."
    try: return json.loads(data)
    except ValueError: return None


def encoded(payload) -> tuple[str, bytes]:
    "The content type and bytes of an answer."
    if isinstance(payload, Document): return payload.kind, payload.data
    if not isinstance(payload, Events): return 'application/json', json.dumps(payload).encode()
    def line(name, data):
        return (f'event: {name}\n' if name else '') + f'data: {data if isinstance(data, str) else json.dumps(data)}\n\n'
    return 'text/event-stream; charset=utf-8', ''.join(line(*e) for e in payload).encode()


def head_of(status: int, headers: dict, length: int) -> bytes:
    "The head of an answer."
    told = {'date': time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime()), **headers}
    if headers.get('content-type', '').startswith('text/event-stream'): told['transfer-encoding'] = 'chunked'
    else: told['content-length'] = length
    return f'HTTP/1.1 {status} {REASONS.get(status, "Unknown")}\r\n'.encode() + b''.join(
        f'{k}: {v}\r\n'.encode('latin-1') for k, v in told.items()) + b'\r\n'
