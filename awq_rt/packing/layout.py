"""A `Packed.layout` that says all that was decided when a weight was packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..backend import LinearSpec
from ..weights import AwqWeight

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Layout:
    """`str` of it is the `Packed.layout`; `parse` is the inverse."""

    form: str  # how the codes lie, a word of the backend's
    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype  # of the activations
    scale_dtype: torch.dtype
    bias_dtype: torch.dtype | None  # that the checkpoint has; kernels take a bias in float32
    kernel: str  # the family that was asked for

    def __str__(self) -> str:
        sizes = (self.in_features, self.out_features, self.group_size)
        dtypes = (self.dtype, self.scale_dtype, self.bias_dtype)
        words = (self.form, *map(str, sizes), *(str(dtype).removeprefix("torch.") for dtype in dtypes), self.kernel)
        return " ".join(words)

    @staticmethod
    def parse(text: str) -> Layout:
        form, k, n, g, dtype, scale_dtype, bias_dtype, kernel = text.split()
        return Layout(form, int(k), int(n), int(g), DTYPES[dtype], DTYPES[scale_dtype], DTYPES.get(bias_dtype), kernel)

    @staticmethod
    def of(form: str, weight: AwqWeight, spec: LinearSpec) -> Layout:
        """That of `weight`, packed as `spec` asks."""
        bias_dtype = None if weight.bias is None else weight.bias.dtype
        return Layout(form, *_sizes(spec), spec.dtype, weight.scales.dtype, bias_dtype, spec.kernel)

    @staticmethod
    def expected(form: str, spec: LinearSpec) -> Layout:
        """That of a weight which is not there yet, without a bias: programs do not depend on one."""
        return Layout(form, *_sizes(spec), spec.dtype, spec.scale_dtype, None, spec.kernel)


def _sizes(spec: LinearSpec) -> tuple[int, int, int]:
    return spec.in_features, spec.out_features, spec.group_size
