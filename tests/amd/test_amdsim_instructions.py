"""What single instructions compute, for every target: the compiler's builtins against the same in plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from amdsim import TARGETS, In, Out
from amdsim.toolchain import Clang
from device_code import kernel

SEED = 7


def run(
    clang: Clang, arch: str, expressions: Iterable[str], inputs: np.ndarray, lanes: int, result: type = np.uint32
) -> dict[str, np.ndarray]:
    """Each expression of a, b, c and the lane, for every column of `inputs` [3, lanes], in one wave."""
    name = {np.uint32: "u32", np.float32: "float", np.uint64: "u64"}[result]
    kind = "float" if inputs.dtype == np.float32 else "u32"
    texts = list(expressions)
    lines = "\n".join(f"        y[{index * lanes} + lane] = {text};" for index, text in enumerate(texts))
    text = f"""
    extern "C" __global__ void __launch_bounds__(64) k(const {kind}* x, {name}* y) {{
        const u32 lane = thread_index();
        const {kind} a = x[lane], b = x[{lanes} + lane], c = x[{2 * lanes} + lane];
        (void)a; (void)b; (void)c;
{lines}
    }}"""
    y = np.zeros((len(texts), lanes), result)
    kernel(clang, text, arch).launch([In(inputs), Out(y)], (1, 1, 1), lanes)
    return dict(zip(texts, y, strict=True))


def integers(lanes: int) -> np.ndarray:
    x = np.random.default_rng(SEED).integers(0, 2**32, (3, lanes), dtype=np.uint64).astype(np.uint32)
    x[:, :3] = [[0, 1, 2**32 - 1], [2**31, 0, 1], [31, 2**31 - 1, 0]]
    return x


def signed(value: int) -> int:
    return value - (value >> 31 << 32)


def permuted(a: int, b: int, c: int) -> int:
    data = list(b.to_bytes(4, "little") + a.to_bytes(4, "little"))
    return int.from_bytes(bytes(data[c >> 8 * i & 7] for i in range(4)), "little")


INTEGER = {
    "a * b + c": lambda a, b, c: a * b + c,
    "((a ^ b) & ~c) | a >> (b & 31)": lambda a, b, c: (a ^ b) & ~c | a >> (b & 31),
    "a << (b & 31)": lambda a, b, c: a << (b & 31),
    "(u32)((int)a >> (b & 31))": lambda a, b, c: signed(a) >> (b & 31),
    "(u32)((u64)a * b >> 32)": lambda a, b, c: a * b >> 32,
    "__builtin_amdgcn_perm(a, b, c & 0x07070707u)": lambda a, b, c: permuted(a, b, c & 0x07070707),
    "__builtin_amdgcn_perm(a, b, 0x0C050C00u)": lambda a, b, c: (a >> 8 & 255) << 16 | b & 255,
    "__builtin_amdgcn_alignbit(a, b, c & 31)": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "__builtin_amdgcn_ubfe(a, b & 31, 7)": lambda a, b, c: a >> (b & 31) & 127,
    "__builtin_amdgcn_sbfe((int)a, b & 15, 5)": lambda a, b, c: ((a >> (b & 15) & 31) ^ 16) - 16,
    "a < b ? c : a": lambda a, b, c: c if a < b else a,
    "(int)a < (int)b ? c : b": lambda a, b, c: c if signed(a) < signed(b) else b,
    "a / (b | 1)": lambda a, b, c: a // (b | 1),
    "a % 11": lambda a, b, c: a % 11,
    "a > b ? a : b": lambda a, b, c: max(a, b),
    "(a & 0xFFFFFF) * (b & 0xFFFFFF)": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "(u32)__builtin_clz(a | 1)": lambda a, b, c: 32 - (a | 1).bit_length(),
}


@pytest.mark.parametrize("arch", TARGETS)
def test_integer_arithmetic(clang: Clang, arch: str) -> None:
    lanes = TARGETS[arch].wave_size
    x = integers(lanes)
    found = run(clang, arch, INTEGER, x, lanes)
    for expression, exact in INTEGER.items():
        expected = [exact(*map(int, column)) & 0xFFFFFFFF for column in x.T]
        assert found[expression].tolist() == expected, expression


WIDE = {
    "(u64)a << 32 | b": lambda a, b, c: a << 32 | b,
    "((u64)a << 32 | b) + ((u64)c << 31 | a)": lambda a, b, c: (a << 32 | b) + (c << 31 | a),
    "((u64)a << 32 | b) - ((u64)c << 32 | a)": lambda a, b, c: (a << 32 | b) - (c << 32 | a),
    "(u64)a * b + c": lambda a, b, c: a * b + c,
    "((u64)a << 32 | b) >> (c & 63)": lambda a, b, c: (a << 32 | b) >> (c & 63),
    "((u64)a << 32 | b) << (c & 63)": lambda a, b, c: (a << 32 | b) << (c & 63),
}


@pytest.mark.parametrize("arch", TARGETS)
def test_64_bit_arithmetic_carries(clang: Clang, arch: str) -> None:
    lanes = TARGETS[arch].wave_size
    x = integers(lanes)
    found = run(clang, arch, WIDE, x, lanes, np.uint64)
    for expression, exact in WIDE.items():
        expected = [exact(*map(int, column)) & (2**64 - 1) for column in x.T]
        assert found[expression].tolist() == expected, expression


@pytest.mark.parametrize("arch", TARGETS)
def test_an_undefined_high_word_does_not_reach_the_low_one(clang: Clang, arch: str) -> None:
    """Compilers multiply in 64 bits where the low word alone counts, and leave the high one of a source unset."""
    lanes = TARGETS[arch].wave_size
    x = integers(lanes)
    expected = (x[0] * x[1] + x[2]).tolist()
    assert run(clang, arch, ["a * b + c"], x, lanes)["a * b + c"].tolist() == expected


FLOAT = {
    "a + b": lambda a, b, c: a + b,
    "a * b - c": None,  # contracted to a fused operation: one rounding
    "a > b ? a : c": lambda a, b, c: a if a > b else c,
    "__builtin_sqrtf(__builtin_fabsf(a))": lambda a, b, c: math.sqrt(abs(a)),
    "(float)(int)(a * 1000.0f)": lambda a, b, c: float(math.trunc(float(np.float32(a) * np.float32(1000)))),
    "__builtin_floorf(a * 8.0f)": lambda a, b, c: math.floor(a * 8),
    "(float)(f16)a": lambda a, b, c: float(np.float16(a)),
}


@pytest.mark.parametrize("arch", TARGETS)
def test_float_arithmetic_is_rounded_once(clang: Clang, arch: str) -> None:
    lanes = TARGETS[arch].wave_size
    x = np.random.default_rng(SEED).standard_normal((3, lanes)).astype(np.float32)
    found = run(clang, arch, FLOAT, x, lanes, np.float32)
    for expression, exact in FLOAT.items():
        for column, y in zip(x.T.astype(np.float64), found[expression], strict=True):
            expected = exact(*column) if exact else column[0] * column[1] - column[2]
            # A square root is refined by the compiler's own steps, good to one unit in the last place.
            assert abs(y - np.float32(expected)) <= ("sqrt" in expression) * np.spacing(y), expression


DPP = "(u32)__builtin_amdgcn_update_dpp(0, (int)a, {}, 15, 15, true)"
EXCHANGES = {
    "__builtin_amdgcn_readfirstlane(a)": lambda lane, lanes: 0,
    "__builtin_amdgcn_readlane(a, 17)": lambda lane, lanes: 17,
    "(u32)__builtin_amdgcn_ds_bpermute((int)((lane ^ 21) * 4), (int)a)": lambda lane, lanes: lane ^ 21,
    "(u32)__builtin_amdgcn_ds_swizzle((int)a, 0x041F)": lambda lane, lanes: lane ^ 1,
    DPP.format("0x4E"): lambda lane, lanes: lane ^ 2,
    DPP.format("0x140"): lambda lane, lanes: lane ^ 15,
    DPP.format("0x141"): lambda lane, lanes: lane ^ 7,
    DPP.format("0x124"): lambda lane, lanes: lane & ~15 | lane - 4 & 15,
    DPP.format("0x111"): lambda lane, lanes: lane - 1 if lane % 16 else -1,
    DPP.format("0x103"): lambda lane, lanes: lane + 3 if lane % 16 < 13 else -1,
}


@pytest.mark.parametrize("arch", TARGETS)
def test_lanes_exchange_values(clang: Clang, arch: str) -> None:
    lanes = TARGETS[arch].wave_size
    x = integers(lanes)
    found = run(clang, arch, EXCHANGES, x, lanes)
    for expression, source in EXCHANGES.items():
        lane_of = [source(lane, lanes) for lane in range(lanes)]
        expected = [int(x[0, lane]) if lane >= 0 else 0 for lane in lane_of]
        assert found[expression].tolist() == expected, expression


@pytest.mark.parametrize("arch", TARGETS)
def test_a_lane_that_is_off_keeps_its_value_and_counts_as_zero(clang: Clang, arch: str) -> None:
    lanes = TARGETS[arch].wave_size
    x = integers(lanes)
    text = """
    extern "C" __global__ void __launch_bounds__(64) k(const u32* x, u32* y) {
        u32 value = x[thread_index()], sum = 1;
        if (thread_index() % 3) sum = (u32)__builtin_amdgcn_ds_bpermute((int)((thread_index() ^ 1) * 4), (int)value);
        y[thread_index()] = sum;
    }"""
    y = np.zeros(lanes, np.uint32)
    kernel(clang, text, arch).launch([In(x), Out(y)], (1, 1, 1), lanes)
    expected = [1 if not i % 3 else 0 if not (i ^ 1) % 3 else int(x[0, i ^ 1]) for i in range(lanes)]
    assert y.tolist() == expected


@pytest.mark.parametrize("arch", TARGETS)
def test_loops_of_different_length_meet_again(clang: Clang, arch: str) -> None:
    """Lanes of a wave and waves of a block leave a loop at different times; behind it a barrier waits for all."""
    text = """
    extern "C" __global__ void __launch_bounds__(256) k(const u32* x, u32* y) {
        __shared__ u32 steps[256];
        u32 value = x[thread_index()], count = 0;
        while (value != 1) { value = value % 2 ? 3 * value + 1 : value / 2; count++; }
        steps[thread_index()] = count;
        block_barrier();
        y[thread_index()] = steps[255 - thread_index()];
    }"""

    def steps(value: int) -> int:
        count = 0
        while value != 1:
            value, count = (3 * value + 1 if value % 2 else value // 2), count + 1
        return count

    x, y = np.arange(1, 257, dtype=np.uint32), np.zeros(256, np.uint32)
    kernel(clang, text, arch).launch([In(x), Out(y)], (1, 1, 1), 256)
    assert y.tolist() == [steps(value) for value in range(256, 0, -1)]


@pytest.mark.parametrize("arch", TARGETS)
def test_pairs_of_float16(clang: Clang, arch: str) -> None:
    """Packed fused multiply-add, one half negated, and the dot product with a float32 sum."""
    lanes = TARGETS[arch].wave_size
    text = """
    extern "C" __global__ void __launch_bounds__(64) k(const f16x2* x, f16x2* y, float* z) {
        const f16x2 a = x[thread_index()], b = x[64 + thread_index()], c = x[128 + thread_index()];
        y[thread_index()] = __builtin_elementwise_fma(a, f16x2{b.y, b.x}, -c);
        z[thread_index()] = dot2(a, b, 1.0f) + __builtin_fmaf((float)a.y, (float)b.x, (float)c.y);
    }"""
    x = np.random.default_rng(SEED).standard_normal((3, 64, 2)).astype(np.float16)
    y, z = np.zeros((lanes, 2), np.float16), np.zeros(lanes, np.float32)
    counts = kernel(clang, text, arch).launch([In(x), Out(y), Out(z)], (1, 1, 1), lanes)
    a, b, c = x[:, :lanes].astype(np.float64)
    assert np.array_equal(y, (a * b[:, ::-1] - c).astype(np.float16))
    exact = (a * b).sum(1) + 1 + a[:, 1] * b[:, 0] + c[:, 1]
    assert np.abs(z - exact).max() < 2.0**-24 * 4 * 16
    assert any("pk_fma_f16" in name for name in counts.instructions)
    assert any("dot2" in name for name in counts.instructions)


@pytest.mark.parametrize("arch", TARGETS)
def test_pairs_of_float32_from_two_registers(clang: Clang, arch: str) -> None:
    """One move for two words of different sources, where there is one (CDNA)."""
    text = """
    typedef float floats2 __attribute__((ext_vector_type(2)));
    extern "C" __global__ void __launch_bounds__(64) k(const floats2* x, floats2* y) {
        const floats2 a = x[thread_index()] * 3.0f, b = x[64 + thread_index()] * 5.0f;
        y[thread_index()] = __builtin_shufflevector(a, b, 1, 2) + __builtin_shufflevector(b, a, 0, 3);
    }"""
    lanes = TARGETS[arch].wave_size
    x = np.random.default_rng(SEED).integers(0, 99, (2, 64, 2)).astype(np.float32)
    y = np.zeros((lanes, 2), np.float32)
    counts = kernel(clang, text, arch).launch([In(x), Out(y)], (1, 1, 1), lanes)
    a, b = x[0, :lanes] * 3, x[1, :lanes] * 5
    assert lanes == 32 or any("pk_mov" in name for name in counts.instructions)
    assert np.array_equal(y, np.stack((a[:, 1] + b[:, 0], b[:, 0] + a[:, 1]), 1))


@pytest.mark.parametrize("arch", TARGETS)
def test_scalar_float_arithmetic(clang: Clang, arch: str) -> None:
    """In scalar registers on RDNA4, in vector registers elsewhere."""
    text = """
    extern "C" __global__ void __launch_bounds__(64) k(float* y, float a, float b, float c) {
        const float sum = __builtin_fmaf(a, b, c);
        y[thread_index()] = __builtin_fmaxf(sum, a - b) * __builtin_fminf(c, a) + (a * b - c);
    }"""
    lanes = TARGETS[arch].wave_size
    a, b, c = np.float32(1.25), np.float32(-3.5), np.float32(0.75)
    y = np.zeros(lanes, np.float32)
    bits = [int(value.view(np.uint32)) for value in (a, b, c)]
    kernel(clang, text, arch).launch([Out(y), *bits], (1, 1, 1), lanes)
    assert y.tolist() == [float(max(a * b + c, a - b) * min(c, a) + (a * b - c))] * lanes


@pytest.mark.parametrize("arch", TARGETS)
def test_the_dispatch_packet_says_how_large_the_launch_is(clang: Clang, arch: str) -> None:
    text = """
    extern "C" __global__ void __launch_bounds__(128) k(u32* y) {
        const Index size = grid_size(128);
        if (thread_index() == 0) y[(block_z() * size.y + block_y()) * size.x + block_x()] = size.x << 16 | size.y;
    }"""
    y = np.zeros((2, 3, 5), np.uint32)
    kernel(clang, text, arch).launch([Out(y)], (5, 3, 2), 128)
    assert (y == (5 << 16 | 3)).all()


@pytest.mark.parametrize("arch", TARGETS)
def test_workgroups_know_where_they_are(clang: Clang, arch: str) -> None:
    text = """
    extern "C" __global__ void __launch_bounds__(64) k(u32* y) {
        if (thread_index() == 0) y[block_y() * 5 + block_x()] = block_y() << 16 | block_x();
    }"""
    y = np.zeros((3, 5), np.uint32)
    kernel(clang, text, arch).launch([Out(y)], (5, 3, 1), 64)
    assert y.tolist() == [[row << 16 | column for column in range(5)] for row in range(3)]
