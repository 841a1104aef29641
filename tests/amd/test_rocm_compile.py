"""Every kernel that selection may choose compiles for every target: no spill, within ceilings, with what it is for."""

from __future__ import annotations

import pytest
from amdsim import TARGETS, CodeObject
from amdsim.toolchain import Clang, compilers

pytest.importorskip("awq_rt_rocm", reason="awq-rt-rocm is not installed")
import rocm_resources

from awq_rt.packing import Kind
from awq_rt.rtc import Program

VGPRS = 256
"""Of a lane: what a wave may have without spilling, everywhere. Half of it lets two waves share a SIMD."""
LDS_BYTES = 32 << 10
"""Half of the smallest compute unit's, so that two blocks fit."""
USUAL = (Kind(True, 0, 128), Kind(False, 1, 128))
OTHERS = (Kind(True, 0, 64), Kind(False, 1, 32), Kind(True, 2, 32), Kind(False, 2, 8), Kind(True, 1, 24))


@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_compiles_without_a_spill_and_with_what_it_is_for(clang: Clang, arch: str) -> None:
    for number, kind in enumerate((*USUAL, *OTHERS)):
        if kind in OTHERS and number - len(USUAL) != list(TARGETS).index(arch) % len(OTHERS):
            continue  # one of the rarer kinds on each target
        for built in rocm_resources.build(clang, kind, arch):
            needs = next(iter(built.code.kernels.values()))
            assert (needs.spills, needs.scratch_bytes) == (0, 0), built.name
            assert needs.vgprs <= VGPRS, built.name
            assert needs.lds_bytes <= LDS_BYTES, built.name
            assert built.missing == [], built.name


@pytest.mark.parametrize("arch", TARGETS)
def test_every_fused_operator_compiles_without_a_spill(clang: Clang, arch: str) -> None:
    """In float16 on half of the targets, in bfloat16 on the others."""
    for built in rocm_resources.build_operators(clang, list(TARGETS).index(arch) % 2 == 0, arch):
        needs = next(iter(built.code.kernels.values()))
        assert (needs.spills, needs.scratch_bytes) == (0, 0), built.name
        assert needs.vgprs <= VGPRS, built.name
        assert needs.lds_bytes <= LDS_BYTES, built.name
        assert built.missing == [], built.name


@pytest.mark.parametrize("arch", TARGETS)
def test_the_kernels_of_decoding_leave_room_for_a_second_wave(clang: Clang, arch: str) -> None:
    for kind in USUAL:
        chosen = rocm_resources.decoding_variant(kind, arch)
        code = CodeObject.parse(clang.compile(chosen.program(kind, arch)))
        assert next(iter(code.kernels.values())).vgprs <= VGPRS // 2, f"{chosen}"


@pytest.mark.parametrize("arch", TARGETS)
def test_a_second_compiler_agrees(clang: Clang, arch: str) -> None:
    others = [other for other in compilers() if other != clang and other.knows(arch)]
    if not others:
        pytest.skip(f"no second compiler for {arch} is installed")
    for built in rocm_resources.build(others[0], USUAL[0], arch):
        needs = next(iter(built.code.kernels.values()))
        assert (needs.spills, needs.scratch_bytes, built.missing) == (0, 0, []), built.name


def test_no_kernel_includes_a_vendors_header_and_one_file_tells_platforms_apart() -> None:
    for file in sorted((rocm_resources.ROOT / "backends/rocm/awq_rt_rocm/kernels").iterdir()):
        text = file.read_text()
        assert "#include <" not in text, file.name
        assert file.name == "platform.h" or "__gfx" not in text, file.name
        assert Program.from_file(file, "gfx942", {}).sources
