"""Decoding on the CPU: the C++ backend beside llama.cpp, vLLM, the reference backend and dense transformers.

    python tools/bench_cpu.py [MODEL] [--gguf FILE --llama-python PYTHON] [--vllm-python PYTHON]

MODEL is the one of `make demo`; FILE the GGUF file that it was made from; the interpreters have llama-cpp-python's
default build and vLLM's build for CPUs, which reads MODEL by kernels of its own. Prints a table and writes
benchmarks/cpu.json. Variants take turns in one run, so that a slow moment of the machine falls on all of them; figures
are medians.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from bench_reference import commit, dense_twin, read_bandwidth, table
from rich.console import Console
from rich.progress import track

import awq_rt
from awq_rt import registry

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 64, 64, 512
FIRST_TOKEN_RUNS = 5
OURS, LLAMA_CPP, VLLM_CPU = "awq_rt cpu, float32", "llama.cpp, Q4_1", "vLLM, AWQ, bfloat16"
LLAMA = """
import sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, n_batch=512, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]),
              verbose=False)
prompt, new = int(sys.argv[3]), int(sys.argv[4])
for line in sys.stdin:
    model.reset()
    tokens = [100 + i for i in range(int(line))]
    start = time.perf_counter()
    model.eval(tokens)
    seconds = time.perf_counter() - start
    if int(line) == prompt:
        start = time.perf_counter()
        for _ in range(new):
            model.eval([model.sample(temp=0.0)])
        seconds = time.perf_counter() - start
    print(seconds, flush=True)
"""
"""Answers each number of tokens with the seconds of reading them, or for the short prompt, of the tokens after it."""

VLLM = """
import os, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what it says goes to standard error
os.environ["VLLM_PLUGINS"] = ""  # awq_rt's may be installed there
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="bfloat16", max_model_len=1024, max_num_seqs=1, enable_prefix_caching=False)
prompt, new = int(sys.argv[3]), int(sys.argv[4])
def seconds(count, new):
    start = time.perf_counter()
    options = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    model.generate({"prompt_token_ids": [100 + i for i in range(count)]}, options, use_tqdm=False)
    return time.perf_counter() - start
for line in sys.stdin:
    short = int(line) == prompt
    answer = seconds(prompt, new + 1) - seconds(prompt, 1) if short else seconds(int(line), 1)
    print(answer, file=answers, flush=True)
"""
"""The same. What follows the first token is the time of more tokens less that of one."""

MEMORY = """
import sys
import torch
import awq_rt, awq_rt.fusion, awq_rt.generation, awq_rt.models.quantizer
from awq_rt import memory, registry
from awq_rt.models.architecture import architecture
from transformers import AutoTokenizer, GenerationConfig
def megabytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1e3
checkpoint = awq_rt.open_checkpoint(sys.argv[1])
stored = checkpoint.nbytes / 1e6
architecture(checkpoint, False)
registry.backends()
memory.trim()
imports = megabytes("VmRSS")
model = awq_rt.load(checkpoint, device="cpu")
del checkpoint
model.generate(torch.arange(100, 164)[None], max_new_tokens=64, do_sample=False)
print(imports, stored, megabytes("VmRSS") - imports - stored, megabytes("VmHWM") - imports - stored)
"""
"""What a model that has generated holds, beside what its imports do and what the checkpoint's tensors take as they are
stored: tokenizer, cache, Python's own objects, and whatever is held twice or wider than it is stored."""

Turn = Callable[[int], float]
"""The seconds of one turn: of reading PREFILL_TOKENS, or of the NEW_TOKENS after a prompt of PROMPT_TOKENS."""


@click.command()
@click.argument("model", default=str(ROOT / "demo" / "smollm2-135m-awq"))
@click.option("--gguf", type=click.Path(exists=True), help="What MODEL was made from, for llama.cpp.")
@click.option("--llama-python", default=sys.executable, show_default=True, help="An interpreter with llama_cpp.")
@click.option("--vllm-python", help="An interpreter with vLLM's build for CPUs.")
@click.option("--only", multiple=True, help="Leave out variants whose name begins with none of these.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "cpu.json")
def main(
    model: str,
    gguf: str | None,
    llama_python: str,
    vllm_python: str | None,
    only: tuple[str, ...],
    rounds: int,
    out: Path,
) -> None:
    """Measure, print and record."""
    console, threads = Console(), torch.get_num_threads()
    result: dict[str, Any] = {
        "device": registry.get("cpu").probe().devices[0].name,
        "kernels": registry.get("cpu").probe().devices[0].driver,
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": " ".join(
            ["python tools/bench_cpu.py", f"--rounds {rounds}"]
            + ["--gguf FILE --llama-python PYTHON"] * (gguf is not None)
            + ["--vllm-python PYTHON"] * (vllm_python is not None)
        ),
        "model": Path(model).name,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "read_gbps": read_bandwidth(),
        "first_token": first_token(model),
        "memory": memory_over(model),
    }
    wanted = [name for name in LOADS if not only or name.startswith(only)]
    turns = {name: turn_of(LOADS[name](model)) for name in wanted}
    if gguf is not None:
        turns[LLAMA_CPP] = peer(LLAMA, llama_python, gguf, threads)
    if vllm_python is not None:
        turns[VLLM_CPU] = peer(VLLM, vllm_python, model, threads)
    result["variants"] = rows = measured(turns, rounds)
    by_name = {row["variant"]: row for row in rows}
    result["over"] = {
        name: {key: round(by_name[OURS][key] / by_name[name][key], 2) for key in ("decode_tps", "prefill_tps")}
        for name in turns
        if name != OURS and OURS in turns
    }
    console.print(table("batch 1", rows))
    console.print({key: result[key] for key in ("first_token", "memory", "over")})
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {out}")


