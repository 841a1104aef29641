"""Every kernel that selection may choose compiles for every target: no spill, within ceilings, with what it is for."""

from __future__ import annotations

import pytest
from amdsim import TARGETS, CodeObject
from amdsim.toolchain import Clang

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


@pytest.mark.parametrize("card", rocm_resources.CARDS, ids=lambda card: card.name)
def test_decoding_leaves_the_vector_units_free_for_two_fifths_of_the_time(
    clang: Clang, card: rocm_resources.Card
) -> None:
    """Of one row, in float16 on half of the cards and in bfloat16 on the others; all of it is in the recorded table."""
    half = rocm_resources.CARDS.index(card) % 2 == 0
    (task,) = (task for task in rocm_resources.tasks_of(card) if task.decodes and task.kind.half == half)
    found = task.shares()
    assert found.error <= 1
    assert found.issue_share <= rocm_resources.GOAL
    assert max(found.matrix_share, found.lds_share) < 1


def test_no_kernel_includes_a_vendors_header_and_one_file_tells_platforms_apart() -> None:
    for file in sorted((rocm_resources.ROOT / "backends/rocm/awq_rt_rocm/kernels").iterdir()):
        text = file.read_text()
        assert "#include <" not in text, file.name
        assert file.name == "platform.h" or "__gfx" not in text, file.name
        assert Program.from_file(file, "gfx942", {}).sources
