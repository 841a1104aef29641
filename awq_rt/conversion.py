"""From one layout to another, one linear at a time, with a word on whatever the target cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from .checkpoint.reader import model_config
from .checkpoint.writer import MAX_SHARD_BYTES
from .errors import LayoutCannotHold, UnknownLayout
from .formats import WRITABLE, LinearShape, TensorInfo
from .weights import AwqWeight


@dataclass(frozen=True, slots=True)
class Report:
    """What `convert` did. `losses` is empty when every weight reads back bit for bit."""

    destination: Path
    layout: str
    linears: int
    losses: tuple[str, ...]


def convert(
    source: str | Path,
    destination: str | Path,
    layout: str,
    *,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    revision: str | None = None,
    token: str | None = None,
    group_size: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Report:
    """Write the checkpoint `source` (path or hub id) to the folder `destination` in `layout`, one of `WRITABLE`.

    `progress` is called with (linears done, linears in all, name). Raises a `CheckpointError` when the source is bad,
    `UnknownLayout`, `LayoutCannotHold`, `DestinationExists` or `WriteError`; the destination is then as it was.
    """
    if layout not in WRITABLE:
        raise UnknownLayout(f"layout {layout!r} cannot be written; choose one of {', '.join(WRITABLE)}")
    checkpoint = open_checkpoint(source, revision=revision, token=token, group_size=group_size)
    _check_shapes(checkpoint, layout)
    losses: dict[str, int] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, name in enumerate(checkpoint.linears):
            if progress is not None:
                progress(done, len(checkpoint), name)
            weight = checkpoint[name]
            try:
                stored = stored_tensors(weight, layout)
            except LayoutCannotHold as error:
                raise LayoutCannotHold(f"{name}: {error.args[0]}") from error
            for loss in _losses(weight, stored, layout):
                losses[loss] = losses.get(loss, 0) + 1
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in stored.items())
        for name in checkpoint.dense:
            yield name, checkpoint.view(name)
        if progress is not None:
            progress(len(checkpoint), len(checkpoint), "")

    config = model_config(checkpoint) | {"quantization_config": quantization_config(checkpoint, layout)}
    write_checkpoint(
        Path(destination), tensors(), config, beside=checkpoint.root, force=force, max_shard_bytes=max_shard_bytes
    )
    told = tuple(f"{loss} ({count} of {len(checkpoint)} linears)" for loss, count in losses.items())
    return Report(Path(destination), layout, len(checkpoint), told)


def stored_tensors(weight: AwqWeight, layout: str) -> dict[str, Tensor]:
    """The weight as `layout` stores it: tensors by suffix, the bias among them."""
    stored = WRITABLE[layout].write(weight)
    return stored if weight.bias is None else {**stored, "bias": weight.bias}


def quantization_config(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    """The `quantization_config` with which other software loads the checkpoint's linears in `layout`."""
    shapes = [linear.shape for linear in checkpoint.linears.values()]
    group_size = _one_group_size(shapes, layout)
    # Every other matrix: embeddings among them, which no loader would convert anyway.
    dense = [name.removesuffix(".weight") for name, info in checkpoint.dense.items() if len(info.shape) == 2]
    return describe(layout, group_size, dense, checkpoint.quantization.skipped)


def describe(layout: str, group_size: int, dense: list[str], skipped: tuple[str, ...] = ()) -> dict[str, Any]:
    """A `quantization_config`. `dense` names the matrices left alone, `skipped` what the source said."""
    if layout == "compressed-tensors":
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": sorted({"lm_head", *dense}),
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": False,
                        "strategy": "channel" if group_size == -1 else "group",
                        "group_size": None if group_size == -1 else group_size,
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
            },
        }
    # AWQ loaders match these as parts of names, so only what the source already said is repeated.
    plain = [name for name in skipped if name != "lm_head" and not name.startswith("re:")]
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": layout,
        "modules_to_not_convert": plain or None,
    }


def _one_group_size(shapes: list[LinearShape], layout: str) -> int:
    sizes = {shape.group_size for shape in shapes}
    if len(sizes) == 1:
        return sizes.pop()
    if all(shape.group_size == shape.in_features for shape in shapes):
        return -1
    raise LayoutCannotHold(f"a {layout} checkpoint states one group size; this one has {sorted(sizes)}")


def _check_shapes(checkpoint: Checkpoint, layout: str) -> None:
    """Raise `LayoutCannotHold` with every linear that does not fit, before anything is written."""
    unfit = []
    for name, linear in checkpoint.linears.items():
        try:
            WRITABLE[layout].check(linear.shape)
        except LayoutCannotHold as error:
            unfit.append(f"{name}: {error.args[0]}")
    if unfit:
        more = f"\n  and {len(unfit) - 5} more" if len(unfit) > 5 else ""
        raise LayoutCannotHold(f"{len(unfit)} linears do not fit {layout}:\n  " + "\n  ".join(unfit[:5]) + more)


def _losses(weight: AwqWeight, stored: Mapping[str, Tensor], layout: str) -> Iterator[str]:
    """What differs when `stored` is read back. Codes and zero points never do; that is checked, not assumed."""
    infos = {
        suffix: TensorInfo(suffix, tuple(t.shape), t.dtype, tuple(t.tolist()) if suffix == "weight_shape" else None)
        for suffix, t in stored.items()
    }
    back = WRITABLE[layout].read(stored, WRITABLE[layout].shape(infos, weight.group_size))
    if not (back.codes.equal(weight.codes) and back.zeros.equal(weight.zeros)):
        raise AssertionError(f"{layout} does not give back the codes that were written; this is a bug in awq_rt")
    if back.scales.dtype != weight.scales.dtype:
        change = (back.scales.double() / weight.scales.double() - 1).abs().nan_to_num().max()
        names = (str(weight.scales.dtype).removeprefix("torch."), str(back.scales.dtype).removeprefix("torch."))
        if float(change):
            yield f"scales were rounded from {names[0]} to {names[1]}"
        else:
            yield f"scales changed their dtype from {names[0]} to {names[1]}, keeping every value"
