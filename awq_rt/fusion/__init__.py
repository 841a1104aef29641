"""Fused decoders: found in a transformers model, tried against it, and used by `awq_rt.generation`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import registry
from ..errors import CannotFuseModel
from ..linear import AwqLinear
from ..models.experts import AwqExperts
from ..ops import Ops
from .arena import move_together
from .decoder import Decoder as Decoder
from .description import GatedMlp
from .discovery import CannotFuse, Finder
from .verification import verified


@dataclass(frozen=True, slots=True)
class Fusion:
    """What came of fusing a model: the decoder, and what could not be fused, by module, with the reason."""

    decoder: Decoder | None
    unfused: tuple[tuple[str, str], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        return Fusion(None, (("model", "it is a copy of one that is fused"),))

    def __str__(self) -> str:
        left = "; ".join(f"{path}: {reason}" for path, reason in self.unfused)
        if self.decoder is None:
            return f"not fused: {left}"
        count = len(self.decoder.description.layers)
        return f"{count} layers fused" + (f"; unfused: {left}" if left else "")


@torch.no_grad()
def fuse(model: Any, fuse: bool | str | Mapping[str, Any] = "auto") -> Fusion:
    """A decoder that shares the weights of `model`, which stays as it is.

    `fuse` is "auto", True (then what cannot be fused is an error), False, or AWQ's `modules_to_fuse`. Raises
    `CannotFuseModel`, and `InvalidConfig` for a mapping with unknown keys.
    """
    if fuse is False:
        return Fusion(None, (("model", "fuse=False was asked for"),))
    mapping = fuse if isinstance(fuse, Mapping) else None
    try:
        fusion = _fuse(model, mapping)
    except CannotFuse as error:
        fusion = Fusion(None, ((error.path, error.reason),))
    if fusion.decoder is None and fuse != "auto":
        raise CannotFuseModel(f"{fusion}; fuse='auto' runs it as transformers does")
    return fusion


def _fuse(model: Any, mapping: Mapping[str, Any] | None) -> Fusion:
    finder = Finder(model, mapping)
    dense = any(parameter.is_meta for parameter in model.parameters())
    if dense or any(linear.execution_device is not None for linear in _packed(model)):
        raise CannotFuse(type(model).__name__, "parts of it are offloaded, and on the device only while they are used")
    places = {parameter.device for parameter in model.parameters()} | {m.packed_0.device for m in _packed(model)}
    if len(places) != 1:
        raise CannotFuse(type(model).__name__, f"it is spread over {len(places)} devices")
    linears = list(_packed(model))
    if not linears:
        raise CannotFuse(type(model).__name__, "it has no packed linear")
    spec = linears[0].spec
    assert spec is not None
    device, dtype = places.pop(), spec.dtype
    backend = registry.get(linears[0].backend_name)
    ops = Ops(backend)
    flash = model.config._attn_implementation == "flash_attention_2"
    found = finder.description()
    if device.type == "cuda":
        for layer in found.layers:
            move_together(layer.projections)
            torch.cuda.empty_cache()
        torch.cuda.synchronize(device)  # kernels may read weights before the kernels ahead of them have ended
    prepare = getattr(backend, "prepare_ops", None)
    if prepare is not None:
        prepare(dtype, device, found.hidden_sizes, found.mlps, found.attentions)
    description = verified(found, model, ops, device, dtype, flash)
    unfused = []
    for index, layer in enumerate(description.layers):
        if not isinstance(layer.mlp, GatedMlp):
            for module in layer.mlp.modules():
                if isinstance(module, AwqExperts) and device.type != "cpu":
                    module.stack()
            unfused.append((f"layers.{index}.{type(layer.mlp).__name__}", "a mixture of experts"))
    return Fusion(Decoder(description, ops, device, dtype, flash), tuple(unfused))


def _packed(model: nn.Module) -> list[AwqLinear]:
    return [module for module in model.modules() if isinstance(module, AwqLinear)]
