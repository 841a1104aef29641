"""Time the fused operators, and a whole layer's chain of kernels; needs an NVIDIA GPU.

    python tools/bench_ops.py --json benchmarks/ops-h100.json

Each figure is the median of CUDA-graph replays of a chain of calls, over tensors that together exceed the L2 cache
where they would not lie in it in a model. Bytes are what an operator must read and write; the floor is their time at
the read bandwidth measured in the same run. A layer is its four linears with random weights of their own, rotated so
that they come from device memory, and between them the operators, or the definitions of torch with --torch.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_kernels import commit, graph_us, random_weight, read_bandwidth
from torch import Tensor

from awq_rt import ops
from awq_rt.backend import Packed
from awq_rt.ops import AttentionSpec, AttentionTensors, Ops
from awq_rt.testing.conformance import spec_of
from awq_rt_cuda import backend
from awq_rt_cuda.fused import OPS

ROTATED_BYTES = 200e6
MOST_CACHE_BYTES = 8e9
DTYPE = torch.float16


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a decoder."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, self.head_dim)

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the four, in order."""
        wide = self.heads * self.head_dim
        return (
            (self.hidden, self.qkv),
            (wide, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        )


MODELS = {"7b": Model(4096, 11008, 32, 32, 32000), "8b": Model(4096, 14336, 32, 8, 128256)}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, device="cuda")


def tables(positions: int, half: int) -> AttentionTensors:
    angles = torch.rand(positions, half, device="cuda") * 6
    return AttentionTensors(angles.cos(), angles.sin())


def host_us(call: Callable[[], object], count: int = 300) -> float:
    """What the host spends on a call outside a graph; the device keeps up, so nothing is waited for."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


def chain_us(calls: list[Callable[[], object]]) -> float:
    """The time of one of `calls`, one after the other."""
    torch.cuda.synchronize()  # their inputs are made on another stream than they are timed on
    return graph_us(lambda i: calls[i](), len(calls))


def caches_of(model: Model, rows: int, slots: int) -> list[tuple[Tensor, Tensor]]:
    """As many as exceed the L2 cache."""
    shape = (rows, model.kv_heads, slots, model.head_dim)
    size = 4 * rows * model.kv_heads * slots * model.head_dim
    return [(random(*shape), random(*shape)) for _ in range(max(8, min(200, int(ROTATED_BYTES / size) + 1)))]


def elementwise(model: Model, name: str, read_tbps: float, row_counts: list[int]) -> list[dict[str, object]]:
    """Norms, activation and rotation at each number of rows."""
    weight, tensors, spec = torch.ones(model.hidden, device="cuda"), tables(8192, model.head_dim // 2), model.spec
    found = []
    for rows in row_counts:
        x, residual = random(rows, model.hidden), random(rows, model.hidden)
        gate_up = random(rows, 2 * model.intermediate)
        count = max(8, min(64, int(ROTATED_BYTES / (6 * rows * model.intermediate)) + 1))
        inputs = [gate_up.clone() for _ in range(count)] if rows > 64 else [gate_up] * 64
        wide = [(x.clone(), residual.clone()) for _ in range(count)] if rows > 64 else [(x, residual)] * 64
        qkv = random(1, rows, model.qkv)
        first = torch.zeros(1, dtype=torch.int32, device="cuda")
        cache = random(2, 1, model.kv_heads, rows, model.head_dim)
        timed = {
            "rms_norm": ([functools.partial(OPS["rms_norm"], a, weight, 1e-5) for a, _ in wide], 4 * x.numel()),
            "add_rms_norm": (
                [functools.partial(OPS["add_rms_norm"], a, b, weight, 1e-5) for a, b in wide],
                8 * x.numel(),
            ),
            "gated_activation": (
                [functools.partial(OPS["gated_activation"], g, "silu") for g in inputs],
                3 * gate_up.numel(),
            ),
            "rope_append": (
                [functools.partial(OPS["rope_append"], qkv, first, cache[0], cache[1], spec, tensors)] * 16,
                4 * qkv.numel(),
            ),
        }
        for operator, (calls, size) in timed.items():
            found.append(report(name, operator, rows, None, chain_us(calls), size, read_tbps))
            if rows == 1:
                found[-1]["host_us"] = round(host_us(calls[0]), 1)
    return found


def attention(
    model: Model, name: str, read_tbps: float, row_counts: list[int], contexts: list[int]
) -> list[dict[str, object]]:
    """Decode attention at each batch and context."""
    found = []
    for rows in row_counts:
        for context in contexts:
            caches = caches_of(model, rows, context + 32)
            tensors, qkv = tables(context + 32, model.head_dim // 2), random(rows, model.qkv)
            at = torch.full((rows,), context - 1, dtype=torch.int32, device="cuda")
            calls = [functools.partial(OPS["decode_attention"], qkv, at, k, v, model.spec, tensors) for k, v in caches]
            size = 4 * rows * model.kv_heads * context * model.head_dim
            found.append(report(name, "decode_attention", rows, context, chain_us(calls), size, read_tbps))
            if rows == 1:
                found[-1]["host_us"] = round(host_us(calls[0]), 1)
                print(f"  on the host {found[-1]['host_us']} us a call")
    return found


def logits(model: Model, name: str, read_tbps: float) -> list[dict[str, object]]:
    """The output matrix, beside torch's BLAS, and the largest logit, at the rows that the kernel for few serves."""
    weight, found = random(model.vocabulary, model.hidden), []
    for rows in (1, 2, 4):
        x = random(rows, model.hidden)
        y = x @ weight.T
        timed: dict[str, tuple[Callable[[], object], int]] = {
            "dense_linear": (lambda x=x: OPS["dense_linear"](x, weight, None), weight.nbytes),
            "dense by BLAS": (lambda x=x: torch.nn.functional.linear(x, weight), weight.nbytes),
            "argmax": (lambda y=y: OPS["argmax"](y), y.nbytes),
            "argmax by torch": (lambda y=y: y.argmax(-1), y.nbytes),
        }
        for operator, (call, size) in timed.items():
            found.append(report(name, operator, rows, None, chain_us([call] * 16), size, read_tbps))
    return found


