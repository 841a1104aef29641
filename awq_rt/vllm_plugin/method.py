"""A linear of vLLM's whose weight an `AwqLinear` holds and multiplies with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.parameter import BasevLLMParameter, GroupQuantScaleParameter, PackedvLLMParameter

from ..formats import LinearShape
from ..linear import AwqLinear
from .stored import WORD, StoredTensor, canonical, check, stored_tensors

log = logging.getLogger("vllm.awq_rt")


class AwqRtLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The linear `name`. `group_size` is the configuration's, -1 for one group a column."""

    def __init__(self, layout: str, group_size: int, symmetric: bool, name: str):
        self.layout, self.group_size, self.symmetric, self.name = layout, group_size, symmetric, name

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        group_size = input_size if self.group_size == -1 else self.group_size
        shape = LinearShape(input_size_per_partition, sum(output_partition_sizes), group_size)
        check(self.name, shape)
        layer.awq_rt_shape, layer.awq_rt_dtype = shape, params_dtype  # type: ignore[assignment]
        for tensor in stored_tensors(self.layout, shape, self.symmetric):
            layer.register_parameter(tensor.suffix, _parameter(tensor, extra_weight_attrs["weight_loader"]))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        shape: LinearShape = layer.awq_rt_shape  # type: ignore[assignment]
        suffixes = [tensor.suffix for tensor in stored_tensors(self.layout, shape, self.symmetric)]
        stored = {suffix: getattr(layer, suffix).data for suffix in suffixes}
        device = next(iter(stored.values())).device
        linear = AwqLinear(shape.in_features, shape.out_features, shape.group_size)
        weight = canonical(self.layout, shape, stored)
        weight.check_values()
        choice = linear.bind(weight, layer.awq_rt_dtype, device)  # type: ignore[arg-type]
        if device.type != "cpu" and choice.backend.priority == 0:
            log.warning("%s runs slowly: %s", self.name, "; ".join(f"{name}: {why}" for name, why in choice.refusals))
        for suffix in suffixes:
            delattr(layer, suffix)
        layer.awq_rt_linear = linear

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = layer.awq_rt_linear(x)  # type: ignore[operator]
        return y if bias is None else y + bias


def _parameter(tensor: StoredTensor, loader: Callable[..., Any]) -> BasevLLMParameter:
    """Memory for `tensor`, of the class that tells vLLM's loader how to cut it."""
    data = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.in_dim is None:
        return BasevLLMParameter(data=data, weight_loader=loader)
    dims = {"input_dim": tensor.in_dim, "output_dim": tensor.out_dim}
    if tensor.packed_dim is None:
        return GroupQuantScaleParameter(data=data, weight_loader=loader, **dims)
    return PackedvLLMParameter(
        data=data, weight_loader=loader, packed_dim=tensor.packed_dim, packed_factor=WORD, **dims
    )
