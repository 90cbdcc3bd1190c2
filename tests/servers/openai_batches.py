"OpenAI's batches: a file of requests in, a file of answers and one of errors out."
import json
from collections.abc import Callable

from . import uploads
from .batches import DAY, Batch, Outcome, jsonl, mixed
from .common import Call, Reply, identity
from .forms import check_known, check_present, refuse

ENDPOINTS = ('/v1/chat/completions', '/v1/responses', '/v1/completions')
ENDED = ('completed', 'failed', 'expired', 'cancelled')
TIMES = ('in_progress', 'finalizing', *ENDED, 'cancelling')
PARAMS = {'input_file_id', 'endpoint', 'completion_window', 'metadata', 'output_expires_after'}
NEVER = {'expired': ('batch_expired', 'This request could not be executed before the completion window expired.'),
         'canceled': ('batch_cancelled', 'This request was not executed before the batch was cancelled.')}


def knows(path: str) -> bool: return path.split('/')[1:3] in (['v1', 'files'], ['v1', 'batches'])


def strict(line: bytes):
    "What a line of JSON says, or nothing."
    def never(name): raise ValueError(name)
    try: return json.loads(line, parse_constant=never)
    except ValueError: return None


def faulty(row, endpoint: str, ids: set, model: str|None) -> tuple|None:
    "Code, message and parameter of what is wrong with a line, if anything is."
    if not isinstance(row, dict): return 'invalid_json_line', 'This line is not parseable as valid JSON.', None
    for name, kind in (('custom_id', str), ('method', str), ('url', str), ('body', dict)):
        if row.get(name) in (None, ''):
            return 'missing_required_parameter', f"Missing required parameter: '{name}'.", name
        if not isinstance(row[name], kind): return 'invalid_type', f"Invalid type for '{name}'.", name
    custom_id, other = row['custom_id'], row['body'].get('model')
    if custom_id in ids:
        return 'duplicate_custom_id', f"The custom_id '{custom_id}' was used by an earlier line.", 'custom_id'
    if row['method'] != 'POST': return 'invalid_method', "The method of a request must be 'POST'.", 'method'
    if row['url'] != endpoint: return 'url_mismatch', f"The url of a request must be '{endpoint}'.", 'url'
    if ids and other != model:
        return 'model_mismatch', f"The model '{other}' is not that of the first request, '{model}'.", 'body.model'
    return None


def read(data: bytes, endpoint: str, options) -> tuple[list, list]:
    "The requests of a file, and what is wrong with it."
    rows = data.removesuffix(b'\n').split(b'\n') if data.strip() else []
    def wrong(code, message, param=None, line=None):
        return {'code': code, 'message': message, 'param': param, 'line': line}
    if endpoint not in ENDPOINTS: return [], [wrong('invalid_endpoint', f'No batches for {endpoint}.', 'endpoint')]
    if not rows: return [], [wrong('empty_file', 'The input file holds no requests.')]
    if len(data) > options.batch_max_bytes:
        return [], [wrong('file_too_large', f'The file is larger than {options.batch_max_bytes} bytes.')]
    if len(rows) > options.batch_max_requests:
        return [], [wrong('too_many_tasks', f'The file holds more than {options.batch_max_requests} requests.')]
    found, errors = {}, []
    for n, line in enumerate(rows, 1):
        row, model = strict(line), next(iter(found.values()), {}).get('model')
        said = faulty(row, endpoint, found, model)
        if said: errors.append(wrong(*said, n))
        else: found[row['custom_id']] = row['body']
    return list(found.items()), errors


def usage_of(batch: Batch) -> dict:
    "What all answers together used."
    used = [o.payload.get('usage') or {} for o in batch.outcomes if o.kind == 'succeeded']
    def total(*names): return sum(next((u[n] for n in names if n in u), 0) for u in used)
    def details(part, *names): return sum((u.get(n) or {}).get(part, 0) for u in used for n in names)
    prompt, said = total('input_tokens', 'prompt_tokens'), total('output_tokens', 'completion_tokens')
    cached = details('cached_tokens', 'input_tokens_details', 'prompt_tokens_details')
    thought = details('reasoning_tokens', 'output_tokens_details', 'completion_tokens_details')
    return {'input_tokens': prompt, 'input_tokens_details': {'cached_tokens': cached}, 'output_tokens': said,
            'output_tokens_details': {'reasoning_tokens': thought}, 'total_tokens': prompt + said}


def told(batch: Batch) -> dict:
    "What the API says of a batch."
    asked, counts, valid = batch.call.body, batch.counts, batch.status not in ('validating', 'failed')
    times = {f'{name}_at': int(batch.at[name]) if name in batch.at else None for name in TIMES}
    errors = {'object': 'list', 'data': batch.errors} if batch.status == 'failed' else None
    return {'id': batch.id, 'object': 'batch', 'endpoint': batch.endpoint, 'errors': errors,
            'model': batch.requests[0][1].get('model') if valid and batch.requests else None,
            'input_file_id': asked['input_file_id'], 'completion_window': '24h', 'status': batch.status,
            'output_file_id': batch.facts.get('output'), 'error_file_id': batch.facts.get('error'),
            'created_at': int(batch.at['created']), 'expires_at': int(batch.at['created']) + DAY, **times,
            'request_counts': {'total': len(batch.requests) if valid else 0, 'completed': counts['succeeded'],
                               'failed': counts['errored']},
            'usage': usage_of(batch), 'metadata': asked.get('metadata')}


