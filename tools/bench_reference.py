"""Decoding on the CPU: the reference backend beside the same model dense in transformers, in one run.

    python tools/bench_reference.py [MODEL]        (default: the model of `make demo`)

Prints a table and writes benchmarks/reference-cpu.json. Every variant decodes the same prompt greedily, in turns, so
that a slow moment of the machine falls on all of them. The floor is one pass over the weights at the read bandwidth
measured in the same run.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import awq_rt
from awq_rt import devices
from awq_rt.linear import AwqLinear
from awq_rt.testing import excess, hurtful_cases, hurtful_weight
from awq_rt.weights import AwqWeight

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS, NEW_TOKENS = 64, 64
SHAPES = ((576, 576, 64), (576, 1536, 64), (1536, 576, 64), (4096, 4096, 128), (4096, 11008, 128))
ROWS = (1, 4, 16, 128)


@click.command()
@click.argument("model", default=str(ROOT / "demo" / "smollm2-135m-awq"))
@click.option("--rounds", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "reference-cpu.json")
def main(model: str, rounds: int, out: Path) -> None:
    """Measure, print and record."""
    console = Console()
    decode = decoding(model, rounds)
    linears = [row for shape in SHAPES for row in linear_rows(*shape)]
    result = {
        "device": devices.cpu().devices[0].name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": f"python tools/bench_reference.py --rounds {rounds}",
        "model": Path(model).name,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "read_gbps": read_bandwidth(),
        "decode": decode,
        "linears": linears,
        "torch_int4_error_over_bound": torch_int4_errors(),
    }
    console.print(table("decoding, batch 1", decode))
    console.print(table("one linear, microseconds", linears))
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {out}")


def decoding(path: str, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of every variant, measured in turns."""
    variants: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        variants[f"awq_rt, {name}"] = awq_rt.load(path, device="cpu", dtype=dtype)
        variants[f"dense transformers, {name}"] = dense_twin(awq_rt.load(path, device="cpu", dtype=dtype), dtype)
    tokens = torch.randint(10, 1000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    prefill: dict[str, list[float]] = {name: [] for name in variants}
    speed: dict[str, list[float]] = {name: [] for name in variants}
    for _ in track(range(rounds + 1), description="decoding"):
        for name, model in variants.items():
            first = seconds(lambda m=model: m.generate(tokens, max_new_tokens=1, do_sample=False))
            options = {"max_new_tokens": NEW_TOKENS + 1, "min_new_tokens": NEW_TOKENS + 1, "do_sample": False}
            total = seconds(lambda m=model, o=options: m.generate(tokens, **o))
            prefill[name].append(PROMPT_TOKENS / first)
            speed[name].append(NEW_TOKENS / (total - first))
    return [
        {
            "variant": name,
            "decode_tps": round(statistics.median(speed[name][1:]), 1),
            "decode_tps_range": [round(min(speed[name][1:]), 1), round(max(speed[name][1:]), 1)],
            "prefill_tps": round(statistics.median(prefill[name][1:]), 1),
            "weights_mb": round(sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e6, 1),
        }
        for name, model in variants.items()
    ]


def dense_twin(model: Any, dtype: torch.dtype) -> Any:
    """The same model with every packed linear replaced by a dense one: what transformers runs without awq_rt."""
    for name, packed in [(n, m) for n, m in model.named_modules() if isinstance(m, AwqLinear)]:
        weight = packed.weight_canonical()
        linear = nn.Linear(weight.in_features, weight.out_features, bias=weight.bias is not None, dtype=dtype)
        linear.weight = nn.Parameter(weight.dequantize().T.contiguous().to(dtype), requires_grad=False)
        if weight.bias is not None:
            linear.bias = nn.Parameter(weight.bias.to(dtype), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model


def linear_rows(in_features: int, out_features: int, group_size: int) -> list[dict[str, Any]]:
    """One linear: ours, dense, and torch's own CPU int4 matmul with its largest error over the derived bound."""
    weight = hurtful_weight("random", in_features, out_features, group_size)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        ours = AwqLinear(in_features, out_features, group_size)
        ours.bind(weight, dtype, "cpu")
        dense = weight.dequantize().T.contiguous().to(dtype)
        theirs = torch_int4(weight, dtype)
        for count in ROWS:
            x = torch.randn(count, in_features, generator=torch.Generator().manual_seed(count)).to(dtype)
            calls: dict[str, Callable[[], Any]] = {
                "awq_rt": lambda x=x, f=ours: f(x),
                "dense": lambda x=x, w=dense: x @ w.T,
                "torch_int4": lambda x=x, f=theirs: f(x),
            }
            row: dict[str, Any] = {"k": in_features, "n": out_features, "group_size": group_size, "m": count}
            row["dtype"] = str(dtype).removeprefix("torch.")
            with torch.inference_mode():
                row |= {f"{name}_us": round(1e6 * median_seconds(call), 1) for name, call in calls.items()}
                for name in ("awq_rt", "torch_int4"):
                    row[f"{name}_error_over_bound"] = round(excess(calls[name](), x, weight), 3)
            rows.append(row)
    return rows


def torch_int4(weight: AwqWeight, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """torch's own CPU int4 matmul with `weight`: `(code - 8) * scale + offset`, both in the activations' dtype."""
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.T.contiguous().int(), 1)
    scales = weight.scales.float()
    pairs = torch.stack((scales, (8 - weight.zeros.float()) * scales), -1).to(dtype).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, weight.group_size, pairs)


def torch_int4_errors() -> dict[str, float]:
    """The largest error of torch's int4 matmul in bfloat16 over the derived bound, by kind of weight."""
    worst: dict[str, float] = {}
    for case in hurtful_cases(torch.bfloat16):
        weight, kind = case.weight, case.name.split(",")[0]
        if weight.out_features % 16 == 0 and weight.group_size in (32, 64, 128, 256) and weight.bias is None:
            y = torch_int4(weight, torch.bfloat16)(case.x)
            worst[kind] = max(worst.get(kind, 0.0), round(excess(y, case.x, weight), 2))
    return worst


def read_bandwidth() -> float:
    """GB/s of summing 1 GB of float32."""
    data = torch.ones(256 << 20, dtype=torch.float32)
    return round(data.nbytes / median_seconds(data.sum, 7) / 1e9, 2)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(call: Callable[[], Any], repeats: int = 15) -> float:
    call()
    return statistics.median(seconds(call) for _ in range(repeats))


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    drawn = Table(title=title)
    for name in rows[0]:
        drawn.add_column(name)
    for row in rows:
        drawn.add_row(*(str(value) for value in row.values()))
    return drawn


if __name__ == "__main__":
    main()
