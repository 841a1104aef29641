"""`awq-rt inspect`: what a checkpoint holds, read from its headers."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from .console import console, size, table
from .options import checkpoint_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoint import Checkpoint, StoredLinear
    from ..formats import TensorInfo

SCHEMA = "awq-rt.inspect/1"
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with every tensor.")
@click.option("--all", "each", is_flag=True, help="List every linear instead of one line for all layers.")
@checkpoint_options
def inspect(model: str, as_json: bool, each: bool, **opening: Any) -> None:
    """Show what a checkpoint holds.

    MODEL is a folder, a file or a hub id. Layout, groups, shapes, sizes and warnings are read from the files' headers.
    """
    from .. import open_checkpoint

    checkpoint = open_checkpoint(model, **opening)
    if as_json:
        click.echo(json.dumps(_to_json(checkpoint), indent=2, default=str))
    else:
        _print(checkpoint, console(), each)


def _to_json(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "root": str(checkpoint.root),
        "layout": checkpoint.layout,
        "model_type": checkpoint.config.get("model_type"),
        "architectures": checkpoint.config.get("architectures"),
        "quantization": {"source": str(checkpoint.quantization.source), "raw": checkpoint.quantization.raw},
        "group_sizes": _group_sizes(checkpoint),
        "nbytes": checkpoint.nbytes,
        "linears": [
            {
                "name": linear.name,
                "layout": linear.layout,
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "group_size": linear.group_size,
                "bias": linear.bias,
                "symmetric": linear.symmetric,
                "nbytes": linear.nbytes,
            }
            for linear in checkpoint.linears.values()
        ],
        "dense": [
            {"name": t.name, "shape": list(t.shape), "dtype": _dtype(t), "nbytes": t.nbytes}
            for t in checkpoint.dense.values()
        ],
        "warnings": list(checkpoint.warnings),
    }


def _print(checkpoint: Checkpoint, out: Console, each: bool) -> None:
    architecture = ", ".join(checkpoint.config.get("architectures") or ["unknown architecture"])
    groups = ", ".join(map(str, _group_sizes(checkpoint)))
    out.print(f"{checkpoint.root}", style="bold", soft_wrap=True)
    out.print(f"{architecture}; layout {checkpoint.layout}; 4 bits, group size {groups}; {size(checkpoint.nbytes)}")
    out.print(f"settings read from {checkpoint.quantization.source}", soft_wrap=True)

    packed_bytes = sum(linear.nbytes for linear in checkpoint.linears.values())
    out.print(f"\n{_count(checkpoint.linears, 'quantised linear')}, {size(packed_bytes)}", style="bold")
    out.print(_linears(checkpoint.linears.values(), each))

    matrices = [tensor for tensor in checkpoint.dense.values() if len(tensor.shape) > 1]
    vectors = [tensor for tensor in checkpoint.dense.values() if len(tensor.shape) <= 1]
    dense_bytes = sum(tensor.nbytes for tensor in checkpoint.dense.values())
    out.print(f"\nNot quantised, {size(dense_bytes)}", style="bold")
    out.print(_dense(matrices, each))
    if vectors:
        total = size(sum(tensor.nbytes for tensor in vectors))
        out.print(f"{_count(vectors, 'vector')} (norms and biases), {total}")

    for warning in checkpoint.warnings:
        out.print(f"\nwarning: {warning}", style="yellow", soft_wrap=True)


def _linears(linears: Iterable[StoredLinear], each: bool) -> Any:
    alike: defaultdict[tuple[str, tuple[int, int, int], str, str], list[StoredLinear]] = defaultdict(list)
    for linear in linears:
        name = linear.name if each else LAYER_NUMBER.sub("*", linear.name)
        zeros = "symmetric" if linear.symmetric else "zero points"
        kind = zeros + (", bias" if linear.bias else "")
        shape = (linear.in_features, linear.out_features, linear.group_size)
        alike[name, shape, linear.layout, kind].append(linear)
    numbers = ("count", "in", "out", "group", "size", "bits a weight")
    rows = table("name", "count", "in", "out", "group", "layout", "", "size", "bits a weight", right=numbers)
    for (name, shape, layout, kind), members in alike.items():
        nbytes = sum(linear.nbytes for linear in members)
        bits = 8 * nbytes / (shape[0] * shape[1] * len(members))
        rows.add_row(name, str(len(members)), *map(str, shape), layout, kind, size(nbytes), f"{bits:.2f}")
    return rows


def _dense(tensors: Iterable[TensorInfo], each: bool) -> Any:
    alike: defaultdict[tuple[str, str, str], list[TensorInfo]] = defaultdict(list)
    for tensor in tensors:
        name = tensor.name if each else LAYER_NUMBER.sub("*", tensor.name)
        alike[name, " x ".join(map(str, tensor.shape)), _dtype(tensor)].append(tensor)
    rows = table("name", "count", "shape", "dtype", "size", right=("count", "size"))
    for (name, shape, dtype), members in alike.items():
        rows.add_row(name, str(len(members)), shape, dtype, size(sum(tensor.nbytes for tensor in members)))
    return rows


def _group_sizes(checkpoint: Checkpoint) -> list[int]:
    return sorted({linear.group_size for linear in checkpoint.linears.values()})


def _dtype(tensor: TensorInfo) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _count(things: Any, noun: str) -> str:
    return f"{len(things)} {noun}" + ("" if len(things) == 1 else "s")
