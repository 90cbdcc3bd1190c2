"Which OpenAI models there are, what they can do, and how use is told."
import re

from .common import Call
from .forms import refuse


def legacy(model: str) -> bool: return 'instruct' in model or model in ('davinci-002', 'babbage-002')


def version(model: str) -> tuple|None:
    "The version of a GPT model, as (5, 1)."
    found = re.match(r'gpt-(\d+)(?:\.(\d+))?(?![\d.])(?!o)', model)
    return (int(found[1]), int(found[2] or 0)) if found else None


def reasons(model: str) -> bool:
    "Whether a model can think at all."
    return bool(re.match(r'o[134](-|$)', model)) or ((version(model) or (0, 0)) >= (5, 0) and '-chat' not in model)


def thinks(model: str, effort: str|None) -> bool:
    "Whether it does, at an effort."
    return reasons(model) and not (effort == 'none' and (version(model) or (0, 0)) >= (5, 1))


def check_model(body: dict, call: Call):
    "A model that exists."
    name, own, flavour = body.get('model'), call.options.model, call.options.flavour
    if flavour == 'llama.cpp': return
    if not isinstance(name, str) or not name: refuse(400, 'you must provide a model parameter', flavour)
    if flavour == 'openai':
        exists = name == own or re.match(r'gpt-|chatgpt-|o\d|davinci-002|babbage-002|ft:', name)
        if exists: return
        refuse(404, f'The model `{name}` does not exist or you do not have access to it.', code='model_not_found')
    if flavour in ('vllm', 'sglang') and name != own: refuse(404, f'The model `{name}` does not exist.', flavour)


def usage_of(ids: list, call: Call):
    "How a flavour tells what was used."
    cached = call.memory.cached(ids, 128, 1024) if call.options.flavour == 'openai' else 0
    def usage(prompt, visible, thinking):
        said = visible + thinking
        plain = {'prompt_tokens': prompt, 'completion_tokens': said, 'total_tokens': prompt + said}
        if call.options.flavour != 'openai': return plain
        return plain | {'prompt_tokens_details': {'cached_tokens': cached, 'audio_tokens': 0},
                        'completion_tokens_details': {'reasoning_tokens': thinking, 'audio_tokens': 0,
                                                      'accepted_prediction_tokens': 0, 'rejected_prediction_tokens': 0}}
    return usage
