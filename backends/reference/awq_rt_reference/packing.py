"""The backend's packed form: two codes a byte along N, in rows that torch's 4-bit embedding operators read as they are.

Row k holds ceil(N/2) bytes, column 2i in the low nibble of byte i, then four bytes that are the float16 pair
(scale 1, offset 0): those operators dequantise each row as `scale * code + offset`, so they hand us plain codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_SCALE_AND_OFFSET = (1.0, 0.0)
TRAILER_BYTES = 4


def pack_rows(codes: Tensor) -> Tensor:
    """Codes uint8 [K, N] -> uint8 [K, ceil(N/2) + 4]."""
    in_features, out_features = codes.shape
    width = (out_features + 1) // 2
    rows = torch.zeros(in_features, width + TRAILER_BYTES, dtype=torch.uint8, device=codes.device)
    rows[:, :width] = codes[:, 0::2]
    rows[:, : out_features // 2] |= codes[:, 1::2] << 4
    trailer = torch.tensor(ROW_SCALE_AND_OFFSET, dtype=torch.float16, device=codes.device)
    rows[:, width:] = trailer.view(torch.uint8)
    return rows


def unpack_rows(rows: Tensor, out_features: int) -> Tensor:
    """The exact inverse of `pack_rows`."""
    pairs = rows[:, :-TRAILER_BYTES]
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)[:, :out_features]
