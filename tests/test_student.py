"Students: cut out of a teacher or new, with adapters, saved and loaded again."
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config,
                          GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from llm_distill.importance import layer_importance, measure_importance
from llm_distill.models import load_model, load_tokenizer
from llm_distill.saving import Card, load_student, save_student
from llm_distill.student import new_student, prune
from llm_distill.types import BadInput

SIZES = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=8,
             num_key_value_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1)
SLIDING = ['sliding_attention', 'full_attention']*2
FAMILIES = {
    'llama': (LlamaForCausalLM, LlamaConfig, dict(attention_bias=True, mlp_bias=True)),
    'tied': (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=True)),
    'qwen2': (Qwen2ForCausalLM, Qwen2Config, dict(use_sliding_window=True, sliding_window=8, layer_types=SLIDING)),
    'qwen3': (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=8, tie_word_embeddings=True)),
    'mistral': (MistralForCausalLM, MistralConfig, dict(head_dim=8, sliding_window=8))}
TEXT = torch.randint(2, 100, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(family='llama', **more):
    torch.manual_seed(0)
    model, config, own = FAMILIES[family]
    model = model(config(**SIZES | own | more)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.1)  # biases and norms that matter
    return model


def logits(model, text=TEXT):
    with torch.no_grad(): return model(input_ids=text).logits.float()


@pytest.fixture(scope='module')
def tokenizer():
    words = Tokenizer(models.WordLevel({f'w{i}': i for i in range(100)}, unk_token='w2'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token='w0', eos_token='w1', pad_token='w1',
                                   unk_token='w2')
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


@pytest.mark.parametrize('family', FAMILIES)
def test_to_the_full_size_nothing_changes(family):
    model = tiny(family)
    twin = prune(model, layers=1., hidden=32, heads=8, intermediate=48)
    assert torch.equal(logits(twin), logits(model))
    shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared


def silence(model, seed):
    "Dead channels, neurons and one group of heads; returns which."
    g, size = torch.Generator().manual_seed(seed), model.config.head_dim if hasattr(model.config, 'head_dim') else 4
    dead = {'hidden': torch.randperm(32, generator=g)[:8], 'intermediate': [], 'groups': []}
    with torch.no_grad():
        model.get_input_embeddings().weight[:, dead['hidden']] = 0
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            for part in (a.o_proj, m.down_proj):
                part.weight[dead['hidden']] = 0
                if part.bias is not None: part.bias[dead['hidden']] = 0
            neurons, group = torch.randperm(48, generator=g)[:16], int(torch.randint(4, (), generator=g))
            m.up_proj.weight[neurons] = 0
            if m.up_proj.bias is not None: m.up_proj.bias[neurons] = 0
            a.o_proj.weight[:, group*2*size:(group + 1)*2*size] = 0
            dead['intermediate'].append(neurons); dead['groups'].append(group)
    return dead


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('by', ['weights', 'data'])
@pytest.mark.filterwarnings("ignore:vLLM's Qwen2")
def test_exactly_the_dead_parts_go(family, by):
    model = tiny(family)
    dead = silence(model, 3)
    measured = measure_importance(model, [TEXT]) if by == 'data' else None
    cut = prune(model, hidden=24, heads=6, intermediate=32, importance=measured)
    assert (cut.config.num_key_value_heads, cut.config.num_hidden_layers) == (3, 4)
    assert (logits(cut) - logits(model)).abs().max() < 2e-5*logits(model).abs().max().clamp_min(1)
    if measured:
        assert set(measured['hidden'].topk(8, largest=False).indices.tolist()) == set(dead['hidden'].tolist())
        groups = measured['heads'].view(4, 4, 2).sum(-1).argmin(1)
        assert groups.tolist() == dead['groups']
    assert cut.generate(TEXT[:1], max_new_tokens=3, do_sample=False).shape[1] > 16


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.filterwarnings("ignore:vLLM's Qwen2")
def test_a_narrow_student_comes_back_the_same(family, tokenizer, tmp_path):
    student = prune(tiny(family), layers=[0, 2, 3], hidden=24, heads=4, intermediate=40)
    save_student(student, tokenizer, tmp_path/'s')
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path/'s'), load_model(tmp_path/'s', 'cpu')):
        assert again.dtype == torch.float32 and torch.equal(logits(again), logits(student))
    if family == 'qwen2': assert again.config.layer_types == [SLIDING[i] for i in (0, 2, 3)]


def test_layers_by_importance():
    model = tiny()
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_(); part.bias.zero_()  # this layer passes on what it gets
    for by in ('influence', 'loss'):
        score = layer_importance(model, [TEXT], by)
        assert score[1].abs() < 1e-6
        if by == 'influence': assert score.argmin() == 1
    cut = prune(model, layers=3, importance=layer_importance(model, [TEXT]))
    assert torch.equal(logits(cut), logits(model))


