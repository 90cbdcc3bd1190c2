"OpenAI's files."
import re
import time
from dataclasses import dataclass

from . import batches
from .common import Call, Document, Reply, identity
from .forms import refuse

PURPOSES = ('assistants', 'batch', 'fine-tune', 'vision', 'user_data', 'evals')
MONTH = 30*batches.DAY


@dataclass
class File:
    "A file."
    id: str
    data: bytes
    filename: str
    purpose: str
    created: int
    expires: int|None = None

    def told(self) -> dict:
        "What the API says of it."
        return {'id': self.id, 'object': 'file', 'bytes': len(self.data), 'created_at': self.created,
                'expires_at': self.expires, 'filename': self.filename, 'purpose': self.purpose, 'status': 'processed',
                'status_details': None}


def quoted(head: str, name: str) -> str|None:
    "A parameter of a header."
    found = re.search(rf'[;\s]{name}="((?:[^"\\]|\\.)*)"', head)
    return found and found[1]


def parts_of(call: Call) -> dict:
    "The fields of a form by name: pairs of a file's name or None and bytes."
    kind = call.headers.get('content-type', '')
    found = re.search(r'boundary="?([^";]+)"?', kind)
    if not kind.startswith('multipart/form-data') or not found:
        refuse(400, 'The request must be multipart/form-data with a boundary.', call.options.flavour)
    parts = {}
    for part in (b'\r\n' + call.raw).split(b'\r\n--' + found[1].encode())[1:-1]:
        head, _, data = part.partition(b'\r\n\r\n')
        head = head.decode()
        parts[quoted(head, 'name')] = quoted(head, 'filename'), data
    return parts


def upload(call: Call) -> Reply:
    "POST /v1/files"
    parts, flavour = parts_of(call), call.options.flavour
    for name in ('file', 'purpose'):
        if name not in parts: refuse(400, f"'{name}' is a required property", flavour, param=name)
    (filename, data), purpose = parts['file'], parts['purpose'][1].decode()
    if purpose not in PURPOSES: refuse(400, f"'{purpose}' is not one of {list(PURPOSES)}", flavour, param='purpose')
    if filename is None: refuse(400, "'file' must be a file with a name.", flavour, param='file')
    if purpose == 'batch' and not filename.endswith('.jsonl'):
        refuse(400, 'Invalid file format for Batch API. Must be .jsonl', flavour)
    now, lasts = int(time.time()), MONTH if purpose == 'batch' else None
    if 'expires_after[seconds]' in parts: lasts = int(parts['expires_after[seconds]'][1])
    made = File(identity('file-', call.root, call.number), data, filename, purpose, now, lasts and now + lasts)
    return Reply(made.told(), then=lambda: call.memory.files.update({made.id: made}))


def listed(call: Call) -> Reply:
    "GET /v1/files"
    rows = [f.told() for f in call.memory.files.values() if call.query.get('purpose') in (None, f.purpose)]
    if call.query.get('order', 'desc') == 'desc': rows.reverse()
    return pages(rows, call, 10_000, 10_000)


def pages(rows: list, call: Call, default: int, most: int) -> Reply:
    "A page of a list."
    try: rows, more = batches.page(rows, call.query, default, most)
    except ValueError as e: refuse(400, str(e), call.options.flavour, code='invalid_value')
    first, last = (rows[0]['id'], rows[-1]['id']) if rows else (None, None)
    return Reply({'object': 'list', 'data': rows, 'first_id': first, 'last_id': last, 'has_more': more})


def answer(call: Call) -> Reply:
    "Requests for /v1/files and what is below."
    own, *rest = call.path.split('/')[3:] or [None]
    at = (call.method, *rest)
    if own is None and at in (('POST',), ('GET',)): return upload(call) if at == ('POST',) else listed(call)
    known = at in (('GET',), ('DELETE',), ('GET', 'content'))
    if own is None or not known: refuse(404, f'Invalid URL ({call.method} {call.path})', call.options.flavour)
    found = call.memory.files.get(own)
    if not found: refuse(404, f'No such File object: {own}', call.options.flavour, param='id')
    if at == ('GET',): return Reply(found.told())
    if at == ('GET', 'content'): return Reply(Document('application/octet-stream', found.data))
    del call.memory.files[own]
    return Reply({'id': own, 'object': 'file', 'deleted': True})