def check(call: Call):
    "What OpenAI insists on before it takes a batch."
    body, flavour = call.body, call.options.flavour
    if not isinstance(body, dict): refuse(400, 'We could not parse the JSON body of your request.', flavour)
    check_known(body, PARAMS)
    check_present(body, 'input_file_id', 'endpoint', 'completion_window')
    if body['completion_window'] != '24h':
        refuse(400, "Invalid 'completion_window': only '24h' is supported.", flavour, param='completion_window',
               code='invalid_value')
    metadata = body.get('metadata') or {}
    fits = isinstance(metadata, dict) and len(metadata) <= 16 and all(
        len(k) <= 64 and isinstance(v, str) and len(v) <= 512 for k, v in metadata.items())
    if not fits: refuse(400, "Invalid 'metadata'.", flavour, param='metadata', code='invalid_type')
    found = call.memory.files.get(body['input_file_id'])
    if not found:
        refuse(400, f'No such File object: {body["input_file_id"]}', flavour, param='input_file_id')
    if found.purpose != 'batch':
        refuse(400, f"The file has the purpose '{found.purpose}', not 'batch'.", flavour, param='input_file_id')


def create(call: Call) -> Reply:
    "POST /v1/batches"
    check(call)
    endpoint = call.body['endpoint']
    requests, errors = read(call.memory.files[call.body['input_file_id']].data, endpoint, call.options)
    made = Batch(identity('batch_', call.root, call.number), call, endpoint, requests, 'validating', errors=errors)
    return Reply(told(made), then=lambda: call.memory.batches.update({made.id: made}))


def row(batch: Batch, n: int, outcome: Outcome) -> dict:
    "A line of a file of answers or errors."
    own = identity('batch_req_', batch.id, n)
    response = {'status_code': outcome.status, 'request_id': identity('req_', own), 'body': outcome.payload}
    error = dict(zip(('code', 'message'), NEVER[outcome.kind])) if outcome.kind in NEVER else None
    return {'id': own, 'custom_id': batch.requests[n][0], 'response': None if error else response, 'error': error}


def finish(batch: Batch, status: str):
    "Write the files, those that have a line, and end."
    files = {'output': [], 'error': []}
    for n, o in enumerate(batch.outcomes):
        files['output' if o.kind == 'succeeded' else 'error'].append(row(batch, n, o))
    batch.mark(status)
    now = int(batch.at[status])
    lasts = (batch.call.body.get('output_expires_after') or {}).get('seconds', uploads.MONTH)
    for name, rows in files.items():
        if not rows: continue
        own = batch.facts[name] = identity('file-', batch.id, name)
        data, filename = jsonl(mixed(rows, [r['custom_id'] for r in rows])), f'{batch.id}_{name}.jsonl'
        batch.call.memory.files[own] = uploads.File(own, data, filename, 'batch_output', now, now + lasts)


def poll(batch: Batch, handle: Callable):
    "GET /v1/batches/{id}: time goes by."
    def run(line, breaks):
        if breaks: refuse(500, 'The server had an error while processing your request.', line.options.flavour)
        if line.body.get('stream'):
            refuse(400, 'Streaming is not supported in a batch.', line.options.flavour, param='stream')
        return handle(line)
    batch.polls += 1
    if batch.status in ENDED: return
    if batch.status == 'cancelling':
        batch.cancel()
        return finish(batch, 'cancelled')
    if batch.errors: return batch.mark('failed')
    over = batch.advance(run)
    batch.mark('in_progress')
    if len(batch.outcomes) == len(batch.requests): batch.mark('finalizing')
    if over: finish(batch, 'expired' if batch.counts['expired'] else 'completed')


def cancel(batch: Batch, flavour: str):
    "POST /v1/batches/{id}/cancel"
    if batch.status in ENDED:
        refuse(409, f"Cannot cancel a batch with status '{batch.status}'.", flavour, kind='invalid_request_error')
    batch.mark('cancelling')


def answer(call: Call, handle: Callable) -> Reply:
    "Requests for /v1/files and /v1/batches; `handle` answers a line as if it were posted."
    what, *rest = call.path.split('/')[2:]
    if what == 'files': return uploads.answer(call)
    flavour, at = call.options.flavour, (call.method, *rest[1:])
    if not rest and at == ('POST',): return create(call)
    if not rest and at == ('GET',):
        return uploads.pages([told(b) for b in reversed(call.memory.batches.values())], call, 20, 100)
    if not rest or at not in (('GET',), ('POST', 'cancel')):
        refuse(404, f'Invalid URL ({call.method} {call.path})', flavour)
    found = call.memory.batches.get(rest[0])
    if not found: refuse(404, f"No batch found with id '{rest[0]}'.", flavour)
    if at == ('GET',): poll(found, handle)
    else: cancel(found, flavour)
    return Reply(told(found))