def test_influence_from_its_definition():
    model, text = tiny('qwen3'), TEXT.clone()
    mask = torch.ones_like(text); mask[1, 10:] = 0
    with torch.no_grad(): states = model(text, attention_mask=mask, output_hidden_states=True).hidden_states[:-1]
    slow = []
    for before, after in zip(states, states[1:]):
        cosines = [float(x @ y/(x.norm()*y.norm())) for b in range(2) for x, y, m in
                   zip(before[b].double(), after[b].double(), mask[b]) if m]
        slow.append(1 - np.mean(cosines))
    fast = layer_importance(model, [{'input_ids': text, 'attention_mask': mask}])
    assert np.allclose(fast[:3], slow, atol=1e-6)  # transformers gives the last state after the norm


def test_old_words_for_depth():
    model = tiny()
    def n(*args, **kwargs): return prune(model, *args, **kwargs).config.num_hidden_layers
    assert [n(), n(2), n(keep_every=4), n(layers=.5), n(layers=3), n(heads=4)] == [2, 2, 1, 2, 3, 4]


@pytest.mark.parametrize('wrong, says', [
    (dict(heads=3), 'multiple of 2'), (dict(hidden=33), '1 to 32'), (dict(hidden=30), 'take hidden=24'),
    (dict(layers=5), '1 to 4'), (dict(layers=[2, 1]), 'ascending'), (dict(layers=0.), 'fraction'),
    (dict(layers=2, keep_every=2), 'not both'), (dict(intermediate=0), '1 to 48'), (dict(keep_every=0), '1 to 4')])
def test_sizes_that_cannot_be(wrong, says):
    with pytest.raises(BadInput, match=says): prune(tiny(), **wrong)


def test_other_families():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=16, n_layer=4, n_head=2)).eval()
    assert torch.equal(logits(prune(gpt2, layers=4)), logits(gpt2)) and prune(gpt2, layers=2).config.n_layer == 2
    with pytest.raises(BadInput, match='not built like Llama'): prune(gpt2, hidden=8)
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | {'head_dim': 4})).eval()
    with torch.no_grad():
        for layer in gemma.model.layers: layer.mlp.up_proj.weight[5:21] = 0
    assert torch.allclose(logits(prune(gemma, intermediate=32)), logits(gemma), atol=1e-5)
    assert prune(gemma, layers=2, heads=4).generate(TEXT[:1], max_new_tokens=2).shape[1] > 16
    with pytest.raises(BadInput, match='scales its stream'): prune(gemma, hidden=16)


def test_qwen2_says_what_vllm_cannot_load():
    with pytest.warns(UserWarning, match="vLLM's Qwen2"): prune(tiny('qwen2'), heads=4)


def test_a_padded_relative_does_not_set_the_vocabulary(tokenizer):
    "The same family states 151,936 or 152,064 for one tokenizer (trl#2215): its own length counts."
    student = new_student(LlamaConfig(**SIZES | {'vocab_size': 128}), tokenizer, layers=2)
    assert student.config.vocab_size == len(tokenizer) == 100
    assert torch.equal(logits(student), logits(new_student(LlamaConfig(**SIZES), tokenizer, layers=2)))
    assert not torch.equal(logits(student), logits(new_student(LlamaConfig(**SIZES), tokenizer, layers=2, seed=1)))


def test_a_foreign_tokenizer_is_not_saved(tokenizer, tmp_path):
    with pytest.raises(BadInput, match='do not belong together'):
        save_student(tiny(vocab_size=64), tokenizer, tmp_path/'s')
    assert not (tmp_path/'s').exists()


def test_the_folder_is_whole(tokenizer, tmp_path):
    student = tiny('tied')
    student.generation_config.temperature = .6  # without do_sample: transformers refuses to save that
    (tmp_path/'s'/'checkpoint-3').mkdir(parents=True)
    (tmp_path/'s'/'model-00001-of-00002.safetensors').write_text('of an older student')
    folder = save_student(student, tokenizer, tmp_path/'s', dtype=torch.bfloat16)
    assert student.dtype == torch.float32
    assert {'README.md', 'chat_template.jinja', 'checkpoint-3', 'config.json', 'generation_config.json',
            'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'} == {p.name for p in folder.iterdir()}
    with safe_open(folder/'model.safetensors', 'pt') as f:
        assert 'lm_head.weight' not in f.keys()  # tied to the embeddings: saved once
        assert {f.get_tensor(k).dtype for k in f.keys()} == {torch.bfloat16}
        assert sum(f.get_tensor(k).numel() for k in f.keys()) == student.num_parameters()  # no teacher came along
    assert json.loads((folder/'config.json').read_text())['dtype'] == 'bfloat16'
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert list(tmp_path.iterdir()) == [folder]


