"""llm-awq's packing since February 2024 ("v2"): gemv_fast's words, with the zeros under the name `scaled_zeros`.

    qweight       int16 [N/4, K]   as in gemv_fast
    scales        [8 ZW, N]        float16; the model's dtype, so also bfloat16, since February 2025
    scaled_zeros  [8 ZW, N]        -(s * z), of the scales' dtype

Source: llm-awq, awq/quantize/qmodule.py. Its two earlier generations are gemm and gemv.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..weights import AwqWeight
from . import gemv_fast
from .layout import LinearShape, TensorInfo

NAME = "llm-awq"
SUFFIXES = ("qweight", "scaled_zeros", "scales", "bias")
ZEROS = "scaled_zeros"


def matches(stored: Mapping[str, TensorInfo]) -> bool:
    return gemv_fast.matches_with(stored, ZEROS)


def shape(stored: Mapping[str, TensorInfo], group_size: int | None) -> LinearShape:
    return gemv_fast.shape_with(stored, ZEROS, group_size)


def read(stored: Mapping[str, Tensor], shape: LinearShape) -> AwqWeight:
    return gemv_fast.read_with(stored, ZEROS, shape)