def ours(path: str, dtype: torch.dtype = torch.float32) -> Any:
    return awq_rt.load(path, device="cpu", dtype=dtype, backend="cpu")


def ours_int8(path: str) -> Any:
    os.environ["AWQ_RT_CPU_INT8"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it says what the name of the variant says
        model = ours(path)
    del os.environ["AWQ_RT_CPU_INT8"]
    return model


def reference(path: str, **options: Any) -> Any:
    return awq_rt.load(path, device="cpu", backend="reference", **options)


def dense(path: str, dtype: torch.dtype) -> Any:
    return dense_twin(reference(path, dtype=dtype, fuse=False), dtype)


LOADS: dict[str, Callable[[str], Any]] = {
    OURS: ours,
    "awq_rt cpu, bfloat16": lambda path: ours(path, torch.bfloat16),
    "awq_rt cpu, float32, 8-bit activations": ours_int8,
    "awq_rt reference, float32": lambda path: reference(path, dtype=torch.float32),
    "dense transformers, float32": lambda path: dense(path, torch.float32),
    "dense transformers, bfloat16": lambda path: dense(path, torch.bfloat16),
}
"""Every variant of the model that runs in this process."""


def turn_of(model: Any) -> Turn:
    """Turns of a transformers model. What follows the first token is the time of more tokens less that of one."""

    model.generation_config.eos_token_id = None  # every turn makes as many tokens

    def seconds(count: int, new: int) -> float:
        tokens = torch.arange(100, 100 + count)[None]
        start = time.perf_counter()
        model.generate(tokens, max_new_tokens=new, do_sample=False)
        return time.perf_counter() - start

    def turn(count: int) -> float:
        if count == PREFILL_TOKENS:
            return seconds(count, 1)
        return seconds(count, NEW_TOKENS + 1) - seconds(count, 1)

    return turn


def peer(script: str, python: str, model: str, threads: int) -> Turn:
    """Turns of another engine, in a process of its own that sleeps between them."""
    sizes = (str(threads), str(PROMPT_TOKENS), str(NEW_TOKENS))
    process = subprocess.Popen(
        [python, "-c", script, model, *sizes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    ask, answers = process.stdin, process.stdout

    def turn(count: int) -> float:
        ask.write(f"{count}\n")
        ask.flush()
        return float(answers.readline())

    return turn


def measured(turns: dict[str, Turn], rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of every variant. The first round warms up and does not count."""
    decode: dict[str, list[float]] = {name: [] for name in turns}
    prefill: dict[str, list[float]] = {name: [] for name in turns}
    for _ in track(range(rounds + 1), description="decoding"):
        for name, turn in turns.items():
            prefill[name].append(PREFILL_TOKENS / turn(PREFILL_TOKENS))
            decode[name].append(NEW_TOKENS / turn(PROMPT_TOKENS))
    return [
        {
            "variant": name,
            "decode_tps": round(statistics.median(decode[name][1:]), 1),
            "decode_tps_range": [round(min(decode[name][1:]), 1), round(max(decode[name][1:]), 1)],
            "prefill_tps": round(statistics.median(prefill[name][1:]), 1),
            "prefill_tps_range": [round(min(prefill[name][1:]), 1), round(max(prefill[name][1:]), 1)],
        }
        for name in turns
    ]


def first_token(model: str) -> dict[str, Any]:
    """Seconds from the start of `awq-rt generate` to the first byte of its answer, and to its end after one token."""
    command = [sys.executable, "-c", "from awq_rt.cli import main; main()", "generate", model, "Hello"]
    firsts, wholes = [], []
    for _ in range(FIRST_TOKEN_RUNS + 1):  # the first finds no file in the system's cache
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--max-new-tokens", "1"], stdout=subprocess.PIPE, bufsize=0)
        assert process.stdout is not None
        process.stdout.read(1)
        firsts.append(time.perf_counter() - start)
        process.communicate()
        wholes.append(time.perf_counter() - start)
    firsts, wholes = firsts[1:], wholes[1:]
    return {
        "first_byte_s": round(statistics.median(firsts), 2),
        "first_byte_s_range": [round(min(firsts), 2), round(max(firsts), 2)],
        "process_s": round(statistics.median(wholes), 2),
    }


def memory_over(model: str) -> dict[str, int]:
    """Megabytes of a process: of its imports, of the checkpoint's tensors as stored, held and at most beyond both."""
    done = subprocess.run([sys.executable, "-c", MEMORY, model], check=True, text=True, stdout=subprocess.PIPE)
    keys = ("imports_mb", "stored_mb", "over_mb", "peak_over_mb")
    return {key: round(float(value)) for key, value in zip(keys, done.stdout.split()[-4:], strict=True)}


if __name__ == "__main__":
    main()
