"""A training step: `DistillTrainer` on cached targets against TRL's GKD, GOLD and SFT trainers and the plain `Trainer`.

The student is every third layer of SmolLM2-135M-Instruct, the teacher the whole of it; batches are 4 x 256 tokens of
real text, all taught. Each client trains in a process of its own, on two cores. GKD and GOLD hold the teacher in memory
and run it at each step; ours has its top 20, asked for before the clock starts. Where the seconds of a step are far
above its CPU seconds over two cores, something else was running: measure again.
    python tests/benchmarks/training.py [--json] [--dtype float32,bf16,default] [--rounds 2] [--peers-python PATH]
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH, LENGTH, TOP, WARM = 4, 256, 20, 2
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {'ours': 'llm_distill', 'ours_ckpt': 'llm_distill', 'ours_sft': 'llm_distill', 'trainer_ce': 'transformers',
            'trl_sft': 'trl', 'trl_gkd': 'trl', 'trl_gold': 'trl'}
# What a row sets; "default" sets nothing: TRL's trainers then take bf16 and gradient checkpointing, Trainer float32
DTYPES = {'float32': {'bf16': False, 'gradient_checkpointing': False},
          'bf16': {'bf16': True, 'gradient_checkpointing': False}, 'default': {}}
QUIET = {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'TRL_EXPERIMENTAL_SILENCE': '1',
         'TRANSFORMERS_VERBOSITY': 'error', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'WANDB_MODE': 'disabled'}
FLAGS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16')


def two_cores() -> None: # Before torch counts them
    if not hasattr(os, 'sched_setaffinity'): return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 2: os.sched_setaffinity(0, cores[:2])


# What all clients work on ---------------------------------------------------------------------------------------------
def text() -> str:
    folder = os.environ.get('LLMD_DATA')
    path = Path(folder)/'gsm8k_train_1000.jsonl' if folder else None
    if path and path.exists():
        rows = map(json.loads, path.read_text(encoding='utf-8').splitlines())
        return '\n\n'.join(f'{r["prompt"]}\n{r["reference"]}' for r in rows)
    return '\n\n'.join(p.read_text(encoding='utf-8') for p in sorted((ROOT/'llm_distill').glob('*.py')))


def gflops(dtype, device, n=2048) -> float: # The best of some matrix products
    import torch
    a, b, times = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype), []
    for _ in range(8):
        begun = now(device)
        a @ b
        times.append(now(device) - begun)
    return 2*n**3/min(times)/1e9


def prepare(folder, steps, device) -> None: # Student, tokens, the teacher's targets; says what the machine can do
    import numpy as np
    import torch
    from llm_distill.models import load_model, load_tokenizer, smollm2
    from llm_distill.student import prune
    place = smollm2()
    tokenizer, teacher = load_tokenizer(place), load_model(place, device, torch.float32)
    tokens = tokenizer(text())['input_ids'][:BATCH*LENGTH*(WARM + steps)]
    ids = torch.tensor(tokens, device=device).view(-1, LENGTH)
    with torch.inference_mode():
        tops = [teacher(x, use_cache=False).logits.log_softmax(-1).topk(TOP) for x in ids.split(BATCH)]
    # Row i describes token i, which position i - 1 predicts; nothing predicts the first
    shifted = [torch.cat(x).cpu().roll(1, 1) for x in zip(*tops)]
    np.savez(Path(folder)/'targets.npz', input_ids=ids.cpu(), top_logprobs=shifted[0], top_ids=shifted[1])
    student = prune(teacher, keep_every=3)
    student.save_pretrained(Path(folder)/'student')
    tokenizer.save_pretrained(Path(folder)/'student')
    size = sum(p.numel() for p in student.parameters())
    print(json.dumps({'teacher': str(place), 'flops': 6*size*BATCH*LENGTH, 'threads': torch.get_num_threads(),
                      'gflops_float32': gflops(torch.float32, device), 'gflops_bf16': gflops(torch.bfloat16, device)}))


# The clients, each one run in a process of its own: a trainer, ready to train -----------------------------------------
def load(place, device):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).to(device)
    for p in model.parameters(): p.sum()  # or pages of the file would count as memory of the first step
    return model


def load_tokenizer(place):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(place)
    if tokenizer.pad_token is None: tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def targets(job) -> list[dict]:
    import numpy as np
    data = np.load(Path(job['folder'])/'targets.npz')
    rows = []
    for tokens, ids, logprobs in zip(data['input_ids'], data['top_ids'], data['top_logprobs']):
        labels = np.where(np.arange(LENGTH) > 0, tokens, -100)
        rows.append({'input_ids': tokens, 'labels': labels, 'top_ids': ids, 'top_logprobs': logprobs,
                     'soft': labels != -100, 'weight': np.float32(1)})
    return rows


def text_only(row) -> dict: # As `make_examples` writes answers without logprobs
    import numpy as np
    ids, logprobs = np.zeros_like(row['top_ids']), np.full_like(row['top_logprobs'], -np.inf)
    ids[:, 0], logprobs[:, 0] = row['input_ids'], 0
    return row | {'top_ids': ids, 'top_logprobs': logprobs, 'soft': np.zeros(LENGTH, bool)}


def settings(job) -> dict:
    return {'output_dir': job['folder'] + '/out', 'per_device_train_batch_size': BATCH, 'report_to': 'none',
            'use_cpu': job['device'] == 'cpu', 'max_steps': WARM + job['steps'], 'save_strategy': 'no',
            'disable_tqdm': True, **DTYPES[job['dtype']]}


def make_ours(job, student, rows=None, **config):
    from llm_distill.train import DistillConfig, DistillTrainer
    more = {'precision': job['dtype']} if job['dtype'] in ('float32', 'bf16') else {}
    args = DistillConfig(**settings(job) | more | config)
    return DistillTrainer(load(student, job['device']), args, rows or targets(job),
                          load_tokenizer(student))


def make_ours_ckpt(job, student): # Activations are computed a second time in place of being kept
    return make_ours(job, student, gradient_checkpointing=True)


def make_ours_sft(job, student):
    return make_ours(job, student, [*map(text_only, targets(job))], alpha=0, beta=1)


def make_trainer_ce(job, student):
    from transformers import Trainer, TrainingArguments
    rows = [{k: r[k] for k in ('input_ids', 'labels')} for r in targets(job)]
    return Trainer(load(student, job['device']), TrainingArguments(**settings(job)), train_dataset=rows)


def as_dataset(job, more=None):
    from datasets import Dataset
    rows = [{'input_ids': r['input_ids'].tolist(), **(more or {})} for r in targets(job)]
    return Dataset.from_list(rows)


def make_trl_sft(job, student):
    from trl import SFTConfig, SFTTrainer
    return SFTTrainer(load(student, job['device']), SFTConfig(**settings(job)), train_dataset=as_dataset(job),
                      processing_class=load_tokenizer(student))


def off_policy(trainer, config, job, student):
    teacher = load(job['teacher'], job['device']).eval()
    # The first token stands for the prompt: nothing predicts it, so as many are taught as elsewhere
    rows = as_dataset(job, {'prompt': '.', 'completion_mask': [0] + [1]*(LENGTH - 1)})
    return trainer(load(student, job['device']), teacher, config(lmbda=0, **settings(job)), train_dataset=rows,
                   processing_class=load_tokenizer(student))


def make_trl_gkd(job, student):
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    return off_policy(GKDTrainer, GKDConfig, job, student)


def make_trl_gold(job, student):
    from trl.experimental.gold import GOLDConfig, GOLDTrainer
    return off_policy(GOLDTrainer, GOLDConfig, job, student)


def now(device) -> float:
    if device != 'cpu':
        import torch
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device, peak=False) -> float: # In use by this process, or the most since `forget_peak`, in MiB
    if device != 'cpu':
        import torch
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())/2**20
    with contextlib.suppress(OSError):
        status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
        return int(status['VmHWM' if peak else 'VmRSS'].split()[0])/2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 2**10)


def forget_peak(device) -> None: # And gives back what loading left behind
    gc.collect()
    if device != 'cpu':
        import torch
        return torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError, AttributeError): ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError): Path('/proc/self/clear_refs').write_text('5')


def state_mb(trainer) -> tuple[float, float]: # Gradients, and the optimiser's state
    import torch
    optimizer = getattr(trainer.optimizer, 'optimizer', trainer.optimizer)
    grads = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return grads/2**20, sum(x.nbytes for x in states)/2**20


def run_client(name, job) -> None:
    two_cores()
    device, ends = job['device'], []
    with contextlib.redirect_stdout(sys.stderr):
        from transformers import TrainerCallback
        class Clock(TrainerCallback):
            def on_step_end(self, *_, **__): ends.append((now(device), time.process_time()))
        trainer = globals()[f'make_{name}'](job, job['folder'] + '/student')
        trainer.add_callback(Clock())
        weight = next(p for p in trainer.model.parameters() if p.ndim > 1 and p.requires_grad)
        before = weight.detach()[:64].clone()
        forget_peak(device)
        base = memory(device)
        loss = trainer.train().training_loss
        peak = memory(device, peak=True)
    if not math.isfinite(loss): raise SystemExit(f'the loss is {loss}')
    if before.equal(weight.detach()[:64].to(before)): raise SystemExit('no weight has changed')
    if len(ends) != WARM + job['steps']: raise SystemExit(f'{len(ends)} steps')
    seconds, cpu = ((last - first)/job['steps'] for first, last in zip(ends[WARM - 1], ends[-1]))
    grads, state = state_mb(trainer)
    args = trainer.args
    print(json.dumps({'tokens_per_s': BATCH*LENGTH/seconds, 'seconds_per_step': seconds, 'cpu_s_per_step': cpu,
                      'load': os.getloadavg()[0], 'loss': loss, 'base_mb': base,
                      'above_model_mb': peak - base, 'working_mb': peak - base - grads - state,
                      'grads_and_optimizer_mb': grads + state, 'bf16': bool(args.bf16),
                      'checkpointing': bool(args.gradient_checkpointing)}), flush=True)


# The benchmark --------------------------------------------------------------------------------------------------------
PROBE = '''
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
'''


def installed(python) -> dict:
    names = [*set(PACKAGES.values()), 'torch', 'accelerate']
    done = subprocess.run([python, '-c', PROBE, *names], capture_output=True, text=True, check=True)
    return {k: v for k, v in json.loads(done.stdout).items() if v}


def child(python, limit, *args) -> dict|str:
    try: done = subprocess.run([python, __file__, *map(str, args)], env=os.environ | QUIET, text=True, timeout=limit,
                               capture_output=True)
    except subprocess.TimeoutExpired: return f'failed: not done after {limit} s'
    if done.returncode:
        return 'failed: ' + (done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1][:160]
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    cpu, flags = platform.processor() or platform.machine(), []
    with contextlib.suppress(OSError):
        lines = dict(line.split(':', 1) for line in Path('/proc/cpuinfo').read_text().splitlines() if ':' in line)
        named = {k.strip(): v.strip() for k, v in lines.items()}
        cpu, flags = named.get('model name', cpu), named.get('flags', '').split()
    return {'cpu': cpu, 'flags': [f for f in FLAGS if f in flags], 'cores': os.cpu_count(), 'load': os.getloadavg()[0]}


def best(runs) -> dict|str: # The fastest, with the least memory of all; a failure only where all have failed
    good = [r for r in runs if isinstance(r, dict)]
    if not good: return runs[0]
    least = {k: min(r[k] for r in good) for k in ('above_model_mb', 'working_mb')}
    return max(good, key=lambda r: r['tokens_per_s']) | least | {'rounds': [r['tokens_per_s'] for r in good]}


def ratio(results, figure, a, b):
    a, b = results.get(a), results.get(b)
    return a[figure]/b[figure] if isinstance(a, dict) and isinstance(b, dict) else None


def ratios(results) -> dict:
    speed = functools.partial(ratio, results, 'tokens_per_s')
    found = {f'vs_{peer}': speed('ours', peer) for peer in PACKAGES if not peer.startswith('ours')}
    return {**found, 'kd_vs_own_sft': ratio(results, 'seconds_per_step', 'ours', 'ours_sft'),
            'memory_vs_trl_gkd': ratio(results, 'above_model_mb', 'ours', 'trl_gkd'),
            'working_memory_vs_trl_gkd': ratio(results, 'working_mb', 'ours', 'trl_gkd'),
            'ckpt_working_memory_vs_trl_gkd': ratio(results, 'working_mb', 'ours_ckpt', 'trl_gkd'),
            'ckpt_speed_vs_ours': ratio(results, 'tokens_per_s', 'ours_ckpt', 'ours')}


def rounded(found):
    if isinstance(found, dict): return {k: rounded(v) for k, v in found.items()}
    if isinstance(found, list): return [*map(rounded, found)]
    return round(found, 4) if isinstance(found, float) else found


def show(found) -> None:
    m = found['machine']
    print(f'{m["cpu"]}: {" ".join(m["flags"])}; {m["threads"]} threads; matrix products: '
          f'{m["gflops_float32"]:.0f} GFLOP/s in float32, {m["gflops_bf16"]:.0f} in bf16; load {m["load"]:.1f}')
    print('; '.join(f'{k} {v}' for k, v in found['versions'].items()))
    for dtype, part in found['results'].items():
        print(f'\n{dtype:10} {"tokens/s":>9} {"of each round":>20} {"s/step":>7} {"CPU s":>6} {"above the model":>16} '
              f'{"less grads, optimiser":>22}  set')
        for name, r in part['clients'].items():
            if isinstance(r, str): print(f'{name:10} {r}'); continue
            kind = ' + '.join(['bf16' if r['bf16'] else 'float32'] + ['checkpointing']*r['checkpointing'])
            rounds = ' '.join(f'{x:.0f}' for x in r['rounds'])
            print(f'{name:10} {r["tokens_per_s"]:9.0f} {rounds:>20} {r["seconds_per_step"]:7.2f} '
                  f'{r["cpu_s_per_step"]:6.2f} {r["above_model_mb"]:12.0f} MiB {r["working_mb"]:18.0f} MiB  {kind}')
        print('; '.join(f'{k} {v:.3g}' for k, v in part['ratios'].items() if v))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--json', action='store_true', help='print JSON alone')
    parser.add_argument('--dtype', default='default,float32,bf16', help='the first gives the figures at the '
                        'top of the JSON; "default" leaves precision and checkpointing to each trainer')
    parser.add_argument('--steps', type=int, default=5, help=f'that count, after {WARM} that do not')
    parser.add_argument('--rounds', type=int, default=2, help='of all clients in turns; the best of each counts')
    parser.add_argument('--device', default='cpu', help='"cpu" (on two cores) or "cuda"')
    parser.add_argument('--peers-python', metavar='PATH', default=sys.executable, help='an interpreter that has TRL')
    parser.add_argument('--clients', default=','.join(PACKAGES), help='which to run')
    parser.add_argument('--limit', type=int, default=600, help='seconds a client may take')
    for hidden in ('--prepare', '--client'): parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for given, known in ((args.dtype, DTYPES), (args.clients, PACKAGES)):
        if wrong := set(given.split(',')) - set(known): parser.error(f'{wrong.pop()} is none of {", ".join(known)}')
    return args


def main() -> None:
    args = parse()
    if args.prepare: two_cores(); return prepare(*json.loads(args.prepare))
    if args.client: return run_client(*json.loads(args.client))
    theirs = installed(args.peers_python)
    versions = installed(sys.executable) | {'trl': theirs.get('trl', 'not installed')}
    if differ := [k for k in ('torch', 'transformers') if k in theirs and theirs[k] != versions[k]]:
        raise SystemExit(f'--peers-python has another version of {" and ".join(differ)}')
    clients = {c: args.peers_python if PACKAGES[c] == 'trl' else sys.executable for c in args.clients.split(',')}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        can = child(sys.executable, args.limit, '--prepare', json.dumps([folder, args.steps, args.device]))
        if isinstance(can, str): raise SystemExit(can)
        teacher, flops = can.pop('teacher'), can.pop('flops')
        for dtype in args.dtype.split(','):
            job = {'folder': folder, 'teacher': teacher, 'dtype': dtype, 'device': args.device, 'steps': args.steps}
            runs = {c: [] for c in clients}
            for _ in range(args.rounds):
                for name, python in clients.items():
                    runs[name].append(child(python, args.limit, '--client', json.dumps([name, job])))
                    print(f'{dtype} {name}: {runs[name][-1]}', file=sys.stderr)
            found = {name: best(r) for name, r in runs.items()}
            for r in found.values():
                if isinstance(r, dict): r['gflops'] = flops/r['seconds_per_step']/1e9
            results[dtype] = {'clients': found, 'ratios': ratios(found)}
    first = next(iter(results.values()))
    ours = first['clients'].get('ours')
    found = rounded({**first['ratios'], 'tokens_per_s': ours['tokens_per_s'] if isinstance(ours, dict) else None,
                     'machine': {**machine(), **can}, 'versions': versions, 'results': results})
    if args.json: print(json.dumps(found))
    else: show(found)
    failed = [r for part in results.values() for name, r in part['clients'].items()
              if name.startswith('ours') and isinstance(r, str)]
    if failed: raise SystemExit(failed[0])


if __name__ == '__main__': main()
