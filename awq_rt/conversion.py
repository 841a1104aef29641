"""From one layout to another, one linear at a time, with a word on whatever the target cannot hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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

NEVER_CONVERTED = re.compile(r"(.*\.)?(lm_head|wte|wpe|\w*embed(s|dings?|_tokens|_in|_out|_positions)?)")
"""Embeddings and the output, which loaders leave alone without being told."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `convert` did.

    `losses` is empty when every weight reads back bit for bit, and the configuration names all that is not packed.
    """

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
        Path(destination), tensors(), config, beside=checkpoint.source, force=force, max_shard_bytes=max_shard_bytes
    )
    told = [f"{loss} ({count} of {len(checkpoint)} linears)" for loss, count in losses.items()]
    if layout != "compressed-tensors":
        _, unnamed = _skip_list(_dense_matrices(checkpoint), checkpoint.quantization.skipped, checkpoint)
        told += [
            f"modules_to_not_convert cannot name {name}, which is not packed but part of a packed linear's name; "
            "other software may take it for packed"
            for name in unnamed
        ]
    return Report(Path(destination), layout, len(checkpoint), tuple(told))


def stored_tensors(weight: AwqWeight, layout: str) -> dict[str, Tensor]:
    """The weight as `layout` stores it: tensors by suffix, the bias among them."""
    stored = WRITABLE[layout].write(weight)
    return stored if weight.bias is None else {**stored, "bias": weight.bias}


def quantization_config(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    """The `quantization_config` with which other software loads the checkpoint's linears in `layout`."""
    dense, skipped = _dense_matrices(checkpoint), checkpoint.quantization.skipped
    shapes = {name: linear.shape for name, linear in checkpoint.linears.items()}
    by_size: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        by_size.setdefault(shape.group_size, []).append(name)
    group_size = _one_group_size(shapes.values())
    if group_size is None and layout != "compressed-tensors":
        raise LayoutCannotHold(f"a {layout} checkpoint states one group size; this one has {sorted(by_size)}")
    stated = describe(layout, group_size or -1, dense, skipped, shapes)
    if group_size is None:
        groups = enumerate(sorted(by_size.items()))
        stated["config_groups"] = {f"group_{number}": _scheme(size, names) for number, (size, names) in groups}
    return stated


def describe(
    layout: str, group_size: int, dense: list[str], skipped: tuple[str, ...] = (), packed: Iterable[str] = ()
) -> dict[str, Any]:
    """A `quantization_config`.

    `dense` names the matrices left alone, `skipped` what the source said of them, `packed` the linears; where these are
    not given, an AWQ configuration names no `dense` matrix, as it might mean a packed one too.
    """
    packed = list(packed)
    plain, _ = _skip_list(dense, skipped, packed)
    packed_output = [name for name in packed if name.rpartition(".")[2] == "lm_head"]
    if layout == "compressed-tensors":
        # What an AWQ list means by part of a name, such as "visual", is no name here; it is kept for the way back.
        parts = (part for part in plain if any(part in name for name in dense))
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": sorted({*dense, *parts, *([] if packed_output else ["lm_head"])}),
            "config_groups": {"group_0": _scheme(group_size, ["Linear"])},
        }
    stated = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": layout,
        "modules_to_not_convert": plain or None,
    }
    return {**stated, "lm_head": True} if packed_output else stated


def _scheme(group_size: int, targets: list[str]) -> dict[str, Any]:
    """One of compressed-tensors' `config_groups`."""
    return {
        "targets": targets,
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


def _dense_matrices(checkpoint: Checkpoint) -> list[str]:
    """Every matrix that is not packed: embeddings among them, which no loader would convert anyway."""
    return [name.removesuffix(".weight") for name, info in checkpoint.dense.items() if len(info.shape) == 2]


def _skip_list(dense: list[str], skipped: Iterable[str], packed: Iterable[str]) -> tuple[list[str], list[str]]:
    """(modules_to_not_convert, the dense matrices that it cannot name because a packed linear's name holds theirs).

    AutoAWQ and vLLM skip every module whose name holds an entry, so no packed linear's name may hold one. The source's
    entries stay where they keep to that. Its "re:" ones need no reading: what they mean is in `dense`.
    """
    names = "\n".join(packed)
    left_alone = {"lm_head", *filter(NEVER_CONVERTED.fullmatch, dense)}
    said = [entry for entry in skipped if entry not in left_alone and not entry.startswith("re:")]
    wanted = {entry for entry in said if entry and entry not in names}
    unnamed = []
    for name in dense if names else ():
        if name in left_alone or any(entry in name for entry in wanted):
            continue
        if name in names:
            unnamed.append(name)
        else:
            wanted.add(name)
    # An entry that holds another adds nothing.
    return sorted(e for e in wanted if not any(other != e and other in e for other in wanted)), sorted(unnamed)


def _one_group_size(shapes: Iterable[LinearShape]) -> int | None:
    """The group size of all, -1 where every column is one group, None where they differ."""
    shapes = list(shapes)
    sizes = {shape.group_size for shape in shapes}
    if len(sizes) == 1:
        return sizes.pop()
    return -1 if all(shape.group_size == shape.in_features for shape in shapes) else None


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
