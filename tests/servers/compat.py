"What vLLM, SGLang and llama.cpp add to the OpenAI protocol, or leave out."
from . import toy
from .chat import Ask, answers, common, rendered
from .common import Call, Reply, identity
from .forms import check_number, refuse


def check_count(k: int, options, what: str = 'sample'):
    "Not more candidates than vLLM was started with; -1 there is the vocabulary."
    most = options.max_logprobs
    if 0 <= most < (k if k >= 0 else len(toy.PIECES)):
        refuse(400, f'Requested {what} logprobs of {k}, which is greater than max allowed: {most}', options.flavour)


def check_ids(ids: list, flavour: str):
    "Ids that are in the vocabulary."
    if any(not isinstance(i, int) or not 0 <= i < len(toy.PIECES) for i in ids):
        refuse(400, 'Token id out of vocabulary.', flavour)


def check_chat(body: dict, flavour: str):
    "What compatible servers insist on."
    if flavour in ('vllm', 'sglang'):
        for name, high in (('temperature', 100), ('top_p', 1)): check_number(body, name, 0, high, flavour=flavour)
        check_number(body, 'n', 1, 128, True, flavour=flavour)
    if flavour == 'vllm' and body.get('top_logprobs') and not body.get('logprobs'):
        refuse(400, 'when using `top_logprobs`, `logprobs` must be set to true.', flavour)


def opens(body: dict, options) -> bool:
    "Whether a conversation is followed by the opening of the assistant's turn."
    if options.flavour != 'vllm': return True
    return body.get('add_generation_prompt', True) and not body.get('continue_final_message')


def prompt_logprobs(body: dict, ids: list, options) -> list|None:
    "Candidates at each token of a prompt, the token itself among them."
    k = body.get('prompt_logprobs')
    if k is None: return None
    check_count(k, options, 'prompt')
    out = [None]
    for i, key in list(zip(ids, toy.keys(body['model'], ids)))[1:]:
        found = toy.dist(key)
        told = dict.fromkeys([i, *(found.ranked if k < 0 else found.ranked[:k])])
        out.append({str(t): {'logprob': found.logprobs[t], 'rank': found.rank[t] + 1, 'decoded_token': toy.piece(t)}
                    for t in told})
    return out[:len(ids)]


def tokenize(call: Call) -> Reply:
    "POST /tokenize"
    body = call.body
    ids = rendered(body['messages'], opens(body, call.options)) if 'messages' in body else toy.tokenise(body['prompt'])
    strings = [toy.piece(i) for i in ids] if body.get('return_token_strs') else None
    return Reply({'count': len(ids), 'max_model_len': 32_768, 'tokens': ids, 'token_strs': strings})


def detokenize(call: Call) -> Reply: return Reply({'prompt': toy.untokenise(call.body['tokens'])})


def triples(steps: list, body: dict, k: int = 0) -> list:
    "SGLang's [logprob, id, text] of tokens, or of the k candidates at each."
    def one(found, i): return [found.logprobs[i], i, toy.piece(i) if body.get('return_text_in_logprobs') else None]
    if not k: return [one(toy.dist(s.key), s.id) for s in steps]
    return [[one(toy.dist(s.key), i) for i in toy.dist(s.key).ranked[:k]] for s in steps]


def scored(ids: list, found: toy.Answer, body: dict, model: str) -> dict:
    "The log-probabilities among SGLang's facts about an answer."
    k, start, out = body.get('top_logprobs_num') or 0, body.get('logprob_start_len', -1), {}
    steps = [toy.Step(i, key) for i, key in zip(ids, toy.keys(model, ids))][start if start >= 0 else len(ids):]
    out['input_token_logprobs'] = triples(steps, body)
    if steps: out['input_token_logprobs'][0][0] = None
    out['output_token_logprobs'] = triples(found.steps, body)
    if not k: return out
    return out | {'input_top_logprobs': [None, *triples(steps[1:], body, k)] if steps else [],
                  'output_top_logprobs': triples(found.steps, body, k)}


def generate_one(ids: list, body: dict, call: Call) -> dict:
    "SGLang's answer to one prompt."
    sampling, model = body.get('sampling_params') or {}, call.options.model
    limit = sampling.get('max_new_tokens', 128)
    ask = Ask(model, ids, limit, **common({k: v for k, v in sampling.items() if k != 'n'}))
    found = answers(ask, call, limit)[0]
    end = {'type': 'stop', 'matched': found.matched}
    if found.reason == 'length' or not limit: end = {'type': 'length', 'length': limit}
    facts = {'id': identity('', ids, call.number), 'finish_reason': end, 'prompt_tokens': len(ids), 'cached_tokens': 0,
             'completion_tokens': len(found.steps)}
    if body.get('return_logprob'): facts |= scored(ids, found, body, model)
    return {'text': found.text, 'output_ids': [s.id for s in found.steps], 'meta_info': facts}


def generate(call: Call) -> Reply:
    "POST /generate of SGLang"
    body = call.body
    given = body.get('text') if body.get('text') is not None else body.get('input_ids')
    if given is None: refuse(400, 'Either text, input_ids or input_embeds should be provided.', call.options.flavour)
    many = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    rows = [toy.tokenise(g) if isinstance(g, str) else g for g in (given if many else [given])]
    for ids in rows: check_ids(ids, call.options.flavour)
    done = [generate_one(ids, body, call) for ids in rows]
    spent = sum(len(ids) + d['meta_info']['completion_tokens'] for ids, d in zip(rows, done))
    room = (body.get('sampling_params') or {}).get('max_new_tokens', 128)*len(rows)
    return Reply(done if many else done[0], tokens=spent, reserve=sum(map(len, rows)) + room)


ROUTES = {'vllm': {('POST', '/tokenize'): tokenize, ('POST', '/detokenize'): detokenize},
          'sglang': {('POST', '/generate'): generate}}
