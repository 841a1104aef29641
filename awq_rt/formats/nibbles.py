"""4-bit values in int16 and int32 words, lowest nibble first.

Words are read as bytes, so nothing is ever shifted through a sign bit. PyTorch runs on little-endian machines, where
byte i of a word holds its nibbles 2i and 2i + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(words: Tensor) -> Tensor:
    """int16 [..., C] -> uint8 [..., C, 4]; int32 [..., C] -> uint8 [..., C, 8]. Values 0..15."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).view(*words.shape, 2 * words.itemsize)


def join(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """The exact inverse of `split`: uint8 [..., C, 4 or 8] -> `dtype` [..., C]."""
    pairs = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return pairs.contiguous().view(dtype).squeeze(-1)


def unpack_rows(words: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [R, 8 C], in natural order along the row."""
    return split(words).flatten(1)


def pack_rows(values: Tensor) -> Tensor:
    """The exact inverse of `unpack_rows`; the number of columns must be a multiple of 8."""
    return join(values.reshape(len(values), -1, 8), torch.int32)
