"""A block's finished tensors under the checkpoint's names, and back into the block's parameters.

The block goes on with exactly what was stored, so that a run that was resumed computes what an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import stored_tensors
from ..formats import WRITABLE, LinearShape
from ..models.activation import ScaledActivation
from ..weights import AwqWeight
from .source import as_stored
from .streaming import Block


def packed_tensors(
    block: Block, weights: Mapping[str, AwqWeight], layout: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor of `block`, on the CPU: the linears in `weights` (by path) in `layout`, all others in `dtype`."""
    stored: dict[str, Tensor] = {}
    for path, names in block.names.items():
        owner, _, parameter = path.rpartition(".")
        if owner not in weights:
            for name, part in zip(names, _chunks(block.module.get_parameter(path), len(names)), strict=True):
                stored[name] = as_stored(name, part, dtype).cpu().contiguous()
        elif parameter == "weight":
            for name, weight in zip(names, _split(weights[owner], len(names)), strict=True):
                prefix = name.removesuffix(".weight")
                stored |= {
                    f"{prefix}.{suffix}": tensor.cpu() for suffix, tensor in stored_tensors(weight, layout).items()
                }
    for path, module in block.module.named_modules():
        if isinstance(module, ScaledActivation):
            name = f"{prefix_of(block)}{path}.scales"
            stored[name] = as_stored(name, module.scales, dtype).cpu()
    return stored


@torch.no_grad()
def restore(block: Block, stored: Mapping[str, Tensor], shapes: Mapping[str, LinearShape], layout: str) -> None:
    """Give the loaded block the values in `stored`; linears in `shapes` (by path) are dequantised."""
    for path, names in block.names.items():
        owner, _, parameter = path.rpartition(".")
        target = block.module.get_parameter(path)
        if owner not in shapes:
            values = torch.cat([stored[name].to(target) for name in names])
        elif parameter == "weight":
            values = packed_weight(block, owner, stored, shapes[owner], layout, target.device).dequantize().T
        else:
            values = stored[names[0]].to(target)
        target.copy_(values)
    packed = {name.removesuffix(".weight") for path in shapes for name in block.names[f"{path}.weight"]}
    for name, tensor in stored.items():
        owner, _, suffix = name.rpartition(".")
        if suffix != "scales" or owner in packed:
            continue
        path = owner.removeprefix(prefix_of(block))
        activation: Any = block.module.get_submodule(path)
        if not isinstance(activation, ScaledActivation):
            owner, _, child = path.rpartition(".")
            activation = ScaledActivation(activation, len(tensor))
            setattr(block.module.get_submodule(owner), child, activation)
        activation.scales = nn.Parameter(tensor.to(target.device, torch.float32), requires_grad=False)


def packed_weight(
    block: Block, path: str, stored: Mapping[str, Tensor], shape: LinearShape, layout: str, device: torch.device
) -> AwqWeight:
    """The block's linear `path` as it was stored."""
    names = block.names[f"{path}.weight"]
    each = LinearShape(shape.in_features, shape.out_features // len(names), shape.group_size)
    parts = [_read(stored, name.removesuffix(".weight"), each, layout, device) for name in names]
    return parts[0] if len(parts) == 1 else AwqWeight.concatenate(parts)


def prefix_of(block: Block) -> str:
    """What the checkpoint's names of this block's tensors begin with, as the first parameter that keeps its path
    says."""
    for path, names in block.names.items():
        if names[0].endswith(f".{path}"):
            return names[0].removesuffix(path)
    return f"{block.path}."


def _read(
    stored: Mapping[str, Tensor], prefix: str, shape: LinearShape, layout: str, device: torch.device
) -> AwqWeight:
    found = {
        suffix: stored[f"{prefix}.{suffix}"] for suffix in WRITABLE[layout].SUFFIXES if f"{prefix}.{suffix}" in stored
    }
    return WRITABLE[layout].read({suffix: tensor.to(device) for suffix, tensor in found.items()}, shape)


def _chunks(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    return (tensor,) if count == 1 else tensor.chunk(count)


def _split(weight: AwqWeight, count: int) -> list[AwqWeight]:
    """The weight in `count` equal parts along N: the inverse of `AwqWeight.concatenate`. Experts have no bias."""
    if count == 1:
        return [weight]
    fields = (weight.codes.chunk(count, 1), weight.zeros.chunk(count, 1), weight.scales.chunk(count, 1))
    return [AwqWeight(*(field.contiguous() for field in part)) for part in zip(*fields, strict=True)]
