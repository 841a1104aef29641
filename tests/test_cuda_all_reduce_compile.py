"""The kernel that sums between GPUs compiles for every architecture, without a GPU and without a spill."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
from awq_rt_cuda import nvrtc
from awq_rt_cuda.fused import all_reduce
from awq_rt_cuda.fused.launch import program

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")
SIZES = ((8192, 2), (4096, 8), (5120, 4), (16384, 2))
"""(features of a row, GPUs)"""


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("half", [0, 1])
def test_it_compiles_without_a_spill(arch: str, half: int) -> None:
    for hidden, gpus in SIZES:
        _, log = nvrtc.compile_with_log(
            program("fused_all_reduce", arch, all_reduce.defines(hidden, half, gpus)), "--ptxas-options=-v"
        )
        assert "fused_all_reduce" in log
        assert sum(map(int, re.findall(r"(\d+) bytes (?:spill stores|stack frame)", log))) == 0
