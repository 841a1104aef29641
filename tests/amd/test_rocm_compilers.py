"""What other compilers make of the kernels: Debian's clang-19, whose code is executed too, and its hipRTC of HIP 5.2.

Compiled and simulated, not run on hardware. ROCm's own compilers lie between these (LLVM 15 and 19) and the preferred
one (LLVM 22). Skipped where apt has not installed them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from amdsim import TARGETS
from amdsim.toolchain import Clang, compilers

pytest.importorskip("awq_rt_rocm", reason="awq-rt-rocm is not installed")
pytest.importorskip("ziglang", reason="ziglang is not installed, which builds the fake HIP runtime")
import rocm_resources
import simulated
from awq_rt_rocm import hiprtc
from awq_rt_rocm.launcher import HipLauncher
from simulated import ARCHITECTURES, Machine, SimulatedBackend
from test_rocm_ops import argmax_excess, attention_excess, gated_excess, logits_excess, norm_excess

from awq_rt.kernels.operators import Operators
from awq_rt.packing import Kind
from awq_rt.rtc import Compiler
from awq_rt.testing import excess, hurtful_weight
from awq_rt.testing.conformance import spec_of

KINDS = (Kind(True, 0, 128), Kind(False, 1, 128))
SCRATCH_OF_HIP_5_2 = {"exllama rows 8, bfloat16, group 128": 80}
"""Bytes a lane; no other compiler needs any."""
CHECKS = (norm_excess, gated_excess, logits_excess, argmax_excess, attention_excess)


@pytest.fixture(scope="module")
def second(clang: Clang) -> Clang:
    """Debian's clang-19."""
    found = [other for other in compilers() if other != clang]
    if not found:
        pytest.skip("no second compiler is installed: apt-get install clang-19 lld-19")
    return found[0]


@pytest.fixture(scope="module")
def machine(second: Clang, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with simulated.machine(second, tmp_path_factory.mktemp("rocm")) as here:
        yield here


def built(compiler: Compiler, half: bool, arch: str) -> list[rocm_resources.Built]:
    """Every kernel, tiled, exllama and fused, in one type of activations."""
    found = list(rocm_resources.build(compiler, KINDS[not half], arch))
    return found + list(rocm_resources.build_operators(compiler, half, arch))


@pytest.mark.parametrize("arch", TARGETS)
def test_clang_19_compiles_every_kernel(second: Clang, arch: str) -> None:
    """In float16 on half of the targets, in bfloat16 on the others."""
    if not second.knows(arch):
        pytest.skip(f"{second.version} does not know {arch}")
    for found in built(second, list(TARGETS).index(arch) % 2 == 1, arch):
        needs = next(iter(found.code.kernels.values()))
        assert (needs.spills, needs.scratch_bytes, found.missing) == (0, 0, []), found.name


@pytest.mark.parametrize("arch", TARGETS)
def test_what_clang_19_makes_computes_the_same(second: Clang, machine: Machine, arch: str) -> None:
    """A product of each family, and two of the fused operators."""
    if not second.knows(arch):
        pytest.skip(f"{second.version} does not know {arch}")
    machine.index = index = ARCHITECTURES.index(arch)
    here, dtype = SimulatedBackend(machine), (torch.float16, torch.bfloat16)[index % 2]
    weight = hurtful_weight("random", 384, 40, 64, scale_dtype=dtype, bias=True)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    for family, rows in (("auto", 1), ("auto", 5), ("exllama", 2)):
        packed = here.pack(weight, spec_of(weight, dtype, family), torch.device("cpu"))
        assert excess(here.linear(x[:rows].contiguous(), packed), x[:rows], weight) <= 1, family
    for check in (CHECKS[index % 5], CHECKS[(index + 2) % 5]):
        assert check(machine, Operators(HipLauncher())) <= 1, check.__name__


def test_hiprtc_compiles_every_kernel(clang: Clang, debian_hiprtc: hiprtc.Hiprtc) -> None:
    """HIP 5.2 knows two of the targets; the fused operators are compiled for the one with waves of 64."""
    makers = (
        lambda: list(rocm_resources.build(debian_hiprtc, KINDS[0], "gfx90a")),
        lambda: list(rocm_resources.build(debian_hiprtc, KINDS[1], "gfx1030")),
        lambda: list(rocm_resources.build_operators(debian_hiprtc, True, "gfx90a")),
    )
    with ThreadPoolExecutor(2) as pool:
        tables = [pool.submit(make) for make in makers]
    for found in (found for table in tables for found in table.result()):
        needs = next(iter(found.code.kernels.values()))
        assert (needs.spills, found.missing) == (0, []), found.name
        assert needs.scratch_bytes <= SCRATCH_OF_HIP_5_2.get(found.name, 0), found.name
