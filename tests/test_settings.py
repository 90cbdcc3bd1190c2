"Settings without code: environment, dict, JSON file; what goes first; and errors that say what to set or install."
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from families import FAMILIES, posts, server, teacher
from llm_distill import Completion, Teacher, create_teacher, register_teacher, teacher_settings
from llm_distill.teachers.registry import find_provider
from llm_distill.types import BadInput, MissingKey

KEYS = {'openai': 'OPENAI_API_KEY', 'deepseek': 'DEEPSEEK_API_KEY', 'anthropic': 'ANTHROPIC_API_KEY',
        'claude': 'ANTHROPIC_API_KEY'}
FILL = {'model': 'claude-haiku-4-5'}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    "An environment that says nothing."
    for name in ('USE_API', 'API_TYPE', 'API_MODEL', 'API_BASE_URL', 'API_TEMPERATURE', 'API_MAX_TOKENS', 'API_TIMEOUT',
                 'OPENAI_COMPATIBLE_API_KEY', 'CUSTOM_API_KEY', *KEYS.values()): monkeypatch.delenv(name, raising=False)


def like(t): "What settings made of a teacher."; return type(t).__name__, t.model, t.endpoint, t.timeout, t.defaults


def test_environment_dict_and_file_build_the_same_teacher(monkeypatch, tmp_path):
    with server('openai', key='k') as p:
        named = {'API_TYPE': 'openai', 'API_MODEL': 'gpt-4o-mini', 'API_BASE_URL': p.url, 'API_TEMPERATURE': '0',
                 'API_MAX_TOKENS': '7', 'API_TIMEOUT': '12.5'}
        short = {'provider': 'openai', 'model': 'gpt-4o-mini', 'base_url': p.url, 'temperature': 0., 'max_tokens': 7,
                 'timeout': 12.5}
        (tmp_path/'a.json').write_text(json.dumps(short))
        (tmp_path/'b.json').write_text(json.dumps({'USE_API': True, **named}))
        key = {'api_key': 'k'}
        made = [create_teacher(**short, **key), create_teacher(config=short | key), create_teacher(config=named | key),
                create_teacher(config={k.lower(): v for k, v in named.items()} | key),
                create_teacher(config=tmp_path/'a.json', **key), create_teacher(config=str(tmp_path/'b.json'), **key)]
        for name, value in {'USE_API': 'true', 'OPENAI_API_KEY': 'k', **named}.items(): monkeypatch.setenv(name, value)
        made.append(create_teacher())
        assert [like(t) for t in made] == [like(made[0])]*7
        assert like(made[0])[1:] == ('gpt-4o-mini', p.url, 12.5, {'temperature': 0., 'max_tokens': 7})
        assert len({t.generate('Hello').text for t in made}) == 1
        assert all(r.body['max_tokens'] == 7 and r.body['temperature'] == 0 for r in posts(p))
        assert made[0].generate('Hello', max_tokens=3).usage.completion_tokens == 3
        for t in made: t.close()


@pytest.mark.parametrize('name, env, config, given', [
    ('temperature', '.1', .2, .3), ('max_tokens', '5', 6, 7), ('timeout', '11', 12, 13), ('model', 'a', 'b', 'c'),
    ('base_url', 'http://a/v1', 'http://b/v1', 'http://c/v1'), ('provider', 'openai', 'vllm', 'deepseek')])
def test_what_goes_first(name, env, config, given):
    environ = {'API_TYPE': 'openai'} | {{'provider': 'API_TYPE'}.get(name, f'API_{name.upper()}'): env}
    assert teacher_settings({name: config}, environ, **{name: given})[name] == given
    assert teacher_settings({name: config}, environ)[name] == config
    assert teacher_settings({f'api_{name}' if name != 'provider' else 'API_TYPE': config}, environ)[name] == config
    assert teacher_settings({}, environ)[name] == type(given)(env)
    assert teacher_settings({name: None}, environ)[name] == type(given)(env)
    assert name == 'provider' or name not in teacher_settings({}, {'API_TYPE': 'openai'})


def test_a_provider_named_in_the_call_leaves_the_environment_aside(monkeypatch):
    said = {'API_TYPE': 'anthropic', 'API_TEMPERATURE': '.9', 'API_MODEL': 'x'}
    for name, value in said.items(): monkeypatch.setenv(name, value)
    t = create_teacher('openai', 'gpt-4o', 'k', config={'max_tokens': 5, 'provider': 'vllm'})
    assert type(t).__name__ == 'OpenAITeacher' and t.defaults == {'max_tokens': 5} and t.model == 'gpt-4o'


def test_use_api_chooses_between_a_provider_and_a_local_model():
    environ = {'API_TYPE': 'openai', 'API_MODEL': 'gpt-4o', 'API_TEMPERATURE': '1', 'API_BASE_URL': 'http://a/v1'}
    for no in ('false', '0', 'no', 'off', 'False'):
        assert teacher_settings(None, {'USE_API': no} | environ) == {'provider': 'local'}
        assert teacher_settings({'model': 'smollm2', 'max_tokens': 3}, {'USE_API': no} | environ) == {
            'provider': 'local', 'model': 'smollm2', 'max_tokens': 3}
    for yes in ('true', '1', 'YES', 'on', ''):
        assert teacher_settings(None, {'USE_API': yes} | environ)['provider'] == 'openai'
    assert teacher_settings({'use_api': True}, {'USE_API': 'false'} | environ)['provider'] == 'openai'
    assert teacher_settings({'use_api': False}, {'USE_API': 'true'} | environ)['provider'] == 'local'
    with pytest.raises(BadInput, match='USE_API is true or false'): teacher_settings(None, {'USE_API': 'perhaps'})


