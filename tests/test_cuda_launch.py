"""Launches stay within what the hardware takes, for every number of rows that a tensor can have. Needs no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
from awq_rt.packing import Kind
from awq_rt_cuda import dequantize, selection, selection_ring
from awq_rt_cuda.driver import Shape, tall
from awq_rt_cuda.ring import Ring
from awq_rt_cuda.selection import Target

KIB = 1024
A100 = Target(80, 108, 163 * KIB, 164 * KIB, 2048)
H100 = Target(90, 132, 227 * KIB, 228 * KIB, 2048)
LIMITS = (2**31 - 1, 65535, 65535)
MANY = (524_280, 524_281, 4_194_240, 4_194_241, 2**28, 2**32 - 1)
"""Rows of x: the last that 65,535 blocks of 8 and of 64 hold, one more of each, and what an unsigned integer holds."""


def assert_launchable(shape: Shape) -> None:
    assert all(1 <= size <= limit for size, limit in zip(shape.grid, LIMITS, strict=True)), shape
    assert shape.grid[0] % shape.cluster == 0, shape


@pytest.mark.parametrize("blocks", [1, 2, 65535, 65536, 65537, 131_071, 10_000_019, 2**29])
def test_a_tall_grid_holds_all_blocks_and_few_more(blocks: int) -> None:
    y, z = tall(blocks)
    assert 1 <= y <= LIMITS[1]
    assert 1 <= z <= LIMITS[2]
    assert blocks <= y * z < blocks + z


@pytest.mark.parametrize("target", [A100, H100], ids=lambda target: f"sm_{target.arch}")
@pytest.mark.parametrize("kernel", ["auto", "gemv", "gemm"])
@pytest.mark.parametrize("m", MANY)
def test_every_number_of_rows_can_be_launched(target: Target, kernel: str, m: int) -> None:
    kind = Kind(True, 0, 128)
    more = selection_ring.row_steps(kind, target)
    for step in {selection.row_step(m, kernel, more), selection.row_step(m, kernel)}:
        for strips, tiles in ((1, 1), (256, 64), (4097, 512)):
            variant = selection.choose(step, strips, tiles, kind, target)
            shape = variant.shape(m, strips * 16)
            assert_launchable(shape)
            if not isinstance(variant, Ring):  # whose blocks go on until all is done
                assert shape.grid[1] * shape.grid[2] * variant.rows >= m


@pytest.mark.parametrize("strips", [1, 65535, 65536, 200_000])
def test_every_number_of_columns_can_be_dequantised(strips: int) -> None:
    shape = dequantize.shape(strips, 64)
    assert_launchable(shape)
    assert shape.grid[1] * shape.grid[2] >= strips
