"""The kernel for many rows on sm_90a: what selection may choose compiles as it must, and fits. Needs no GPU."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
from awq_rt.packing import Kind
from awq_rt_cuda import nvrtc, selection_ring
from awq_rt_cuda.ring import Ring
from awq_rt_cuda.target import Target

KIB = 1024
H100 = Target(90, 132, 227 * KIB, 228 * KIB, 2048)
HALF = Kind(True, 0, 128)
SHAPES = ((4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096), (4096, 6144), (14336, 4096), (64, 8), (4544, 64))


def chosen(kind: Kind, shapes: tuple[tuple[int, int], ...] = SHAPES) -> set[Ring]:
    steps = selection_ring.row_steps(kind, H100)
    sizes = [(-(-n // 16), -(-k // 64)) for k, n in shapes]
    found = {selection_ring.choose(step, *size, kind, H100) for step in steps for size in sizes}
    return {ring for ring in found if ring is not None}


def compiled_log(ring: Ring, kind: Kind) -> str:
    return nvrtc.compile_with_log(ring.program(kind, "sm_90"), "--ptxas-options=-v")[1]


@pytest.mark.parametrize("kind", [HALF, Kind(False, 1, 16)], ids=str)
def test_chosen_variants_neither_spill_nor_wait_for_each_instruction(kind: Kind) -> None:
    assert chosen(kind)
    for ring in chosen(kind):
        log = compiled_log(ring, kind)
        assert re.findall(r"(\d+) bytes spill stores", log) == ["0"], (ring, log)
        assert "serialized" not in log, (ring, log)


def test_a_variant_with_too_few_registers_is_seen() -> None:
    """The counter-test: five warpgroups leave 112 registers, and 64 sums with two fragments need more."""
    crowded = Ring(128, 1, 4, 4, take_registers=112)
    assert "serialized" in compiled_log(crowded, HALF)


def test_chosen_variants_fit_the_device() -> None:
    for kind in (HALF, Kind(True, 0, 16)):
        for ring in chosen(kind):
            assert ring.min_blocks * (ring.shared_bytes + KIB) <= H100.multiprocessor_shared_bytes, ring
            assert ring.shared_bytes <= H100.shared_bytes, ring
            assert ring.cluster <= 8, ring


def test_each_part_of_a_split_depth_has_a_pair_of_tiles() -> None:
    for tiles in (1, 2, 3, 5, 64, 71):
        for ring in chosen(HALF, ((64 * tiles, 512),)):
            assert ring.split <= -(-tiles // 2)


def test_many_rows_always_have_a_variant() -> None:
    for step in set(selection_ring.row_steps(HALF, H100)) - set(selection_ring.OTHER_COSTS):
        assert selection_ring.choose(step, 1, 1, HALF, H100) is not None


def test_the_grid_is_whole_clusters_and_no_more_than_the_work() -> None:
    for ring in chosen(HALF):
        for m, n in ((1, 8), (200, 4096), (8192, 22016)):
            blocks = ring.shape(m, n).grid[0]
            assert blocks % ring.cluster == 0
            assert 0 < blocks // ring.cluster <= ring.clusters(m, n)
            assert ring.split == 1 or blocks // ring.cluster == ring.clusters(m, n)


@pytest.mark.parametrize(
    ("kind", "arch"), [(HALF, 80), (HALF, 100), (HALF, 120), (Kind(True, 2, 128), 90), (Kind(True, 1, 128), 90)]
)
def test_other_gpus_and_scales_of_another_dtype_are_left_to_other_kernels(kind: Kind, arch: int) -> None:
    assert selection_ring.row_steps(kind, Target(arch, 132, 227 * KIB, 228 * KIB, 2048)) == ()