def test_a_teacher_beside_the_student_is_not_saved(tokenizer, tmp_path):
    student = prune(tiny(), layers=1)
    object.__setattr__(student, 'teacher', tiny())
    save_student(student, tokenizer, tmp_path/'s')
    with safe_open(tmp_path/'s'/'model.safetensors', 'pt') as f:
        assert sum(f.get_tensor(k).numel() for k in f.keys()) == student.num_parameters()
    assert str(tmp_path) not in (tmp_path/'s'/'config.json').read_text()


KILLED = '''
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_student import tiny
from transformers import AutoTokenizer
from llm_distill.saving import save_student
tokenizer, i = AutoTokenizer.from_pretrained(sys.argv[1]), 0
while True:
    model = tiny('tied')
    with torch.no_grad():
        for p in model.parameters(): p.fill_(i)
    save_student(model, tokenizer, sys.argv[1] + '/../s')
    print(i, flush=True)
    i += 1
'''


def test_kill_9_leaves_a_whole_student_or_none(tokenizer, tmp_path):
    (tmp_path/'tokenizer').mkdir()
    tokenizer.save_pretrained(tmp_path/'tokenizer')
    victim = subprocess.Popen([sys.executable, '-c', KILLED, tmp_path/'tokenizer', ROOT/'tests'],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for _ in range(3): assert victim.stdout.readline().strip(), 'it never saved'
    time.sleep(random.random()/10)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    if (tmp_path/'s').exists():
        assert len(list((tmp_path/'s').iterdir())) == 7
        values = {v for p in load_model(tmp_path/'s', 'cpu').parameters() for v in p.flatten().tolist()}
        assert len(values) == 1  # one student, not parts of two


def test_the_card(tokenizer, tmp_path):
    from llm_distill.records import Answer
    from llm_distill.types import Completion, Usage, as_messages
    answers = [Answer(as_messages('Hi'), Completion('Ho', 'stop', usage=Usage(5, 7)))]*3
    manifest = {'kind': 'OpenAITeacher', 'model': 'T|1', 'endpoint': 'https://u:sk-secret@x.org?key=sk-secret',
                'gives': ['text'], 'training_on_answers': 'restricted',
                'terms': 'https://x.org/terms', 'api_key': 'sk-secret'}
    card = Card.of(answers, {'before': {'kl': 9.5}, 'after': {'kl': 1.25}}, teachers=[manifest],
                   base_model='owner/base', license='My Own 2', language=['en', 'English'],
                   datasets=['owner/prompts', '/home/me/prompts.jsonl'])
    save_student(tiny(), tokenizer, tmp_path/'s', card)
    page = ModelCard.load(tmp_path/'s'/'README.md')
    meta = page.data.to_dict()
    assert (meta['license'], meta['license_name'], meta['base_model']) == ('other', 'my-own-2', 'owner/base')
    assert (meta['language'], meta['datasets'], meta['library_name']) == (['en'], ['owner/prompts'], 'transformers')
    assert {'distillation', 'llm_distill'} <= set(meta['tags'])
    for part in ('https://x.org/terms', 'restricted', r'T\|1', '| tokens of the answers | 21 |', '| kl | 9.5 | 1.25 |',
                 'vllm serve', 'llm-distill serve', 'AutoModelForCausalLM'): assert part in page.text, part
    assert all(b'sk-secret' not in p.read_bytes() for p in (tmp_path/'s').iterdir())


# Adapters

@pytest.fixture(scope='module')
def base(tokenizer, tmp_path_factory):
    return save_student(tiny('tied'), tokenizer, tmp_path_factory.mktemp('base')/'base')


def examples(n=4):
    rng = np.random.default_rng(0)
    return [{'input_ids': (ids := rng.integers(2, 100, 8)), 'labels': np.where(np.arange(8) < 2, -100, ids),
             'top_ids': rng.integers(2, 100, (8, 1)), 'soft': np.arange(8) >= 2,
             'top_logprobs': np.log(rng.uniform(.2, .8, (8, 1))).astype(np.float32)} for _ in range(n)]


@pytest.mark.parametrize('dora', [False, True])
def test_only_the_adapter_learns(base, tokenizer, tmp_path, dora):
    pytest.importorskip('peft')
    from llm_distill.fused import head_of
    from llm_distill.models import last_hidden
    from llm_distill.train import DistillConfig, DistillTrainer
    student = load_student(base, lora={'r': 2}, dora=dora, device='cpu')
    text = {'input_ids': TEXT, 'attention_mask': torch.ones_like(TEXT)}
    with torch.no_grad(): fused = head_of(student).logits(last_hidden(student, text))
    assert (fused - logits(student)).abs().max() < 1e-5
    before = {k: p.detach().clone() for k, p in student.named_parameters()}
    config = DistillConfig(str(tmp_path/'t'), use_cpu=True, max_steps=3, logging_steps=1, learning_rate=1e-2)
    trainer = DistillTrainer(student, config, examples(), tokenizer)
    trainer.train()
    changed = {k for k, p in student.named_parameters() if not torch.equal(p, before[k])}
    assert changed == {k for k, p in student.named_parameters() if p.requires_grad} and changed
    assert all('lora_' in k for k in changed) and trainer.curve[-1]['loss'] > 0
    whole = logits(student)
    save_student(student, tokenizer, tmp_path/'adapter')
    save_student(student, tokenizer, tmp_path/'merged', merge=True)
    assert torch.equal(logits(student), whole)  # merging left the student in memory alone
    assert not list((tmp_path/'adapter').glob('model*.safetensors'))
    for name in ('adapter', 'merged'):  # transformers' own loading of a DoRA loses its magnitudes
        assert (logits(load_model(tmp_path/name, 'cpu')) - whole).abs().max() < 1e-4, name
    resumed = load_student(tmp_path/'adapter', device='cpu')
    assert any(p.requires_grad for p in resumed.parameters()) and (logits(resumed) - whole).abs().max() < 1e-5
    assert ModelCard.load(tmp_path/'adapter'/'README.md').data.library_name == 'peft'
    assert load_tokenizer(tmp_path/'adapter').chat_template == tokenizer.chat_template


def test_an_adapter_needs_its_base(base, tokenizer, tmp_path):
    peft = pytest.importorskip('peft')
    orphan = peft.get_peft_model(prune(load_model(base, 'cpu'), layers=2), peft.LoraConfig(target_modules='all-linear'))
    with pytest.raises(BadInput, match='never saved'): save_student(orphan, tokenizer, tmp_path/'s')
    assert save_student(orphan, tokenizer, tmp_path/'s', merge=True)
    with pytest.raises(BadInput, match='without adapters'): prune(orphan)


def test_what_is_missing_is_said(base, monkeypatch):
    import importlib.util
    find, missing = importlib.util.find_spec, ('peft', 'bitsandbytes')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n in missing else find(n, *a))
    with pytest.raises(ImportError, match='pip install peft'): load_student(base, lora=2, device='cpu')
    with pytest.raises(ImportError, match='pip install bitsandbytes'): load_student(base, 'int4', lora=2, device='cpu')
    with pytest.raises(BadInput, match='add lora'): load_student(base, 'int4')


