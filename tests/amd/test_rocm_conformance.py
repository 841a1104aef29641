"""The conformance suite on every target: the backend's own host code over a fake HIP runtime and the simulator.

Compiled and simulated, not run on hardware. All checks of `auto` run in float16; the rest is a sample that changes from
target to target, unless AMDSIM_FULL is set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from amdsim.toolchain import Clang

pytest.importorskip("awq_rt_rocm", reason="awq-rt-rocm is not installed")
pytest.importorskip("ziglang", reason="ziglang is not installed, which builds the fake HIP runtime")
import simulated
from simulated import ARCHITECTURES, Machine, SimulatedBackend

from awq_rt.testing import conformance
from awq_rt.testing.cases import WEIGHT_KINDS

FULL = bool(os.environ.get("AMDSIM_FULL"))


@pytest.fixture(scope="module")
def machine(clang: Clang, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with simulated.machine(clang, tmp_path_factory.mktemp("rocm")) as here:
        yield here


def sampled(name: str, family: str, dtype: str, index: int) -> bool:
    """Whether the check `name` is in the sample of target number `index`."""
    kind = next((kind for kind in WEIGHT_KINDS if f": {kind}, K" in name), None)
    if FULL or (family == "auto" and (dtype == "float16" or kind is None)):
        return True
    if family != "auto" and (index + len(dtype)) % 2:
        return False
    return kind is not None and WEIGHT_KINDS.index(kind) == (index + len(family) + len(dtype)) % len(WEIGHT_KINDS)


def sampled_at_all(family: str, dtype: str, index: int) -> bool:
    return any(sampled(f": {kind}, K", family, dtype, index) for kind in WEIGHT_KINDS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", ["auto", "gemv", "gemm", "exllama"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conformance(machine: Machine, arch: str, family: str, dtype: str) -> None:
    machine.index = ARCHITECTURES.index(arch)
    backend = SimulatedBackend(machine, [family] if family != "auto" else [])
    before = len(machine.hip.launched)
    failures, passed = [], 0
    for check in conformance.checks(backend):
        if f", {family}, {dtype}:" not in check.name or not sampled(check.name, family, dtype, machine.index):
            continue
        try:
            passed += check.run() is None
        except conformance.Failure as failure:
            failures.append(f"{check.name}: {failure}")
    assert not failures, "\n".join(failures)
    refused = not sampled_at_all(family, dtype, machine.index) or (family == "gemm" and arch == "gfx1030")
    assert bool(passed) != refused
    assert bool(len(machine.hip.launched) - before) != refused
