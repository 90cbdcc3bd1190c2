"A tuning service in a process of its own: what clients see of it, and what survives which death."
import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import openai
import pytest
import small
from conftest import SCRIPT
from llm_distill.demo import demo_prompts
from llm_distill.models import find_model, load_model
from llm_distill.tables import write_jsonl

KEY = 'of-the-test'
RUN = '''
import json, sys
from llm_distill.tuning.process import run_tunings
run_tunings(on_ready=lambda url: print(json.dumps({'url': url}), flush=True),
            on_key=lambda key: print(json.dumps({'key': key}), flush=True), **json.loads(sys.argv[1]))
'''


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Models that may be trained, and files to learn from."
    folder, tokenizer = tmp_path_factory.mktemp('root'), small.byte_tokenizer()
    for name, size in (('tiny', {}), ('larger', dict(hidden_size=512, intermediate_size=1024))):
        small.llama(tokenizer, **size).save_pretrained(folder/'models'/name)
        tokenizer.save_pretrained(folder/'models'/name)
    rows = [{'messages': [{'role': 'user', 'content': f'Ask question {i} on {p["topic"]}.'},
                          {'role': 'assistant', 'content': p['prompt']}]} for i, p in enumerate(demo_prompts())]
    write_jsonl(folder/'questions.jsonl', rows[:120])
    return folder


class Running:
    "A service that can be killed and started again in the same folder."
    def __init__(self, root, home, **options):
        self.options = {'home': str(home), 'port': 0, 'api_keys': [KEY], 'models': str(root/'models')} | options
        self.limit, self.root, self.home = None, root, home

    def start(self):
        def limited():
            if self.limit: resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        more = {'preexec_fn': limited} if self.limit else {}
        self.process = subprocess.Popen([sys.executable, '-c', RUN, json.dumps(self.options)], stdout=subprocess.PIPE,
                                        text=True, env=os.environ | {'OMP_NUM_THREADS': '1'}, **more)
        said = json.loads(self.process.stdout.readline())
        self.key = said.get('key', KEY)
        self.url = (said if 'url' in said else json.loads(self.process.stdout.readline()))['url']
        self.client = openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0)
        return self

    def kill(self): self.process.kill(); self.process.wait()

    def close(self):
        for state in ('pending', 'running'):
            mine = f'/tunings?limit=100&status={state}'
            while self.process.poll() is None and (left := self.ask('GET', mine)['data']):
                for job in left: self.ask('POST', f'/tunings/{job["id"]}/cancel', any=True)
        while self.process.poll() is None and self.ask('GET', '/../health')['active_jobs']: time.sleep(.1)
        self.process.terminate()
        self.process.wait(20)

    def ask(self, method, path, status=200, key=None, any=False, **body):
        "A request by curl's means: what comes back, as JSON."
        asked = urllib.request.Request((self.url + path).replace('/v1/..', ''), method=method, headers={
            'Authorization': f'Bearer {key or self.key}', 'Content-Type': 'application/json'},
            data=json.dumps(body).encode() if body else None)
        try:
            with urllib.request.urlopen(asked, timeout=30) as reply: got, said = reply.status, reply.read()
        except urllib.error.HTTPError as e: got, said = e.code, e.read()
        assert any or got == status, (got, said)
        return json.loads(said)

    def upload(self): return self.client.files.create(file=self.root/'questions.jsonl', purpose='fine-tune').id

    def create(self, file, model='tiny', resume=False, **hyperparameters):
        numbers = {'precision': 'float32', 'learning_rate': .01} | hyperparameters
        return self.ask('POST', '/tunings', 201, model=model, training_file=file, resume=resume,
                        hyperparameters=numbers)['id']

    def job(self, id): return self.ask('GET', f'/tunings/{id}')

    def until(self, id, done, seconds=60):
        "Wait until something is true of a job."
        end = time.time() + seconds
        while not done(job := self.job(id)):
            assert time.time() < end and (job['status'] in ('pending', 'running')), job
            time.sleep(.05)
        return job

    def ended(self, id, status='succeeded', seconds=90):
        end = time.time() + seconds
        while (job := self.job(id))['status'] in ('pending', 'running'):
            assert time.time() < end, job
            time.sleep(.1)
        assert job['status'] == status, job
        return job

    def events(self, id):
        found, after = [], 0
        while page := self.ask('GET', f'/tunings/{id}/events?after={after}&limit=1000')['data']:
            found, after = found + page, page[-1]['id']
        assert [e['id'] for e in found] == list(range(1, len(found) + 1))
        return found

    def worker(self, id): return json.loads((self.home/'jobs'/id/'worker.json').read_text())['pid']


