"""The family exllama on every target, and faults put into its kernels: each must be noticed.

Compiled and simulated, not run on hardware.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from amdsim import TARGETS, CodeObject, In, Out, Program, SimulationError
from amdsim.toolchain import Clang

pytest.importorskip("awq_rt_rocm", reason="awq-rt-rocm is not installed")
from awq_rt_rocm import exllama
from awq_rt_rocm.kernel import KERNELS

from awq_rt import kernels
from awq_rt.packing import Kind
from awq_rt.packing import exllama as strips
from awq_rt.rtc import Program as Source
from awq_rt.testing import excess, hurtful_weight

ROWS = 5
Fault = tuple[str, str]


def content(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.contiguous().view(torch.uint8).numpy()
    return array


def mutated(source: Source, fault: Fault | None) -> Source:
    if fault is None:
        return source
    old, new = fault
    assert any(old in text for _, text in source.sources), f"{old!r} does not occur any more"
    return replace(source, sources=tuple((name, text.replace(old, new)) for name, text in source.sources))


def error(clang: Clang, arch: str, dtype: torch.dtype, group_size: int, fault: Fault | None = None) -> float:
    """The largest error over its bound, for a depth that no wave divides. Raises what the simulator raises."""
    k, n = 26 * group_size if group_size == 8 else 3 * group_size, 40
    weight = hurtful_weight("random", k, n, group_size, scale_dtype=dtype, bias=True)
    assert weight.bias is not None
    kind = Kind(dtype == torch.float16, 0 if dtype == torch.float16 else 1, group_size)
    variant = exllama.Variant(2, 2)
    source = mutated(kernels.program("exllama", arch, variant.defines(kind), KERNELS), fault)
    x = torch.randn(ROWS, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.zeros(ROWS, n, dtype=dtype)
    tensors = [strips.pack_codes(weight.codes), strips.pack_scales(weight.scales), strips.pack_zeros(weight.zeros)]
    given = [*(In(content(tensor)) for tensor in (*tensors, weight.bias.float(), x)), Out(content(y)), ROWS, n, k]
    counts = Program(CodeObject.parse(clang.compile(source)), "exllama").launch(
        given,
        variant.grid(ROWS, n),
        variant.waves * TARGETS[arch].wave_size,
        dynamic_lds_bytes=variant.shared_bytes,
    )
    return float("inf") if counts.unwritten[5] else excess(y, x, weight)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [8, 128])
def test_the_product_is_right(clang: Clang, arch: str, dtype: torch.dtype, group_size: int) -> None:
    assert error(clang, arch, dtype, group_size) <= 1


FAULTS: dict[str, Fault] = {
    "a barrier is missing": ("    __syncthreads();\n    for (u32 quad", "    for (u32 quad"),
    "the shuffle is another": ("word_of(words[i], c) >> h * 8", "word_of(words[i], c) >> h * 4"),
    "a column takes its neighbour's zero point": ("zeros >> c * 4 & 15u", "zeros >> (c ^ 1) * 4 & 15u"),
    "a column beyond the last is stored": ("        if (to >= n) continue;\n", ""),
    "a row beyond the last is read": ("if (row < rows && depth < k)", "if (depth < k)"),
    "a row's end is not minded": ("if (row < rows && depth < k)", "if (row < rows)"),
    "every group is the first": ("* 8 / kGroupSize, groups - 1) * 2", "* 0 / kGroupSize, groups - 1) * 2"),
    "the last exchange between lanes is left out": ("mask < kLanes; mask *= 2", "mask < kLanes / 2; mask *= 2"),
    "a wave takes the x of the other": ("fetch_x(wave);", "fetch_x(0);"),
    "the bias is forgotten": ("if (bias != nullptr)", "if (false)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_product_are_noticed(clang: Clang, name: str) -> None:
    arch = list(TARGETS)[list(FAULTS).index(name) % len(TARGETS)]
    with contextlib.suppress(SimulationError):
        assert not error(clang, arch, torch.float16, 8, FAULTS[name]) <= 1


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100"])
def test_dequantising_is_exact_and_its_faults_are_noticed(clang: Clang, arch: str) -> None:
    k, n, group_size = 200, 40, 8
    weight = hurtful_weight("wide scales", k, n, group_size)
    exact = weight.dequantize(torch.float32).half()
    faults = (
        None,
        ("    if (!there) return;\n", ""),
        ("row * 8 + h * 4 + j", "row * 8 + h * 4 + (j ^ 1)"),
        ("zero[c / 4]", "zero[0]"),
    )
    lanes = TARGETS[arch].wave_size
    for fault in faults:
        source = kernels.program("exllama_dequantize", arch, Kind(True, 0, group_size).defines(), KERNELS)
        code = CodeObject.parse(clang.compile(mutated(source, fault)))
        w = torch.zeros(k, n, dtype=torch.float16)
        tensors = [strips.pack_codes(weight.codes), strips.pack_scales(weight.scales), strips.pack_zeros(weight.zeros)]
        given = [*(In(content(tensor)) for tensor in tensors), Out(content(w)), n, k]
        grid, threads = exllama.dequantize_grid(n, k, lanes), exllama.DEQUANTIZE_WAVES * lanes
        try:
            Program(code, "exllama_dequantize").launch(given, grid, threads)
        except SimulationError:
            assert fault is not None
        else:
            assert torch.equal(w, exact) == (fault is None), fault