def report(
    model: str, operator: str, rows: int, context: int | None, us: float, size: int, read_tbps: float
) -> dict[str, object]:
    """One record, printed."""
    floor = size / read_tbps / 1e6
    at = f"M {rows}" if context is None else f"batch {rows} context {context}"
    print(f"{model} {operator:17} {at:24} {us:9.2f} us; floor {floor:8.2f} ({us / floor:.2f})", flush=True)
    return {
        "model": model,
        "op": operator,
        "rows": rows,
        "context": context,
        "us": round(us, 3),
        "floor_us": round(floor, 3),
    }


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer's weights and cache."""

    linears: tuple[Packed, ...]
    k_cache: Tensor
    v_cache: Tensor


def layers_of(model: Model, count: int, rows: int, slots: int) -> list[Layer]:
    """`count` layers of random weights; the packed tensors of each are copies of one's."""
    device = torch.device("cuda", torch.cuda.current_device())
    packed = []
    for k, n in model.linears:
        weight = random_weight(k, n, 128, DTYPE, device)
        packed.append(backend.pack(weight, spec_of(weight, DTYPE), device))
    shape = (rows, model.kv_heads, slots, model.head_dim)
    return [
        Layer(
            tuple(Packed(p.layout, tuple(t.clone() for t in p.tensors)) for p in packed), random(*shape), random(*shape)
        )
        for _ in range(count)
    ]


def layer_chain(model: Model, name: str, rows: int, context: int, chosen: Ops) -> dict[str, object]:
    """Microseconds a layer: its four linears alone, and with all that is between them."""
    cache_bytes = 4 * rows * model.kv_heads * (context + 32) * model.head_dim
    count = max(4, min(16, int(MOST_CACHE_BYTES / cache_bytes)))
    layers = layers_of(model, count, rows, context + 32)
    spec, tensors = model.spec, tables(context + 32, model.head_dim // 2)
    weight = torch.ones(model.hidden, device="cuda")
    at = torch.full((rows,), context - 1, dtype=torch.int32, device="cuda")
    x, residual = random(rows, model.hidden), random(rows, model.hidden)
    inputs = [random(rows, k) for k, _ in model.linears]

    def linears(layer: Layer) -> None:
        for given, packed in zip(inputs, layer.linears, strict=True):
            backend.linear(given, packed)

    def whole(layer: Layer) -> None:
        qkv, o, gate_up, down = layer.linears
        y = chosen.add_rms_norm(x, residual, weight, 1e-5)
        y = chosen.decode_attention(backend.linear(y, qkv), at, layer.k_cache, layer.v_cache, spec, tensors)
        y = chosen.add_rms_norm(backend.linear(y, o), residual, weight, 1e-5)
        y = chosen.gated_activation(backend.linear(y, gate_up), "silu")
        backend.linear(y, down)

    torch.cuda.synchronize()
    alone, together = (graph_us(lambda i, run=run: run(layers[i]), count) for run in (linears, whole))
    print(
        f"{name} layer, batch {rows}, context {context}: linears {alone:.1f} us, whole {together:.1f} us, "
        f"between them {together - alone:.1f} us",
        flush=True,
    )
    return {
        "model": name,
        "rows": rows,
        "context": context,
        "linears_us": round(alone, 2),
        "layer_us": round(together, 2),
    }


def main() -> int:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--contexts", nargs="*", type=int, default=[128, 512, 2048])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16, 512, 2048])
    parser.add_argument("--torch", action="store_true", help="the layer with torch's definitions instead")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU that torch can use; nothing measured", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    read_tbps = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: reads {read_tbps:.3f} TB/s")
    chosen = Ops(backend)
    if options.torch:
        for name, definition in ops.DEFINITIONS.items():
            setattr(chosen, name, definition)
    rows: list[dict[str, object]] = []
    layers: list[dict[str, object]] = []
    for name in options.models:
        model = MODELS[name]
        rows += elementwise(model, name, read_tbps, options.rows)
        rows += logits(model, name, read_tbps)
        rows += attention(model, name, read_tbps, options.batches, options.contexts)
        layers += [layer_chain(model, name, batch, c, chosen) for batch in options.batches for c in options.contexts]
    if options.json is not None:
        record = {
            "device": torch.cuda.get_device_name(),
            "date": datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d"),
            "commit": commit(),
            "command": "python tools/bench_ops.py " + " ".join(sys.argv[1:]),
            "read_tbps": round(read_tbps, 4),
            "ops": rows,
            "layers": layers,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