@contextlib.contextmanager
def running(root, home, limit=None, **options):
    service = Running(root, home, **options)
    service.limit = limit
    service.start()
    try: yield service
    finally: service.close()


@pytest.fixture(scope='module')
def service(root, tmp_path_factory):
    with running(root, tmp_path_factory.mktemp('home'), max_jobs=2) as it: yield it


@pytest.fixture(scope='module')
def file(service): return service.upload()


LONG = dict(n_epochs=500., save_steps=5)


def test_a_job_learns_and_is_served_at_once(service, file, monkeypatch):
    id = service.create(file, n_epochs=6., heldout=.2)
    job = service.ended(id)
    assert job['metrics']['loss_after'] < job['metrics']['loss_before'] - .5
    steps = [e['data']['step'] for e in service.events(id) if e['type'] == 'progress']
    assert steps == sorted(set(steps)) and steps[-1] == job['metrics']['steps'] == job['progress']['step']
    assert job['progress']['total_steps'] == steps[-1] and job['progress']['eta_s'] == 0
    names = {f['name'] for f in service.ask('GET', f'/tunings/{id}/files')['data']}
    assert {'training_log.txt', 'training_args.json', 'metrics.json', 'model/model.safetensors'} <= names
    assert service.ask('GET', f'/tunings/{id}/metrics')['curve'][-1]['step'] == steps[-1]
    monkeypatch.setenv('LLM_DISTILL_TUNINGS', str(service.home))
    assert find_model(job['fine_tuned_model']).endswith(f'{id}/result/model')
    assert load_model(f'tuning:{id}', 'cpu').config.hidden_size == 32
    again = service.create(file, job['fine_tuned_model'], max_steps=1, lora_rank=2)  # and trained on
    assert service.ended(again)['metrics']['steps'] == 1
    served = subprocess.Popen([SCRIPT, 'serve', f'tuning:{again}', '--port', '0'], stdout=subprocess.PIPE, text=True)
    try:
        url = served.stdout.readline().split(' answers at ')[1].split()[0]
        with openai.OpenAI(base_url=url, api_key='none') as client:
            name = client.models.list().data[0].id
            assert client.completions.create(model=name, prompt='Ask', max_tokens=4).choices[0].text
    finally: served.terminate(); served.wait(20)


