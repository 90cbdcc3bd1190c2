"Encoder-decoders small enough to be made, and taught a few sentences, in a test."
import json

import numpy as np
import torch
import transformers
from tokenizers import (AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, processors,
                        trainers)

ANSWERS = {'What is the capital of France?': 'It is Paris.', 'What is the capital of Italy?': 'It is Rome.',
           'What is the capital of Peru?': 'It is Lima, by the sea.',
           'Translate to German: good day': 'guten Tag, Grüße', 'Translate to German: thank you': 'danke schön'}
TONES = {220: ' Low.', 440: ' In the middle, März.', 880: ' High', 1760: ' Very high!'}
RATE, WINDOW = 16_000, 2  # samples a second, and seconds that the small Whisper hears at a time


def tokenizer():
    "In SentencePiece's manner; 0 pads and begins, 1 ends."
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator([*ANSWERS, *ANSWERS.values()]*3, trainers.UnigramTrainer(
        vocab_size=160, special_tokens=['<pad>', '</s>', '<unk>'], unk_token='<unk>', show_progress=False))
    t.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='</s>',
                                                unk_token='<unk>')


_IDS = dict(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, bos_token_id=None, forced_eos_token_id=None)
_T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=4., dropout_rate=0.)
_BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
             encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=.5, dropout=0.)
FAMILIES = {'T5': _T5, 'MT5': _T5, 'UMT5': _T5, 'LongT5': _T5, 'Bart': _BART, 'MBart': _BART, 'Marian': _BART,
            'Pegasus': _BART, 'M2M100': _BART, 'Blenderbot': _BART}


def untaught(family: str, vocabulary: int):
    "A model of a family with weights that mean nothing."
    torch.manual_seed(1)
    config = getattr(transformers, f'{family}Config')(vocab_size=vocabulary, **FAMILIES[family], **_IDS)
    name = 'MarianMTModel' if family == 'Marian' else f'{family}ForConditionalGeneration'
    return getattr(transformers, name)(config).eval()


def _descend(model, batch, steps, rate):
    descent = torch.optim.Adam(model.parameters(), rate)
    for _ in range(4*steps):  # until it is sure, on any machine
        loss = model(**batch).loss
        if loss < .01: break
        loss.backward(); descent.step(); descent.zero_grad()
    return model.eval()


def t5(t):
    "A T5 that knows `ANSWERS`."
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(t) + 8, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4,
                                   feed_forward_proj='gated-gelu', dropout_rate=0., **_IDS)
    asked = t(list(ANSWERS), padding=True, return_tensors='pt')
    labels = t(list(ANSWERS.values()), padding=True, return_tensors='pt')['input_ids']
    return _descend(transformers.T5ForConditionalGeneration(config),
                    {**asked, 'labels': labels.masked_fill(labels == 0, -100)}, 80, .01)


def tone(hertz, seconds=WINDOW, rate=RATE):
    return (.5*np.sin(2*np.pi*hertz*np.arange(int(rate*seconds))/rate)).astype(np.float32)


def whisper_tokenizer():
    "Byte-level, with Whisper's marks and times."
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(list(TONES.values()), vocab_size=300, min_frequency=1, show_progress=False)
    merges = json.loads(bpe._tokenizer.to_str())['model']['merges']
    t = transformers.WhisperTokenizer(vocab=bpe.get_vocab(), merges=[tuple(m) for m in merges])
    marks = 'startoftranscript en de translate transcribe startoflm startofprev nospeech notimestamps'.split()
    t.add_special_tokens({'additional_special_tokens': [f'<|{m}|>' for m in marks]})
    t.add_tokens([AddedToken(f'<|{i*.02:.2f}|>', special=False, normalized=False) for i in range(WINDOW*50 + 1)])
    return t


def whisper(t):
    "A Whisper that knows `TONES`, with and without times, and its feature extractor."
    def of(*marks): return t.convert_tokens_to_ids([f'<|{m}|>' for m in marks])
    features, end = transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=WINDOW), t.eos_token_id
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=len(t), num_mel_bins=20, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=WINDOW*50,
        max_target_positions=64, dropout=0., pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=of('startoftranscript')[0]))
    (start, stop), (off,) = of('0.00', f'{WINDOW:.2f}'), of('notimestamps')
    model.generation_config = transformers.GenerationConfig(
        max_length=64, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=of('startoftranscript')[0], is_multilingual=True,
        lang_to_id=dict(zip(('<|en|>', '<|de|>'), of('en', 'de'))),
        task_to_id=dict(zip(('transcribe', 'translate'), of('transcribe', 'translate'))), no_timestamps_token_id=off,
        begin_suppress_tokens=[end], suppress_tokens=of('nospeech'), alignment_heads=[[1, 0], [1, 1]])
    rows = []
    for said in TONES.values():
        ids, language = t(said, add_special_tokens=False)['input_ids'], 'de' if 'ä' in said else 'en'
        head = of('startoftranscript', language, 'transcribe')
        rows += [[*head, off, *ids, end], [*head, start, *ids, stop, end]]
    y = torch.tensor([r + [-100]*(max(map(len, rows)) - len(r)) for r in rows])
    x = features([tone(f) for f in TONES for _ in range(2)], sampling_rate=RATE, return_tensors='pt').input_features
    batch = {'input_features': x, 'decoder_input_ids': y[:, :-1].clamp(min=0), 'labels': y[:, 1:]}
    return _descend(model, batch, 150, .004), features


def byte_tokenizer():
    "A token for each byte, and chat marks."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=t, pad_token='<pad>', eos_token='<end>',
                                                additional_special_tokens=['<user>', '<assistant>'])
    fast.chat_template = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
                          "{% if add_generation_prompt %}<assistant>{% endif %}")
    return fast


def llama(t, seed=0, **size):
    "A Llama that has learnt nothing."
    torch.manual_seed(seed)
    usual = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, max_position_embeddings=512)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(t), pad_token_id=t.pad_token_id, eos_token_id=t.eos_token_id, bos_token_id=None,
        tie_word_embeddings=True, **usual | size)).eval()
