"""Code objects: what the compiler notes in them, and what is no code object."""

from __future__ import annotations

import pytest
from amdsim import TARGETS, CodeObject, Unmodelled
from amdsim.disassembly import branch_target, parse
from amdsim.toolchain import Clang, compilers
from device_code import compiled, source

from awq_rt.rtc import CompileFailed

SPILL = """
extern "C" __global__ void __launch_bounds__(1024) k(const float* x, float* y) {
    float many[400];
    for (int i = 0; i < 400; i++) many[i] = x[i * 1024 + thread_index()];
    block_barrier();
    for (int i = 0; i < 400; i++) y[i * 1024 + thread_index()] = many[i] * many[399 - i];
}
"""


@pytest.mark.parametrize("arch", TARGETS)
def test_a_kernels_needs_are_read(clang: Clang, arch: str) -> None:
    text = """
    extern "C" __global__ void __launch_bounds__(64) k(const float* x, u32 n, u64 m) {
        __shared__ float shared[100];
        shared[thread_index()] = x[n + m];
        block_barrier();
        const_cast<float*>(x)[0] = shared[63 - thread_index()];
    }"""
    code = compiled(clang, text, arch)
    kernel = code.kernels["k"]
    assert code.target == arch
    assert kernel.wave_size == TARGETS[arch].wave_size
    assert (kernel.lds_bytes, kernel.scratch_bytes, kernel.spills) == (400, 0, 0)
    given = [(a.offset, a.size) for a in kernel.arguments if not a.kind.startswith("hidden")]
    assert given == [(0, 8), (8, 4), (16, 8)]


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_spills_are_counted(clang: Clang, arch: str) -> None:
    kernel = compiled(clang, SPILL, arch).kernels["k"]
    assert kernel.spills > 0 or kernel.scratch_bytes > 0


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x02" + bytes(100), b"GIF89a" + bytes(100)])
def test_what_is_no_code_object_is_refused(content: bytes) -> None:
    with pytest.raises(Unmodelled, match="no ELF64 file for AMD"):
        CodeObject.parse(content)


def test_a_refused_kernel_shows_log_and_options(clang: Clang) -> None:
    with pytest.raises(CompileFailed, match=r"(?s)test\.hip gfx90a.*--offload-arch=gfx90a.*error"):
        clang.compile(source("this is no kernel", "gfx90a"))


def test_the_second_compiler_makes_the_same_kernel(clang: Clang) -> None:
    others = [other for other in compilers() if other != clang]
    if not others:
        pytest.skip("only one compiler is installed")
    for arch in TARGETS:
        if others[0].knows(arch):
            assert compiled(others[0], SPILL, arch).kernels["k"].lds_bytes == 0


def test_operands_and_modifiers_are_told_apart() -> None:
    found = parse("v_pk_fma_f16 v30, v29, -v[3:4], s[0:1] op_sel:[1,0,0] clamp")
    assert found.operands == ("v30", "v29", "-v[3:4]", "s[0:1]")
    assert found.modifiers == {"op_sel": "[1,0,0]", "clamp": ""}
    assert parse("s_endpgm").operands == ()


def test_branches_count_words_from_the_next_instruction() -> None:
    assert branch_target(parse("s_branch 3", 100)) == 116
    assert branch_target(parse("s_branch 65535", 100)) == 100
