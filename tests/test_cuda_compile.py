"""Every kernel that selection may choose compiles for every architecture, without a GPU and without a spill."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
from awq_rt.packing import Kind, Layout
from awq_rt.packing.exllama import PREFIX
from awq_rt.rtc import CompileFailed, Program
from awq_rt.testing import hurtful_weight
from awq_rt.testing.conformance import spec_of
from awq_rt_cuda import backend, dequantize, exllama, gemm, nvrtc, selection
from awq_rt_cuda.selection import Target

KIB = 1024
TARGETS = {
    "A100": Target(80, 108, 163 * KIB, 164 * KIB, 2048),
    "RTX 3090": Target(86, 82, 99 * KIB, 100 * KIB, 1536),
    "RTX 4090": Target(89, 128, 99 * KIB, 100 * KIB, 1536),
    "H100": Target(90, 132, 227 * KIB, 228 * KIB, 2048),
    "B200": Target(100, 148, 227 * KIB, 228 * KIB, 2048),
    "RTX 5090": Target(120, 170, 99 * KIB, 100 * KIB, 1536),
}
SHAPES = ((4096, 12288), (11008, 4096), (3584, 512), (64, 8))


def chosen(target: Target, kind: Kind) -> set[gemm.Variant]:
    sizes = [(-(-n // 16), -(-k // 64)) for k, n in SHAPES]
    return {selection.choose(rows, *size, kind, target) for rows in selection.ROW_STEPS for size in sizes}


def spilled(program: Program) -> int:
    _, log = nvrtc.compile_with_log(program, "--ptxas-options=-v")
    return sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))


@pytest.mark.parametrize("name", TARGETS)
def test_the_usual_kinds_compile_without_a_spill(name: str) -> None:
    target = TARGETS[name]
    for kind in (Kind(True, 0, 128), Kind(False, 1, 128)):
        spills = {str(v): spilled(v.program(kind, f"sm_{target.arch}")) for v in chosen(target, kind)}
        assert not any(spills.values()), spills


@pytest.mark.parametrize("kind", [Kind(True, 0, 64), Kind(True, 0, 32), Kind(True, 0, 16), Kind(False, 2, 128)])
def test_other_groups_and_scales_compile_without_a_spill(kind: Kind) -> None:
    target = TARGETS["H100"]
    spills = {str(v): spilled(v.program(kind, "sm_90")) for v in chosen(target, kind)}
    assert not any(spills.values()), spills


@pytest.mark.parametrize("name", TARGETS)
def test_small_kernels_compile(name: str) -> None:
    arch = f"sm_{TARGETS[name].arch}"
    for half in (True, False):
        kind = Kind(half, 1 - half, 32)
        assert spilled(dequantize.program(kind, arch)) == 0
        assert spilled(gemm.sum_program(kind, 4, arch)) == 0


@pytest.mark.parametrize("name", TARGETS)
def test_exllama_compiles_without_a_spill(name: str) -> None:
    target = TARGETS[name]
    kinds = [(torch.float16, 128), (torch.bfloat16, 64)] if name == "H100" else [(torch.float16, 128)]
    for dtype, group_size in kinds:
        layouts = (Layout(PREFIX, 4096, n, group_size, dtype, dtype, None, "exllama") for n in (4096, 22016))
        found = (exllama.programs(layout, target.multiprocessors, f"sm_{target.arch}") for layout in layouts)
        spills = {str(program): spilled(program) for programs in found for program in set(programs)}
        assert not any(spills.values()), spills


@pytest.mark.parametrize("name", TARGETS)
def test_every_choice_fits_the_device(name: str) -> None:
    target = TARGETS[name]
    for variant in chosen(target, Kind(True, 0, 128)):
        assert variant.shared_bytes <= target.shared_bytes
        assert variant.threads <= 1024
        assert variant.split == 1 or variant.to_partials != target.clusters


def test_a_pinned_family_stays_in_its_rows() -> None:
    assert {selection.row_step(m, "gemv") for m in (1, 7, 500)} == {1, 8}
    assert {selection.row_step(m, "gemm") for m in (1, 20, 500)} == {16, 32, 128}


def test_a_refused_kernel_shows_log_and_options() -> None:
    with pytest.raises(CompileFailed, match=r"(?s)broken\.cu.*--gpu-architecture=sm_90.*error"):
        nvrtc.compile_with_log(Program((("broken.cu", "this is no kernel"),), (), "sm_90"))


def test_code_for_an_older_minor_serves_a_newer_device() -> None:
    assert nvrtc.target("sm_89") == "sm_89"
    with pytest.raises(CompileFailed, match="sm_30"):
        nvrtc.target("sm_30")


def test_packing_needs_no_compiler_on_a_cpu() -> None:
    weight = hurtful_weight("random", 128, 32, 64)
    assert backend.pack(weight, spec_of(weight, torch.float16), torch.device("cpu")).layout.startswith("tiles")