def test_the_official_sdk_in_openais_own_form(service, wrong):
    c = service.client
    sent = c.files.create(file=service.root/'questions.jsonl', purpose='fine-tune')
    assert wrong('OpenAIFile', sent.model_dump(exclude_unset=True)) == []
    numbers = {'n_epochs': 2, 'learning_rate_multiplier': 4., 'batch_size': 'auto'}
    job = c.fine_tuning.jobs.create(
        model='tiny', training_file=sent.id, suffix='mine', seed=3, metadata={'why': 'a test'},
        method={'type': 'supervised', 'supervised': {'hyperparameters': numbers}})
    assert (job.status, job.hyperparameters.n_epochs, job.seed, job.metadata) == ('queued', 2, 3, {'why': 'a test'})
    while job.status not in ('succeeded', 'failed', 'cancelled'):
        job = c.fine_tuning.jobs.retrieve(job.id)
        assert wrong('FineTuningJob', job.model_dump(exclude_unset=True, exclude={'method'})) == []
        time.sleep(.1)
    assert job.status == 'succeeded' and job.trained_tokens > 1000 and job.fine_tuned_model == f'tuning:{job.id}'
    events = [*c.fine_tuning.jobs.list_events(job.id, limit=5)]  # pages by themselves
    assert [int(e.id.rpartition(':')[2]) for e in events] == list(range(len(events), 0, -1)) and len(events) > 5
    assert all(wrong('FineTuningJobEvent', e.model_dump(exclude_unset=True)) == [] for e in events)
    assert {e.type for e in events} == {'message', 'metrics'}
    points = c.fine_tuning.jobs.checkpoints.list(job.id).data
    assert len(points) == 2 and points[0].step_number > points[1].step_number
    assert all(wrong('FineTuningJobCheckpoint', p.model_dump(exclude_unset=True)) == [] for p in points)
    table = c.files.content(job.result_files[0]).text.splitlines()
    losses = [float(row.split(',')[1]) for row in table[1:]]
    assert table[0] == 'step,train_loss,learning_rate' and losses[-1] < losses[0]
    assert c.files.retrieve(job.result_files[0]).purpose == 'fine-tune-results'
    assert c.files.content(sent.id).content == (service.root/'questions.jsonl').read_bytes()
    assert job.id in [j.id for j in c.fine_tuning.jobs.list(limit=1)]
    with pytest.raises(openai.BadRequestError, match='supervised'):
        c.fine_tuning.jobs.create(model='tiny', training_file=sent.id, method={'type': 'dpo'})
    with pytest.raises(openai.BadRequestError) as e: c.fine_tuning.jobs.create(model='tiny', training_file='file-0')
    assert e.value.param == 'training_file'
    with pytest.raises(openai.NotFoundError): c.fine_tuning.jobs.retrieve('tune-0')
    with pytest.raises(openai.ConflictError): c.fine_tuning.jobs.cancel(job.id)
    assert c.files.delete(sent.id).deleted
    with pytest.raises(openai.NotFoundError): c.files.retrieve(sent.id)


def test_cancelling_frees_the_slot_within_five_seconds(service, file):
    jobs = [service.create(file, **LONG) for _ in range(3)]
    for id in jobs[:2]: service.until(id, lambda j: j['progress']['step'] >= 6)
    assert service.job(jobs[2])['status'] == 'pending'  # two at a time, in order
    began = time.time()
    service.ask('POST', f'/tunings/{jobs[0]}/cancel')
    assert service.ended(jobs[0], 'cancelled')['finished_at'] - began < 5
    service.until(jobs[2], lambda j: j['status'] == 'running')
    assert [p for p in (service.home/'jobs'/jobs[0]/'checkpoints').glob('checkpoint-*')]
    kept = service.client.fine_tuning.jobs.checkpoints.list(jobs[0]).data
    assert kept[0].step_number == service.job(jobs[0])['metrics']['steps']
    service.ask('POST', f'/tunings/{jobs[0]}/cancel', 409)
    for id in jobs[1:]: service.ask('POST', f'/tunings/{id}/cancel')
    for id in jobs[1:]: service.ended(id, 'cancelled')


def test_a_killed_worker_fails_its_job_or_goes_on(service, file):
    plain, stubborn = service.create(file, **LONG), service.create(file, resume=True, max_steps=300, save_steps=5)
    for id in (plain, stubborn):
        service.until(id, lambda j: j['progress']['step'] >= 6)
        os.kill(service.worker(id), signal.SIGKILL)
    failed = service.ended(plain, 'failed')
    assert failed['error']['code'] == 'killed' and 'SIGKILL' in failed['error']['message']
    done = service.ended(stubborn)
    assert (done['restarts'], done['metrics']['steps']) == (1, 300)
    said = [e['message'] for e in service.events(stubborn)]
    assert any('going on from step' in m for m in said)


def test_events_live_and_again(service, file):
    "A reader that loses the connection, and one that comes late, hear the same as one that stayed."
    id = service.create(file, max_steps=30)

    async def listen(after, most=None):
        heard, url = [], f'{service.url}/tunings/{id}/events'
        more = {'Authorization': f'Bearer {KEY}', 'Accept': 'text/event-stream', 'Last-Event-ID': str(after)}
        async with aiohttp.ClientSession() as http, http.get(url, headers=more) as reply:
            async for line in reply.content:
                if line.startswith(b'id: '): heard.append(int(line[4:]))
                if line == b'event: done\n': return heard, True
                if len(heard) == most: return heard, False

    async def broken():
        heard, done = [], False
        while not done:
            more, done = await listen(heard[-1] if heard else 0, 3)
            heard += more
        return heard

    async def all_of_them(): return await asyncio.gather(listen(0), broken())
    (whole, _), pieces = asyncio.run(all_of_them())
    late, _ = asyncio.run(listen(0))
    assert whole == pieces == late == [e['id'] for e in service.events(id)]


