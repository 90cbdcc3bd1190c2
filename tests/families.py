"A teacher of every family, and the server that it talks to."
from llm_distill import create_teacher
from servers import Provider

FAMILIES = {  # protocol of the server, its options, the model that is asked for
    'openai': ('openai', {}, 'gpt-4o'), 'deepseek': ('deepseek', {}, None),
    'anthropic': ('anthropic', {}, 'claude-sonnet-5'),
    'openai-compatible': ('openai', {'flavour': 'plain'}, None), 'vllm': ('openai', {'flavour': 'vllm'}, None),
    'sglang': ('openai', {'flavour': 'sglang'}, None), 'llama.cpp': ('openai', {'flavour': 'llama.cpp'}, None),
    'ollama': ('openai', {'flavour': 'plain'}, 'm'), 'custom': ('rest', {}, None)}
CLOUD = ('openai', 'deepseek', 'anthropic', 'openai-compatible', 'custom')  # one for each way to speak


def server(family: str, **options) -> Provider:
    "A server that speaks to a family."
    protocol, own, _ = FAMILIES[family]
    return Provider(protocol, **own | options)


def teacher(family: str, p: Provider, key: str|None = 'k', **options):
    "A teacher of a family at a server; it waits for nothing between attempts."
    return create_teacher(family, FAMILIES[family][2], key, p.url, **{'retry_delay': 0, 'timeout': 30} | options)


def posts(p: Provider) -> list: return [r for r in p.requests if r.method == 'POST']
