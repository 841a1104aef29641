"""Faults put into the real kernels, one at a time: each must be noticed, by the simulator or by the bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from amdsim import TARGETS, CodeObject, In, Out, Program, SimulationError
from amdsim.toolchain import Clang

pytest.importorskip("awq_rt_rocm", reason="awq-rt-rocm is not installed")
from awq_rt_rocm import kernel, packing
from awq_rt_rocm.kernel import Variant

from awq_rt.packing import Kind
from awq_rt.rtc import Program as Source
from awq_rt.testing import excess, hurtful_weight

CDNA, RDNA = ("gfx90a", "gfx942", "gfx950"), ("gfx1030", "gfx1100", "gfx1201")
GEMV = Variant("gemv", rows=2, waves=2, depth=2)
GEMM = {64: Variant("gemm", rows=16, waves=2, strips=2), 32: Variant("gemm", rows=16, waves=2, strips=1)}
FEW = Variant("gemm", rows=4, waves=2, strips=2)


def mutated(source: Source, mutation: tuple[str, str]) -> Source:
    """`source` with one passage replaced, which must occur."""
    old, new = mutation
    assert any(old in text for _, text in source.sources), f"{old!r} does not occur any more"
    return replace(source, sources=tuple((name, text.replace(old, new)) for name, text in source.sources))


def error(clang: Clang, arch: str, variant: Variant, dtype: torch.dtype, mutation: tuple[str, str] | None) -> float:
    """The largest error over its bound, for a shape that nothing divides. Raises what the simulator raises."""
    k, n, group_size, m = 840, 40, 8, 5
    if variant.entry == "gemm":
        k, group_size = 832, 64  # six and a half tiles: one wave takes four, the other three
    weight = hurtful_weight("random", k, n, group_size, scale_dtype=dtype, bias=True)
    assert weight.bias is not None
    half = dtype == torch.float16
    source = variant.program(Kind(half, 0 if half else 1, group_size), arch)
    if mutation is not None:
        source = mutated(source, mutation)
    program = Program(CodeObject.parse(clang.compile(source)), variant.entry)
    groups = packing.group_count(k, group_size)
    codes = packing.pack_codes(weight.codes, weight.zeros)
    constants = packing.pack_groups(weight.scales, weight.zeros, groups)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.zeros(m, n, dtype=dtype)
    shape = variant.shape(m, n, TARGETS[arch].wave_size)
    inputs = [In(content(codes)), In(content(constants)), In(content(weight.bias.float())), In(content(x))]
    sizes = [m, n, k, codes.shape[1], groups]
    counts = program.launch([*inputs, Out(content(y)), *sizes], shape.grid, shape.threads)
    return float("inf") if counts.unwritten[4] else excess(y, x, weight)


def content(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.contiguous().view(torch.uint8).numpy()
    return array


def is_noticed(clang: Clang, arch: str, variant: Variant, dtype: torch.dtype, mutation: tuple[str, str]) -> bool:
    try:
        return not error(clang, arch, variant, dtype, mutation) <= 1
    except SimulationError:
        return True


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernels_as_they_are_pass(clang: Clang, arch: str, dtype: torch.dtype) -> None:
    assert error(clang, arch, GEMV, dtype, None) <= 1
    if TARGETS[arch].matrix:
        assert error(clang, arch, GEMM[TARGETS[arch].wave_size], dtype, None) <= 1
    if arch in CDNA:
        assert error(clang, arch, FEW, dtype, None) <= 1


GEMV_FAULTS = {
    "a barrier is missing": ("    block_barrier();\n    for", "    for"),
    "the nibbles are in another order": ("const u32 later = word >> 8;", "const u32 later = word >> 4;"),
    "the upper nibble is not scaled down": ("(f16)0.0625f, (f16)0.0625f", "(f16)1.0f, (f16)1.0f"),
    "a zero point is off by one": ("(bytes, 0xE400u", "(bytes + 0x10000u, 0xE400u"),
    "a column beyond the last is stored": ("row < m && column < n", "row < m"),
    "a row beyond the last is stored": ("row < m && column < n", "column < n"),
    "x is read beyond its row": ("wanted_bytes : last_bytes", "wanted_bytes : wanted_bytes"),
    "a row of x beyond the last is read": ("(wanted < there ? wanted", "(wanted < there + 16 ? wanted"),
    "every group is the first": ("depth / kGroup) * kStrip;", "0) * kStrip;"),
    "a group that ends between the quarters is overlooked": ("kGroup % 32 == 0 ? column :", "true ? column :"),
    "quarters take each other's x": ("word * 32 + quarter * 8", "word * 32 + (3 - quarter) * 8"),
    "the last exchange between lanes is left out": ("mask < kWave; mask *= 2", "mask < kWave / 2; mask *= 2"),
    "a tile is taken twice": ("tile + kDepth * kWaves;", "tile + kWaves;"),
    "x is staged one tile late": ("stage(staged[wave], tile, lane);", "stage(staged[wave], under[0], lane);"),
    "the bias is forgotten": ("(bias ? bias[column] : 0.0f)", "0.0f"),
}


@pytest.mark.parametrize("fault", GEMV_FAULTS)
def test_faults_of_the_vector_kernel_are_noticed(clang: Clang, fault: str) -> None:
    number = list(GEMV_FAULTS).index(fault)
    for arch in (CDNA[number % 3], RDNA[number % 3]):
        assert is_noticed(clang, arch, GEMV, torch.float16, GEMV_FAULTS[fault]), arch


@pytest.mark.parametrize("arch", ["gfx950", "gfx1201"])
def test_a_fault_of_the_loop_in_which_every_tile_has_a_next_is_noticed(clang: Clang, arch: str) -> None:
    fault = ("first + (i + kDepth) * kWaves, true", "first + i * kWaves, true")
    assert is_noticed(clang, arch, replace(GEMV, rows=1), torch.float16, fault)


@pytest.mark.parametrize("arch", CDNA)
def test_a_wave_of_32_on_cdna_is_noticed(clang: Clang, arch: str) -> None:
    fault = ("constexpr u32 kWave = 64;", "constexpr u32 kWave = 32;")
    assert is_noticed(clang, arch, GEMV, torch.float16, fault)


@pytest.mark.parametrize("arch", RDNA)
def test_a_wave_of_64_on_rdna_is_noticed(clang: Clang, arch: str) -> None:
    fault = ("constexpr u32 kWave = 32;", "constexpr u32 kWave = 64;")
    assert is_noticed(clang, arch, GEMV, torch.float16, fault)


MFMA_FAULTS = (
    ("return 4 * (lane / 16) + j;", "return 4 * j + lane / 16;"),
    ("return lane / 16; }", "return lane % 4; }"),
)
LAYOUT_FAULTS = {
    # another unit's order of results; a quarter that is read twice
    **dict.fromkeys(CDNA, MFMA_FAULTS),
    "gfx1100": (
        ("return 2 * j + lane / 16;", "return 8 * (lane / 16) + j;"),
        ("return chunk; }", "return 2 * (chunk / 2); }"),
    ),
    "gfx1201": (
        ("return 8 * (lane / 16) + j;", "return 2 * j + lane / 16;"),
        ("2 * chunk + lane / 16;", "2 * chunk;"),
    ),
}
GEMM_FAULTS = {
    "a barrier is missing": ("    block_barrier();\n    for", "    for"),
    "a column beyond the last is stored": ("row < m && column < n", "row < m"),
    "a row beyond the last is read": ("wanted < last ? wanted", "wanted < last + 16 ? wanted"),
    "a row's end is not minded": ("wanted_bytes : last_bytes", "wanted_bytes : wanted_bytes"),
    "a strip beyond the last is read": ("first_strip + s < strips ? first_strip + s : strips - 1", "first_strip + s"),
    "the second tile is the first again": ("accumulate(sums, odd, tile + kWaves);", "accumulate(sums, even, tile);"),
    "the third tile is the second again": ("read(even, tile + 2 * kWaves);", "read(even, tile + kWaves);"),
    "a wave's last tile is left out": ("if (tile < tiles) block.accumulate", "if (false) block.accumulate"),
    "the scale is the first group's": ("scale_of(constants), offset", "scale_of(under.chunks[s][0].groups[0]), offset"),
}


@pytest.mark.parametrize("arch", LAYOUT_FAULTS)
def test_a_wrong_matrix_layout_is_noticed(clang: Clang, arch: str) -> None:
    variant = GEMM[TARGETS[arch].wave_size]
    for fault in LAYOUT_FAULTS[arch]:
        assert is_noticed(clang, arch, variant, torch.float16, fault), fault


@pytest.mark.parametrize("fault", GEMM_FAULTS)
def test_faults_of_the_matrix_kernel_are_noticed(clang: Clang, fault: str) -> None:
    for arch in ("gfx942", "gfx1201"):
        variant = replace(GEMM[TARGETS[arch].wave_size], strips=2)
        assert is_noticed(clang, arch, variant, torch.float16, GEMM_FAULTS[fault]), arch


FEW_FAULTS = {
    "the unit's rows are others than the results'": ("lane % 16 * kFewRows / 16", "lane % 16 % kFewRows"),
    "the results' rows are others than the unit's": ("kFew ? lane / 16 :", "kFew ? 3 - lane / 16 :"),
    "every word takes the x of the first": ("= under.x[word][c];", "= under.x[0][c];"),
    "a row's end is not minded": ("wanted_bytes : last_bytes", "wanted_bytes : wanted_bytes"),
    "a row beyond the last is read": ("wanted < last ? wanted", "wanted < last + 16 ? wanted"),
}


@pytest.mark.parametrize("fault", FEW_FAULTS)
def test_faults_of_the_matrix_kernel_for_the_fewest_rows_are_noticed(clang: Clang, fault: str) -> None:
    arch = CDNA[list(FEW_FAULTS).index(fault) % 3]
    for dtype in (torch.float16, torch.bfloat16):
        assert is_noticed(clang, arch, FEW, dtype, FEW_FAULTS[fault]), arch


@pytest.mark.parametrize("arch", LAYOUT_FAULTS)
def test_an_offset_that_is_not_taken_off_is_noticed(clang: Clang, arch: str) -> None:
    variant = GEMM[TARGETS[arch].wave_size]
    for fault in (("if (kOffset) sum =", "if (false) sum ="), ("0x41800000u));", "0x41000000u));")):
        assert is_noticed(clang, arch, variant, torch.bfloat16, fault)


def test_dequantising_is_exact_and_its_faults_are_noticed(clang: Clang) -> None:
    k, n, group_size = 328, 40, 8
    weight = hurtful_weight("wide scales", k, n, group_size)
    codes = packing.pack_codes(weight.codes, weight.zeros)
    groups = packing.group_count(k, group_size)
    constants = packing.pack_groups(weight.scales, weight.zeros, groups)
    exact = weight.dequantize(torch.float32).half().T.contiguous()
    shape = kernel.dequantize_shape(codes.shape[0], codes.shape[1])
    faults = (
        None,
        ("|| place >= n) return", ") return"),
        ("if (depth < k) *", "*"),
        ("(float)pairs[i].y", "(float)pairs[i].x"),
    )
    for arch in ("gfx90a", "gfx1100"):
        source = kernel.dequantize_program(Kind(True, 0, group_size), arch)
        for fault in faults:
            code = CodeObject.parse(clang.compile(mutated(source, fault) if fault else source))
            w = torch.zeros(n, k, dtype=torch.float16)
            given = [In(content(codes)), In(content(constants)), Out(content(w)), n, k, codes.shape[1], groups]
            try:
                Program(code, "dequantize_tiles").launch(given, shape.grid, shape.threads)
            except SimulationError:
                assert fault is not None
            else:
                assert torch.equal(w, exact) == (fault is None), fault
