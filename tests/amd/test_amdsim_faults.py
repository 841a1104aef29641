"""What the simulator must notice: every fault below is in a kernel that compiles without a warning."""

from __future__ import annotations

import numpy as np
import pytest
from amdsim import (
    TARGETS,
    BadOperand,
    Deadlock,
    In,
    InOut,
    Out,
    OutOfBounds,
    Race,
    ReadOnly,
    SimulationError,
    Uninitialised,
    Unmodelled,
)
from amdsim.toolchain import Clang
from device_code import kernel

SUM = """
// The sum of a block's 256 numbers: within waves by exchange, between waves through shared memory.
extern "C" __global__ void __launch_bounds__(256) block_sum(const float* x, float* y) {
    __shared__ float parts[256 / kWave];
    float sum = x[block_x() * 256 + thread_index()];
    for (u32 mask = 1; mask < (FAULT == 1 ? 32 : kWave); mask *= 2) sum += from_lane_xor(sum, mask);
    if (lane_index() == 0 && !(FAULT == 3 && wave_index() == 1)) parts[wave_index()] = sum;
    if (FAULT != 2) block_barrier();
    if (thread_index() == 0) {
        float total = 0;
        for (u32 wave = 0; wave < 256 / kWave; wave++) total += parts[wave];
        y[FAULT == 4 ? block_x() * 2 : block_x()] = total;
    }
    if (FAULT == 5) {  // the next round of a loop, without a barrier before it
        if (lane_index() == 0) parts[wave_index()] = sum;
    }
}
"""


