"""ExLlama's form of a weight, both ways, in torch operators: exact on any device, and testable without a GPU.

Strips of 8 columns with the codes of 8 rows shuffled into a word; the drawing is at the head of
awq_rt/kernels/exllama.cuh.
Nothing is padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import LinearSpec, Packed
from ..weights import AwqWeight
from .layout import Layout

PREFIX = "exllama"
STRIP = 8
WORD_ROWS = 8


def refusal(spec: LinearSpec) -> str:
    """Why a weight of this shape has no such form; empty when it has."""
    if spec.in_features % WORD_ROWS or spec.out_features % STRIP:
        return f"in_features {spec.in_features} and out_features {spec.out_features} must be multiples of 8"
    if spec.group_size % WORD_ROWS:
        return f"group_size {spec.group_size} must be a multiple of {WORD_ROWS}, the rows of a word"
    return ""


def pack(weight: AwqWeight, spec: LinearSpec) -> Packed:
    """`weight` in strips, on its own device: codes, zeros, scales and, with a bias, float32 bias."""
    tensors = [pack_codes(weight.codes), pack_zeros(weight.zeros), pack_scales(weight.scales)]
    if weight.bias is not None:
        tensors.append(weight.bias.float().contiguous())
    return Packed(str(Layout.of(PREFIX, weight, spec)), tuple(tensors))


def unpack(packed: Packed) -> AwqWeight:
    """The exact inverse of `pack`."""
    bias_dtype = Layout.parse(packed.layout).bias_dtype
    codes, zeros, scales, *bias = packed.tensors
    return AwqWeight(
        unpack_codes(codes),
        unpack_zeros(zeros),
        unpack_scales(scales),
        bias[0].to(bias_dtype) if bias and bias_dtype is not None else None,
    )


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [K, N] -> uint8 [strips, K/8, 8 columns, 4 bytes]."""
    in_features, out_features = codes.shape
    # k = 8 word + 4 half + 2 pair + odd; byte = 2 odd + half, the pairs in its nibbles
    parts = codes.view(in_features // WORD_ROWS, 2, 2, 2, out_features // STRIP, STRIP)
    low, high = parts.permute(2, 4, 0, 5, 3, 1)  # [strip, word, column, odd, half] for each pair
    pairs: Tensor = low | high << 4
    return pairs.contiguous().view(low.shape[0], low.shape[1], STRIP, 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """The exact inverse of `pack_codes`."""
    strips, words = packed.shape[:2]
    bytes_ = packed.view(strips, words, STRIP, 2, 2)
    pairs = torch.stack((bytes_ & 15, bytes_ >> 4))  # pair, strip, word, column, odd, half
    return pairs.permute(2, 5, 0, 4, 1, 3).reshape(words * WORD_ROWS, strips * STRIP)


def pack_scales(scales: Tensor) -> Tensor:
    """Scales [K/G, N] -> [strips, K/G, 8]."""
    return scales.view(scales.shape[0], -1, STRIP).transpose(0, 1).contiguous()


def unpack_scales(packed: Tensor) -> Tensor:
    """The exact inverse of `pack_scales`."""
    return packed.transpose(0, 1).reshape(packed.shape[1], -1)


def pack_zeros(zeros: Tensor) -> Tensor:
    """Zero points uint8 [K/G, N] -> uint8 [strips, K/G, 4 bytes], the first of two columns in the low nibble."""
    by_strip = pack_scales(zeros)
    return by_strip[..., 0::2] | by_strip[..., 1::2] << 4


def unpack_zeros(packed: Tensor) -> Tensor:
    """The exact inverse of `pack_zeros`."""
    return unpack_scales(torch.stack((packed & 15, packed >> 4), dim=-1).flatten(2))
