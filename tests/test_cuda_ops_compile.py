"""The kernels of the fused operators compile for every architecture, without a GPU and without a spill."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
from awq_rt.ops import AttentionSpec
from awq_rt.rtc import Program
from awq_rt_cuda import nvrtc
from awq_rt_cuda.fused import attention, gated, greedy, logits, norm, rope
from awq_rt_cuda.fused.heads import HEAD_DIMS, serves_spec
from awq_rt_cuda.fused.launch import program
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
LLAMA_2 = AttentionSpec(32, 32, 128, 0.1, 128)
LLAMA_3 = AttentionSpec(32, 8, 128, 0.1, 128)
OTHERS = {
    "gemma 2": AttentionSpec(16, 8, 256, 0.1, 256, window=4096, softcap=50.0),
    "qwen 3": AttentionSpec(32, 8, 128, 0.1, 128, norm_eps=1e-6),
    "qwen 2": AttentionSpec(28, 4, 128, 0.1, 128),
    "gpt-j": AttentionSpec(16, 16, 256, 0.1, 64, interleaved=True),
    "phi 2": AttentionSpec(32, 32, 80, 0.1, 32),
    "falcon": AttentionSpec(71, 1, 64, 0.1, 64),
    "gemma": AttentionSpec(8, 1, 256, 0.1, 256),
}


def spilled(program: Program) -> int:
    """Bytes of a thread that live in memory instead of registers: spills, and arrays with run-time indices."""
    _, log = nvrtc.compile_with_log(program, "--ptxas-options=-v")
    return sum(map(int, re.findall(r"(\d+) bytes (?:spill stores|stack frame)", log)))


@pytest.mark.parametrize("name", TARGETS)
def test_usual_shapes_compile_everywhere(name: str) -> None:
    target = TARGETS[name]
    arch = f"sm_{target.arch}"
    programs = [
        *attention.programs(LLAMA_2, 1, False, target, arch),
        *attention.programs(LLAMA_3, 0, False, target, arch),
        program("fused_rope", arch, rope.defines(LLAMA_3, 1)),
        program("fused_norm", arch, norm.defines(4096, 1, 1)),
        program("fused_gated", arch, gated.defines(11008, 0, "silu")),
        *logits.programs(4096, 1, arch),
        program("fused_argmax", arch, greedy.defines(0, greedy.parts_of(target))),
    ]
    assert {str(p): s for p in programs if (s := spilled(p))} == {}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("target", ["A100", "H100"])
def test_other_models_compile(name: str, target: str) -> None:
    spec, arch = OTHERS[name], f"sm_{TARGETS[target].arch}"
    programs = attention.programs(spec, 1, name == "falcon", TARGETS[target], arch)
    programs.append(program("fused_rope", arch, rope.defines(spec, 1)))
    assert {str(p): s for p in programs if (s := spilled(p))} == {}


def test_logits_of_every_width_compile() -> None:
    programs = [program for hidden in (8, 896, 3584, 8192, 16384) for program in logits.programs(hidden, 0, "sm_90")]
    assert len(programs) == 3 + 3 + 3 + 2 + 1
    assert {str(p): s for p in programs if (s := spilled(p))} == {}


def test_every_activation_and_width_of_a_norm_compiles() -> None:
    programs = [program("fused_gated", "sm_90", gated.defines(11008, 1, a)) for a in gated.ACTIVATIONS]
    programs += [program("fused_norm", "sm_90", norm.defines(h, 1, 1)) for h in (8, 264, 5120, 16384, 32768)]
    assert {str(p): s for p in programs if (s := spilled(p))} == {}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_parts_leave_room_for_the_next_kernel(name: str, rows: int) -> None:
    target = TARGETS[name]
    for spec in (LLAMA_2, LLAMA_3, *OTHERS.values()):
        blocks = attention.blocks_of(spec) * rows
        parts = attention.parts_of(rows, spec, target)
        assert parts in (1, 2, 4, 8)
        assert parts == 1 or parts * blocks <= target.multiprocessors
        assert parts == attention.MOST_PARTS or 2 * parts * blocks > target.multiprocessors


def test_every_group_of_heads_is_served_whole() -> None:
    for head_dim in HEAD_DIMS:
        for sharing in range(1, 72):
            spec = AttentionSpec(2 * sharing, 2, head_dim, 0.1)
            cut = attention.cut_of(spec)
            assert cut.group * attention.blocks_of(spec) >= 2 * sharing
            assert cut.unit == "mma" or sharing % cut.group == 0


def test_rotations_that_leave_a_lane_are_declined() -> None:
    assert serves_spec(LLAMA_2)
    assert not serves_spec(AttentionSpec(32, 32, 96, 0.1, 24))
    assert not serves_spec(AttentionSpec(32, 32, 32, 0.1, 32))
    assert not serves_spec(AttentionSpec(32, 5, 128, 0.1, 128))