def test_a_retried_create_makes_one_job(service, file):
    body = json.dumps({'model': 'tiny', 'training_file': file, 'hyperparameters': {'max_steps': 1}}).encode()
    other = body.replace(b'steps": 1', b'steps": 2')
    def send(data):
        asked = urllib.request.Request(f'{service.url}/tunings', data, {
            'Authorization': f'Bearer {KEY}', 'Idempotency-Key': 'once', 'Content-Type': 'application/json'})
        with urllib.request.urlopen(asked) as reply: return reply.status, json.load(reply)['id']
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(send, [body]*8))
    assert len({id for _, id in found}) == 1 and sorted(s for s, _ in found) == [200]*7 + [201]
    with pytest.raises(urllib.error.HTTPError, match='409'): send(other)
    service.ask('POST', f'/tunings/{found[0][1]}/cancel', any=True)


def test_a_killed_service_finds_its_jobs_again(root, tmp_path):
    with running(root, tmp_path/'home', max_jobs=1) as service:
        file = service.upload()
        first, second = service.create(file, max_steps=400), service.create(file, max_steps=3)
        service.until(first, lambda j: j['progress']['step'] >= 3)
        pid = service.worker(first)
        service.kill()
        time.sleep(1)  # the worker goes on alone
        service.start()
        assert service.worker(first) == pid and service.job(first)['status'] == 'running'
        assert service.ended(first)['restarts'] == 0
        steps = [e['data']['step'] for e in service.events(first) if e['type'] == 'progress']
        assert steps == sorted(set(steps)) and steps[-1] == 400
        reported = (service.home/'jobs'/first/'events.jsonl').read_text().splitlines()
        assert len(service.events(first)) == 2 + len(reported)  # created, started; "succeeded" stands for "end"
        assert service.ended(second)['metrics']['steps'] == 3


@pytest.mark.slow
def test_a_worker_that_dies_while_nobody_sees_it_goes_on(root, tmp_path):
    with running(root, tmp_path/'home', max_jobs=1) as service:
        file = service.upload()
        first = service.create(file, resume=True, max_steps=200, save_steps=5)
        second = service.create(file, max_steps=2)
        service.until(first, lambda j: j['progress']['step'] >= 6)
        pid = service.worker(first)
        service.kill()
        os.kill(pid, signal.SIGKILL)
        service.start()
        assert (service.ended(first)['restarts'], service.job(first)['metrics']['steps']) == (1, 200)
        service.ended(second)
        assert [j['id'] for j in service.ask('GET', '/tunings')['data']] == [second, first]


def test_a_full_disk_fails_one_job_alone(root, tmp_path):
    with running(root, tmp_path/'home', limit=2_000_000) as service:  # bytes of a file
        file = service.upload()
        large, tiny = service.create(file, 'larger', max_steps=2), service.create(file, max_steps=2)
        error = service.ended(large, 'failed')['error']
        assert error['code'] == 'disk_full' and str(tmp_path) not in error['message'], error
        service.ended(tiny)


def test_who_may(root, tmp_path):
    "A key that nobody knows beforehand, owners that see their own, and a pace."
    with running(root, tmp_path/'home', api_keys=[], per_minute=600) as service:
        assert len(service.key) > 40 and service.key not in ''.join(
            p.read_text(errors='replace') for p in service.home.rglob('*') if p.is_file())
        file = service.upload()
        service.ask('GET', '/tunings', 401, key='wrong')
        service.ask('GET', f'/files/{file}', 401, key=service.key[:-1])
        seen = [service.ask('GET', '/tunings', any=True) for _ in range(200)]
        refused = [s for s in seen if 'error' in s]
        assert 20 < len(refused) < 180 and refused[0]['error']['code'] == 'rate_limit_exceeded'
        time.sleep(2)
        service.process.terminate(); service.process.wait(20)
        first, service.options['api_keys'] = service.key, ['another']
        service.start()  # no new key is made: `start` would have read it
        service.key = 'another'
        service.ask('GET', f'/files/{file}', 404)
        assert service.ask('GET', '/files')['data'] == []
        assert service.ask('GET', '/files', key=first)['data'][0]['id'] == file
        service.ask('POST', '/tunings', 400, model='tiny', training_file=file)


