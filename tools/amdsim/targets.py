"""What the simulator knows of each architecture."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import Unmodelled


@dataclass(frozen=True, slots=True)
class Target:
    """Facts of one architecture, from AMD's instruction set manuals and LLVM's AMDGPU usage guide."""

    name: str
    wave_size: int
    lds_bytes: int
    packed_workitem_id: bool  # x, y and z share v0, ten bits each
    workgroup_id_in_ttmp: bool  # x in ttmp9, y and z in ttmp7, instead of SGPRs after the user's
    matrix: str  # "mfma", "wmma" (operands repeated in both halves), "wmma12", or ""
    flushes_matrix_inputs: bool = False  # MFMA takes subnormal float16 and bfloat16 inputs for zero

    @property
    def generation(self) -> int:
        """9, 10, 11 or 12."""
        return int(self.name[3:-2])


TARGETS = {
    target.name: target
    for target in (
        Target("gfx90a", 64, 64 << 10, True, False, "mfma", flushes_matrix_inputs=True),
        Target("gfx942", 64, 64 << 10, True, False, "mfma"),
        Target("gfx950", 64, 160 << 10, True, False, "mfma"),
        Target("gfx1030", 32, 64 << 10, False, False, ""),
        Target("gfx1100", 32, 64 << 10, True, False, "wmma"),
        Target("gfx1201", 32, 64 << 10, True, True, "wmma12"),
    )
}


def target_of(name: str) -> Target:
    """The target called `name`. Raises `Unmodelled` for any other than the six."""
    if name not in TARGETS:
        raise Unmodelled(f"target {name!r} is not modelled; one of {', '.join(TARGETS)} is expected")
    return TARGETS[name]
