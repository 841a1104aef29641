"""Descriptions of matrices in device memory that the copy engine of sm_90 and later reads boxes of."""

from __future__ import annotations

import functools

import torch
from cuda.bindings import driver
from torch import Tensor

from .driver import checked

WORDS = 16
"""Of 8 bytes: the size of a description. As the last argument of a kernel it takes as many slots of `Kernel.launch`."""

ROW_BYTES = 128
"""Of a box of x."""
TYPES = {
    torch.float16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    torch.bfloat16: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    torch.uint8: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT32,
}


def of_rows(x: Tensor, box_rows: int) -> tuple[int, ...]:
    """`x` [rows, columns], contiguous and 16-byte aligned, 16-bit floats, in boxes of `box_rows` rows by 128 bytes.

    In shared memory chunk c (16 bytes) of a box's row r lies at c ^ r % 8. What a box has beyond `x` reads as zeros.
    """
    return _encoded(x.data_ptr(), x.shape[0], x.shape[1], 2, x.dtype, box_rows, ROW_BYTES // 2)


def of_tiles(codes: Tensor, box_strips: int) -> tuple[int, ...]:
    """`codes` uint8 [strips, tiles, 32, 16] in boxes of `box_strips` strips by one tile, as it lies in memory."""
    strips, tiles, lanes, size = codes.shape
    return _encoded(codes.data_ptr(), strips, tiles * lanes * size // 4, 4, codes.dtype, box_strips, lanes * size // 4)


@functools.lru_cache(maxsize=4096)
def _encoded(
    pointer: int, rows: int, columns: int, size: int, dtype: torch.dtype, box_rows: int, box_columns: int
) -> tuple[int, ...]:
    """Kept, because encoding costs several launches and allocators hand out the same addresses again."""
    swizzle = driver.CUtensorMapSwizzle
    long, short = driver.cuuint64_t, driver.cuuint32_t
    encoded = checked(
        driver.cuTensorMapEncodeTiled(
            TYPES[dtype],
            2,
            pointer,
            [long(columns), long(rows)],
            [long(columns * size)],
            [short(box_columns), short(box_rows)],
            [short(1), short(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle.CU_TENSOR_MAP_SWIZZLE_128B if size == 2 else swizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"describing {rows} x {columns} {dtype} at {pointer:#x} in boxes of {box_rows} x {box_columns}",
    )
    return tuple(int(word) for word in encoded.opaque)