@pytest.mark.parametrize('config, words', [
    ({'temperature': 'warm'}, 'temperature is a number'), ({'max_tokens': '1.5'}, 'max_tokens is a number'),
    ({'API_TIMEOUT': 'long'}, 'API_TIMEOUT is a number'), ({'timeout': 0}, 'timeout is more than 0'),
    ({'timeout': float('nan')}, 'timeout is more than 0'), ({'max_retries': -1}, 'max_retries'),
    ({'colour': 'red'}, 'no setting colour'), ({'provider': 'nobody'}, "unknown provider 'nobody'.*anthropic.*vllm"),
    ({'base_url': 'localhost:8000'}, 'http://'), ({'base_url': 'http://u:p@h/v1'}, 'user and password'),
    ({'concurrency': 'many'}, 'concurrency'), ({'budget': 'much'}, 'budget')])
def test_settings_that_cannot_be(config, words):
    sound = {'provider': 'openai', 'model': 'm', 'api_key': 'k'}
    with pytest.raises(BadInput, match=words): create_teacher(config=sound | config)


@pytest.mark.parametrize('text', ['', '{', '[1]', '"openai"', b'\xff\xfe\x00'])
def test_files_that_hold_no_settings(tmp_path, text):
    (tmp_path/'a.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInput, match='a.json'): create_teacher(config=tmp_path/'a.json')
    with pytest.raises(BadInput, match='none.json'): create_teacher(config=tmp_path/'none.json')


def test_nothing_said_at_all():
    with pytest.raises(BadInput, match='API_TYPE'): create_teacher()
    with pytest.raises(BadInput, match='base_url='): create_teacher('vllm', 'm')
    with pytest.raises(BadInput, match='base_url='): create_teacher('custom')
    with pytest.raises(BadInput, match='model='): create_teacher('anthropic', api_key='k')


@pytest.mark.parametrize('family', KEYS)
def test_a_missing_key_names_its_variable(family, monkeypatch):
    for empty in (None, '', ' '):
        if empty is not None: monkeypatch.setenv(KEYS[family], empty)
        with pytest.raises(MissingKey, match=f'set {KEYS[family]} or pass api_key='): create_teacher(family, **FILL)
    monkeypatch.setenv(KEYS[family], 'k')
    create_teacher(family, **FILL)


def test_each_family_reads_its_own_variable(monkeypatch):
    names = KEYS | dict.fromkeys(('vllm', 'ollama'), 'OPENAI_COMPATIBLE_API_KEY') | {'custom': 'CUSTOM_API_KEY'}
    for name in set(names.values()): monkeypatch.setenv(name, f'key-{name}')
    for family in set(names) & set(FAMILIES):
        with server(family) as p, teacher(family, p, None) as t:
            t.generate('Hello')
            assert posts(p)[-1].headers['authorization'] == f'Bearer key-{names[family]}'


BLOCK = '''
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == sys.argv[1]: raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Blocker())
from llm_distill import create_teacher
try: create_teacher(sys.argv[2], 'm', 'k', 'http://127.0.0.1:9/v1')
except ImportError as e: print(e)
else: print('made')
'''


@pytest.mark.parametrize('sdk, family, said', [
    ('openai', 'openai', True), ('openai', 'vllm', True), ('openai', 'custom', True), ('anthropic', 'claude', True),
    ('openai', 'claude', False)])
def test_a_missing_sdk_names_the_install(sdk, family, said):
    done = subprocess.run([sys.executable, '-c', BLOCK, sdk, family], capture_output=True, text=True, cwd=ROOT)
    if said: assert f'-m pip install {sdk}' in done.stdout and sys.executable in done.stdout, done.stdout + done.stderr
    else: assert done.stdout.strip() == 'made', done.stderr


OWN = '''
from llm_distill import Completion, Teacher, create_teacher, register_teacher
@register_teacher('openai')
class Mine(Teacher):
    def __init__(self, model=None, **options): super().__init__(model or 'm', 'mine', **options)
    def body(self, messages, **params): return {'model': self.model, 'messages': messages, **params}
    async def attempt(self, request): return Completion('mine')
create_teacher('vllm', 'm', base_url='http://127.0.0.1:9/v1')
print(create_teacher('openai').generate('Hello').text)
'''


def test_a_provider_of_ones_own():
    @register_teacher('parrot', 'Grey-Parrot')
    class Parrot(Teacher):
        "Says what it hears."
        def __init__(self, model=None, api_key=None, base_url=None, shout=False, **options):
            super().__init__(model or 'grey', 'parrot', **options)
            self.shout = shout
        def body(self, messages, **params): return {'model': self.model, 'messages': messages, **params}
        async def attempt(self, request):
            said = request['messages'][-1]['content']
            return Completion(said.upper() if self.shout else said)

    for name in ('parrot', 'Parrot', 'Grey-Parrot', 'grey-parrot'):
        t = create_teacher(name, shout=True, max_tokens=3)
        assert t.generate_text('hello') == 'HELLO' and t.stats.successful == 1 and t.model == 'grey'
    assert create_teacher(config={'provider': 'parrot', 'api_model': 'red'}).generate('hi').text == 'hi'
    assert [a.text for a in t.generate_batch(['a', 'b'])] == ['A', 'B'] and find_provider('parrot') is Parrot
    with pytest.raises(BadInput, match='parrot'): create_teacher('cockatoo')


def test_a_provider_of_ones_own_stays_in_place_of_ours():
    done = subprocess.run([sys.executable, '-c', OWN], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == 'mine', done.stdout + done.stderr