def block_sums(clang: Clang, arch: str, fault: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    y = np.zeros(3, np.float32)
    kernel(clang, SUM, arch, FAULT=fault).launch([In(x), Out(y)], (3, 1, 1), 256)
    return y, x.astype(np.float64).sum(1)


@pytest.mark.parametrize("arch", TARGETS)
def test_a_right_reduction_passes(clang: Clang, arch: str) -> None:
    found, exact = block_sums(clang, arch, 0)
    assert np.abs(found - exact).max() < 256 * 2.0**-24 * 16


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950"])
def test_a_reduction_over_half_a_wave_gives_a_wrong_sum(clang: Clang, arch: str) -> None:
    found, exact = block_sums(clang, arch, 1)
    assert np.abs(found - exact).max() > 1


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("fault", [2, 5])
def test_a_missing_barrier_is_a_race(clang: Clang, arch: str, fault: int) -> None:
    with pytest.raises(Race, match="since the last barrier"):
        block_sums(clang, arch, fault)


@pytest.mark.parametrize("arch", TARGETS)
def test_a_sum_over_memory_that_one_wave_forgot_to_write_is_noticed(clang: Clang, arch: str) -> None:
    with pytest.raises(Uninitialised):
        block_sums(clang, arch, 3)


@pytest.mark.parametrize("arch", TARGETS)
def test_a_store_behind_the_buffer_is_out_of_bounds(clang: Clang, arch: str) -> None:
    with pytest.raises(OutOfBounds):
        block_sums(clang, arch, 4)


COPY = """
#define GLOBAL __attribute__((address_space(1)))
extern "C" __global__ void __launch_bounds__(64) copy(const u32* x, u32* y, u64 count) {
    const u32 i = block_x() * 64 + thread_index();
#if FAULT == 1
    y[i] = x[i + 1];
#elif FAULT == 2
    const_cast<u32*>(x)[i] = y[i];
#elif FAULT == 3
    y[i] = y[i] + 1;
#elif FAULT == 4
    const u64 base = (u64)x;
    y[i] = *(const GLOBAL u32*)((base & 0xFFFFFFFF00000000ull) | (u32)((u32)base + i * 4096));
#elif FAULT == 7
    y[i] = *(const GLOBAL u32*)((u64)x + i * 4096);
#elif FAULT == 5
    while (__hip_atomic_load((GLOBAL u32*)y + i, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT) != 12345) {}
#elif FAULT == 6
    if (i % 2 == 0) y[i] = x[i];
#else
    if (i < count) y[i] = x[i];
#endif
}
"""


def copied(clang: Clang, fault: int, y: Out | InOut, arch: str = "gfx942") -> dict[int, int]:
    x = np.arange(64, dtype=np.uint32)
    return (
        kernel(clang, COPY, arch, FAULT=fault)
        .launch([In(x), y, 64], (1, 1, 1), 64, instruction_limit=100_000)
        .unwritten
    )


@pytest.mark.parametrize("arch", TARGETS)
def test_a_right_copy_passes_and_writes_everything(clang: Clang, arch: str) -> None:
    y = np.zeros(64, np.uint32)
    assert copied(clang, 0, Out(y), arch) == {1: 0}
    assert np.array_equal(y, np.arange(64))


@pytest.mark.parametrize(("fault", "error"), [(1, OutOfBounds), (2, ReadOnly), (3, Uninitialised), (5, Deadlock)])
def test_each_wrong_copy_is_stopped(clang: Clang, fault: int, error: type[SimulationError]) -> None:
    """A load behind the end, a store to an input, a read of an output, an endless loop."""
    y = np.zeros(64, np.uint32)
    with pytest.raises(error):
        copied(clang, fault, Out(y) if fault == 3 else InOut(y))


def test_an_address_that_loses_its_carry_leaves_the_buffer(clang: Clang) -> None:
    """A buffer of 256 KiB lies across a multiple of 4 GiB."""
    x, y = np.arange(65536, dtype=np.uint32), np.zeros(64, np.uint32)
    kernel(clang, COPY, "gfx942", FAULT=7).launch([In(x), Out(y), 64], (1, 1, 1), 64)
    assert np.array_equal(y, x[::1024])
    with pytest.raises(OutOfBounds):
        kernel(clang, COPY, "gfx942", FAULT=4).launch([In(x), Out(y), 64], (1, 1, 1), 64)


def test_what_a_kernel_left_unwritten_is_counted(clang: Clang) -> None:
    assert copied(clang, 6, Out(np.zeros(64, np.uint32))) == {1: 128}


def test_an_error_names_the_instruction_and_the_wave(clang: Clang) -> None:
    with pytest.raises(OutOfBounds, match=r"global_load_dword .*1 waves, first: workgroup 0, wave 0"):
        copied(clang, 1, InOut(np.zeros(64, np.uint32)))


def test_input_that_nobody_wrote_may_be_copied_about_but_not_stored(clang: Clang) -> None:
    x, y = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    with pytest.raises(Uninitialised, match="stored"):
        kernel(clang, COPY, "gfx942", FAULT=0).launch([In(x, written=252), Out(y), 64], (1, 1, 1), 64)
    kernel(clang, COPY, "gfx942", FAULT=0).launch([In(x, written=252), Out(y), 63], (1, 1, 1), 64)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("y[thread_index()] = __builtin_amdgcn_sinf(x[thread_index()]);", "v_sin_f32"),
        ("__hip_atomic_fetch_add(y + thread_index(), x[0], __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);", "atomic"),
        ("float many[64]; for (int i = 0; i < 64; i++) many[i] = x[i]; y[0] = many[(int)x[64]];", "scratch"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(clang: Clang, body: str, said: str) -> None:
    text = f'extern "C" __global__ void __launch_bounds__(64) k(const float* x, float* y) {{ {body} }}'
    x, y = np.ones(65, np.float32), np.zeros(64, np.float32)
    with pytest.raises(Unmodelled, match=said):
        kernel(clang, text, "gfx90a").launch([In(x), InOut(y)], (1, 1, 1), 64)


def test_matrix_operands_that_differ_between_the_halves_are_refused(clang: Clang) -> None:
    text = """
    using halves16 = f16 __attribute__((ext_vector_type(16)));
    extern "C" __global__ void __launch_bounds__(32) k(const halves16* x, floats8* y) {
        const floats8 zero = {};
        y[lane_index()] = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(x[lane_index()], x[lane_index() % 16], zero);
    }"""
    x = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float16)
    program = kernel(clang, text, "gfx1100")
    with pytest.raises(BadOperand, match="lanes 16 to 31"):
        program.launch([In(x), Out(np.zeros((32, 8), np.float32))], (1, 1, 1), 32)
    x[16:] = x[:16]
    program.launch([In(x), Out(np.zeros((32, 8), np.float32))], (1, 1, 1), 32)