@pytest.mark.parametrize('bits', ['int8', 'int4'])
def test_few_bits(bits, tokenizer, tmp_path):
    pytest.importorskip('bitsandbytes'), pytest.importorskip('peft')
    model = tiny('tied', hidden_size=64, intermediate_size=128)
    base = save_student(model, tokenizer, tmp_path/'base')
    student = load_student(base, bits, lora=2, dtype=torch.float32)
    q, p = logits(student).log_softmax(-1).cpu(), logits(model).log_softmax(-1)
    assert float((p.exp()*(p - q)).sum(-1).mean()) < .5
    from llm_distill.train import DistillConfig, DistillTrainer
    config = DistillConfig(str(tmp_path/'t'), use_cpu=not torch.cuda.is_available(), max_steps=2)
    DistillTrainer(student, config, examples(), tokenizer).train()
    save_student(student, tokenizer, tmp_path/'s')
    with pytest.raises(BadInput, match='few bits'): save_student(student, tokenizer, tmp_path/'m', merge=True)
    assert logits(load_student(tmp_path/'s', device='cpu')).shape == p.shape


def test_smollm2_needs_what_was_measured():
    "One real model: with the neurons that matter it is closer to what it was than with those that do not."
    teacher, tokenizer = load_model('smollm2', 'cpu', torch.float32), load_tokenizer('smollm2')
    text, other = (tokenizer(t, return_tensors='pt')['input_ids'] for t in (
        'Owls hunt at night. They hear a mouse under the snow and fly without a sound. At dawn they rest in a tree.',
        'A lighthouse shows ships where the rocks are. Its lamp turns, and each flash comes after the same pause.'))
    score, p = measure_importance(teacher, [text])['intermediate'], logits(teacher, other).log_softmax(-1)

    def kl(importance):
        student = prune(teacher, intermediate=1280, importance={'intermediate': importance})
        return float((p.exp()*(p - logits(student, other).log_softmax(-1))).sum(-1).mean())
    assert kl(score) < kl(-score)/2
