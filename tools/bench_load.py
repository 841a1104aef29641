"""Peak host memory while a checkpoint of about 2 GB loads, over the checkpoint's size plus one layer.

    python tools/bench_load.py

Generates the checkpoint (random Llama shape, gemm layout, two shards) in a temporary folder, loads it in a process of
its own for each dtype, and writes benchmarks/load.json. The peak is VmHWM: every resident page, mapped files included,
less what the process held after its imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from bench_reference import ROOT, commit
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig

from awq_rt import devices, open_checkpoint
from awq_rt.checkpoint import write_checkpoint
from awq_rt.conversion import describe

GROUP_SIZE = 128
MEASURE = """
import sys, time
import awq_rt, torch, transformers
from awq_rt.models import quantizer
from awq_rt import registry
from transformers import LlamaForCausalLM

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

registry.plugins()
before = status("VmRSS")
start = time.perf_counter()
model = awq_rt.load(sys.argv[1], device="cpu", dtype=sys.argv[2])
print(status("VmHWM") - before, status("VmRSS") - before, round(time.perf_counter() - start, 2))
"""


@click.command()
@click.option("--layers", default=15, show_default=True, help="15 make 2 GB.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "load.json")
def main(layers: int, out: Path) -> None:
    """Measure, print and record."""
    console = Console()
    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False)  # 4096, 11008, 32 heads, 32000 words
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        written = config.to_dict() | {"quantization_config": describe("gemm", GROUP_SIZE, dense=[])}
        write_checkpoint(path, tensors(config), written, max_shard_bytes=1 << 30)
        checkpoint = open_checkpoint(path)
        layer_bytes = sum(linear.nbytes for name, linear in checkpoint.linears.items() if ".layers.0." in name)
        rows = [measured(path, dtype, checkpoint.nbytes, layer_bytes) for dtype in ("float16", "bfloat16", "float32")]
        size = checkpoint.nbytes
    result = {
        "device": devices.cpu().devices[0].name,
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": f"python tools/bench_load.py --layers {layers}",
        "checkpoint_bytes": size,
        "layer_bytes": layer_bytes,
        "rows": rows,
    }
    console.print_json(data=result)
    out.write_text(json.dumps(result, indent=1) + "\n")


def tensors(config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Random packed linears and dense tensors, as AutoAWQ names and shapes them."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (hidden, ffn), "mlp.up_proj": (hidden, ffn), "mlp.down_proj": (ffn, hidden)}
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).to(torch.int32)

    for layer in range(config.num_hidden_layers):
        for name, (k, n) in shapes.items():
            prefix = f"model.layers.{layer}.{name}"
            yield f"{prefix}.qweight", words(k, n // 8)
            yield f"{prefix}.qzeros", words(k // GROUP_SIZE, n // 8)
            yield f"{prefix}.scales", (torch.rand(k // GROUP_SIZE, n, generator=generator) * 0.01 + 1e-3).half()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", torch.ones(hidden, dtype=torch.float16)
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.float16)
    for name in ("model.embed_tokens", "lm_head"):
        yield f"{name}.weight", torch.randn(config.vocab_size, hidden, generator=generator).half()


def measured(path: Path, dtype: str, checkpoint_bytes: int, layer_bytes: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), dtype], check=True, text=True, stdout=subprocess.PIPE, cwd=ROOT
    )
    peak, resident, load_s = done.stdout.split()[-3:]
    return {
        "dtype": dtype,
        "peak_bytes": int(peak),
        "resident_bytes": int(resident),
        "peak_less_layer_over_checkpoint": round((int(peak) - layer_bytes) / checkpoint_bytes, 3),
        "load_s": float(load_s),
    }


if __name__ == "__main__":
    main()