def test_names_lead_nowhere_else(service, file):
    for model in ('../models/tiny', '/etc', str(service.root/'models'/'tiny'), 'tiny/../tiny', 'a/b', 'tuning:..'):
        said = service.ask('POST', '/tunings', 400, model=model, training_file=file)
        assert said['error']['param'] == 'model', said
    said = service.ask('POST', '/tunings', 400, model='tiny', training_file='../questions')
    assert said['error']['param'] == 'training_file'
    id = service.create(file, max_steps=1)
    service.ended(id)
    for name in ('../job.json', '..%2fjob.json', '%2e%2e/worker.json', 'model/../../job.json', '/etc/passwd', 'model'):
        service.ask('GET', f'/tunings/{id}/files/{name}', 404)
    service.ask('DELETE', f'/tunings/{id}')
    assert not (service.home/'jobs'/id).exists()


def test_a_bad_file_fails_with_its_line(service):
    id = service.client.files.create(file=('bad.jsonl', b'{"messages": 1}\n'), purpose='fine-tune').id
    error = service.ended(service.create(id, max_steps=1), 'failed')['error']
    assert error['code'] == 'bad_input' and 'line 1' in error['message'] and str(service.home) not in error['message']


def test_it_is_not_bound_beyond_this_machine_without_a_key(tmp_path):
    from llm_distill.tuning.process import run_tunings
    from llm_distill.types import BadInput
    with pytest.raises(BadInput, match='without a key'): run_tunings(home=tmp_path, host='0.0.0.0', no_key=True)


def test_large_uploads_are_refused(root, tmp_path):
    with running(root, tmp_path/'home', max_upload=10_000) as service:
        with pytest.raises(openai.APIStatusError) as e: service.upload()
        assert e.value.status_code == 413 and not [*(service.home/'files').iterdir()]
        assert service.client.files.create(file=('a.jsonl', b'{}'), purpose='fine-tune').bytes == 2


@pytest.mark.slow
@pytest.mark.parametrize('known', [False, True], ids=['anything', 'names that exist'])
def test_a_fuzzer_finds_nothing(root, tmp_path, known):
    pytest.importorskip('schemathesis', reason='needs the extra "bench"')
    with running(root, tmp_path/'home', per_minute=0) as service:
        file, home = service.upload(), service.url.removesuffix('/v1')
        job = service.create(file, max_steps=1)
        service.ended(job)
        document = json.loads(urllib.request.urlopen(f'{home}/openapi.json').read())
        for path, methods in document['paths'].items() if known else ():
            for method in methods.values():
                for part in method.get('parameters', []):
                    there = {'id': file if 'files/{id}' in path else job, 'name': 'metrics.json'}
                    if part['in'] == 'path': part['schema'] = {'enum': [there[part['name']]]}
            methods.pop('delete', None)
        for asked in document['paths'].values() if known else ():
            schema = asked.get('post', {}).get('requestBody', {}).get('content', {}).get('application/json', {})
            fields = schema.get('schema', {}).get('properties', {})
            if 'training_file' in fields: fields |= {'model': {'enum': ['tiny']}, 'training_file': {'enum': [file]}}
        (tmp_path/'openapi.json').write_text(json.dumps(document))
        done = subprocess.run(
            [sys.executable, '-m', 'schemathesis.cli', 'run', tmp_path/'openapi.json', '--url', home,
             '--header', f'Authorization: Bearer {KEY}', '--max-examples', '50', '--continue-on-failure', '--checks',
             'not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance',
             '--suppress-health-check', 'all', '--seed', '1', '--request-timeout', '60',
             *(['--mode', 'positive'] if known else [])],
            capture_output=True, text=True, cwd=tmp_path, timeout=1200)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
