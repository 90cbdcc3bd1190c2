"""A fast and unreliable server of chat completions, in a process of its own.

`python lean.py PORT ACCOUNT SEED [silent]`: a line of JSON goes into ACCOUNT for each answer that was written whole,
and SIGTERM ends it. Where it is silent it tells nothing of its limits."""
import asyncio
import json
import random
import re
import signal
import sys

LENGTH = re.compile(rb'content-length: *(\d+)', re.I)
CHANCES = [('429', .05), ('500', .02), ('cut', .01), ('hang', .005)]
LIMITS = b''.join(b'x-ratelimit-%s-requests: %s\r\n' % pair for pair in (
    (b'limit', b'1000000'), (b'remaining', b'999000'), (b'reset', b'60ms')))  # far away, whatever the 429s say
HEAD = b'HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n'


class Server:
    "What all connections share."
    def __init__(self, account, seed: int, told: bytes):
        self.told = told
        self.account, self.lots, self.open, self.ends = account, random.Random(seed), set(), False
        self.seed, self.number, self.counts = seed, 0, dict.fromkeys(['requests', *(k for k, _ in CHANCES)], 0)

    def draw(self) -> str|None:
        "What goes wrong with the next request."
        self.number += 1
        self.counts['requests'] += 1
        x = self.lots.random()
        for kind, chance in CHANCES:
            if (x := x - chance) < 0:
                self.counts[kind] += 1
                return kind
        return None


class Connection(asyncio.Protocol):
    "One TCP connection."
    def __init__(self, server: Server): self.server, self.data, self.transport = server, b'', None
    def connection_made(self, transport): self.transport = transport; self.server.open.add(transport)
    def connection_lost(self, exc): self.server.open.discard(self.transport)

    def data_received(self, data):
        self.data += data
        end = self.data.find(b'\r\n\r\n')
        if end < 0: return
        size = end + 4 + int(LENGTH.search(self.data[:end])[1])
        if len(self.data) < size or self.server.ends: return
        body, self.data = json.loads(self.data[end + 4:size]), self.data[size:]
        kind = self.server.draw()
        if kind != 'hang':
            asyncio.get_running_loop().call_later(self.server.lots.uniform(.02, .05), self.answer, body, kind,
                                                  f'{self.server.seed}.{self.server.number}')

    def answer(self, body, kind, number):
        "Write it whole, and note that; or not."
        if self.server.ends or self.transport.is_closing(): return
        if kind in ('429', '500'):
            said = b'{"error": {"message": "not now", "type": "server_error"}}'
            more = self.server.told + b'retry-after: 0\r\n'*(kind == '429')
            return self.transport.write(HEAD % (int(kind), more, len(said)) + said)
        question = body['messages'][-1]['content']
        into, out = 10 + len(question) % 40, 5 + int(question.split()[1]) % 30
        said = json.dumps({
            'id': number, 'object': 'chat.completion', 'created': 1, 'model': body['model'],
            'choices': [{'index': 0, 'message': {'role': 'assistant', 'content': f'{number}: {question}'},
                         'finish_reason': 'stop'}],
            'usage': {'prompt_tokens': into, 'completion_tokens': out, 'total_tokens': into + out}}).encode()
        whole = HEAD % (200, self.server.told, len(said)) + said
        if kind == 'cut':
            self.transport.write(whole[:-len(said)//2])
            return self.transport.close()
        self.transport.write(whole)
        if self.transport.get_write_buffer_size() == 0:
            self.server.account.write(json.dumps([question, number, into, out]) + '\n')


async def main(port: int, account: str, seed: int, told: bytes):
    with open(account, 'a') as f:
        server, loop, stop = Server(f, seed, told), asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        listening = await loop.create_server(lambda: Connection(server), '127.0.0.1', port, backlog=2048)
        print('ready', flush=True)
        await stop.wait()
        server.ends = True
        listening.close()
        await asyncio.sleep(.3)  # what was written is read
        for transport in list(server.open): transport.abort()
        f.flush()
    print(json.dumps(server.counts), flush=True)


if __name__ == '__main__':
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), LIMITS if sys.argv[4:] == [] else b''))
