"Anthropic's message batches."
import re
from collections.abc import Callable
from datetime import datetime, timezone

from .anthropic_forms import check_headers, failure, refuse
from .batches import DAY, Batch, Outcome, lines, mixed, page
from .common import Call, Refusal, Reply, identity

PATH = '/v1/messages/batches'
NAME = '^[a-zA-Z0-9_-]{1,64}$'


def knows(path: str) -> bool: return path == PATH or path.startswith(f'{PATH}/')


def clock(seconds: float|None) -> str|None:
    "A time as Anthropic writes it, or nothing."
    return seconds and datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace('+00:00', 'Z')


def told(batch: Batch) -> dict:
    "What the API says of a batch."
    ended, at = batch.status == 'ended', batch.at
    counts = batch.counts if ended else {'processing': len(batch.requests)}
    kinds = ('processing', 'succeeded', 'errored', 'canceled', 'expired')
    return {'id': batch.id, 'type': 'message_batch', 'processing_status': batch.status,
            'request_counts': {kind: counts.get(kind, 0) for kind in kinds},
            'created_at': clock(at['created']), 'expires_at': clock(at['created'] + DAY),
            'ended_at': clock(at.get('ended')), 'cancel_initiated_at': clock(at.get('canceling')), 'archived_at': None,
            'results_url': f'{batch.call.root}{PATH}/{batch.id}/results' if ended else None}


def check(call: Call) -> list:
    "The requests of a batch, as pairs of a custom_id and parameters."
    body, most = call.body, call.options
    if len(call.raw) > most.batch_max_bytes: refuse('Request exceeds the maximum size', 413)
    if not isinstance(body, dict): refuse('The request body is not valid JSON')
    for name in body:
        if name != 'requests': refuse(f'{name}: Extra inputs are not permitted')
    rows, pairs = body.get('requests'), {}
    if not isinstance(rows, list): refuse('requests: Input should be a valid list')
    if not rows: refuse('requests: List should have at least 1 item')
    if len(rows) > most.batch_max_requests:
        refuse(f'requests: List should have at most {most.batch_max_requests} items', 413)
    for n, row in enumerate(rows):
        if not isinstance(row, dict): refuse(f'requests.{n}: Input should be a valid dictionary')
        for name in {'custom_id', 'params'} - set(row): refuse(f'requests.{n}.{name}: Field required')
        for name in set(row) - {'custom_id', 'params'}: refuse(f'requests.{n}.{name}: Extra inputs are not permitted')
        custom_id, params = row['custom_id'], row['params']
        if not isinstance(custom_id, str) or not re.fullmatch(NAME[1:-1], custom_id):
            refuse(f"requests.{n}.custom_id: String should match pattern '{NAME}'")
        if not isinstance(params, dict): refuse(f'requests.{n}.params: Input should be a valid dictionary')
        if custom_id in pairs: refuse(f"requests.{n}.custom_id: '{custom_id}' is not unique within the batch")
        pairs[custom_id] = params
    return list(pairs.items())


def create(call: Call) -> Reply:
    "POST /v1/messages/batches"
    requests = check(call)
    made = Batch(identity('msgbatch_', call.root, call.number), call, '/v1/messages', requests, 'in_progress')
    return Reply(told(made), then=lambda: call.memory.batches.update({made.id: made}))


def poll(batch: Batch, handle: Callable):
    "GET /v1/messages/batches/{id}: time goes by."
    def run(line, breaks):
        if breaks: raise Refusal(500, failure(500))
        if line.body.get('stream'): refuse('stream: Streaming is not supported in a batch')
        return handle(line)
    batch.polls += 1
    if batch.status == 'ended': return
    if batch.status == 'canceling': batch.cancel()
    if batch.status == 'canceling' or batch.advance(run): batch.mark('ended')


def result(outcome: Outcome) -> dict:
    "How a line ended, as Anthropic tells it."
    payload = {'succeeded': 'message', 'errored': 'error'}.get(outcome.kind)
    return {'type': outcome.kind} | ({payload: outcome.payload} if payload else {})


def results(batch: Batch) -> Reply:
    "GET /v1/messages/batches/{id}/results"
    if batch.status != 'ended': refuse(f'Message batch {batch.id} has no results yet', 404)
    rows = [{'custom_id': i, 'result': result(o)} for (i, _), o in zip(batch.requests, batch.outcomes)]
    return Reply(lines(mixed(rows, [row['custom_id'] for row in rows])))


def cancel(batch: Batch):
    "POST /v1/messages/batches/{id}/cancel"
    if batch.status == 'ended': refuse(f'Message batch {batch.id} has ended and cannot be canceled')
    batch.mark('canceling')


def delete(batch: Batch) -> Reply:
    "DELETE /v1/messages/batches/{id}"
    if batch.status != 'ended': refuse(f'Message batch {batch.id} must be canceled before it can be deleted')
    batch.deleted = True
    return Reply({'id': batch.id, 'type': 'message_batch_deleted'})


def listed(call: Call) -> Reply:
    "GET /v1/messages/batches"
    rows = [told(b) for b in reversed(call.memory.batches.values()) if not b.deleted]
    try: rows, more = page(rows, call.query, 20, 1000, 'after_id', 'before_id')
    except ValueError as e: refuse(str(e))
    first, last = (rows[0]['id'], rows[-1]['id']) if rows else (None, None)
    return Reply({'data': rows, 'has_more': more, 'first_id': first, 'last_id': last})


def answer(call: Call, handle: Callable) -> Reply:
    "Requests for batches; `handle` answers a line as if it were posted."
    check_headers(call)
    own, *rest = call.path.split('/')[4:] or [None]
    at = (call.method, *rest)
    if own is None and at == ('POST',): return create(call)
    if own is None and at == ('GET',): return listed(call)
    known = at in (('GET',), ('DELETE',), ('POST', 'cancel'), ('GET', 'results'))
    found = call.memory.batches.get(own) if known else None
    if not found or found.deleted: refuse('Not found', 404)
    if at == ('DELETE',): return delete(found)
    if at == ('GET', 'results'): return results(found)
    if at == ('GET',): poll(found, handle)
    else: cancel(found)
    return Reply(told(found))
