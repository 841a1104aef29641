"""The architectures that the kernels are compiled for, by the exact name that the driver gives (`gcnArchName`).

Code for one architecture is never run on another of its family: each is compiled for by its own name. One that is not
listed but belongs to a family whose vector instructions the kernels use gets the variant without a matrix unit.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from awq_rt.devices import Device, Refusal

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
CDNA = ("gfx90a", "gfx942", "gfx950")
RDNA3 = ("gfx1100", "gfx1101", "gfx1102", "gfx1103")
RDNA4 = ("gfx1200", "gfx1201")
VECTOR_ONLY = re.compile(r"gfx(103[0-9a-f]|11[0-9a-f]{2}|120[0-9a-f])$")
"""Families with v_dot2_f32_f16, v_perm_b32 and packed float16, whose matrix unit (if any) nobody has checked here."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the host half must know of a GPU. `matrix` is its matrix unit by the names of kernels/matrix.h, or ""."""

    name: str
    wave_size: int
    matrix: str


def architecture(gcn_arch_name: str) -> Architecture | None:
    """What `gcnArchName` stands for (`gfx90a:sramecc+:xnack-`); None when the kernels do not run there."""
    name = gcn_arch_name.split(":")[0]
    wave_size = 64 if name.startswith("gfx9") else 32
    if name in CDNA:
        return Architecture(name, wave_size, "mfma")
    if name in RDNA3:
        return Architecture(name, wave_size, "wmma repeated")
    if name in RDNA4:
        return Architecture(name, wave_size, "wmma split")
    return Architecture(name, wave_size, "") if VECTOR_ONLY.match(name) else None


def refusal(device: Device) -> Refusal | None:
    """Why the kernels do not run on `device`; None when they do."""
    found = architecture(device.arch)
    overridden = os.environ.get(OVERRIDE)
    if found is None:
        hint = f"; unset {OVERRIDE}, which is {overridden}" if overridden else ""
        known = ", ".join((*CDNA, "gfx103x", "gfx11xx", "gfx120x"))
        return Refusal(
            "AWQ-ROCM-011",
            f"{device} is not among the architectures that the kernels are written for: {known}{hint}",
            "use backend='reference' on this GPU",
        )
    if device.wave_size not in (1, found.wave_size):
        return Refusal(
            "AWQ-ROCM-015",
            f"{device} reports waves of {device.wave_size} lanes; {found.name} has {found.wave_size}",
            f"unset {OVERRIDE}, which is {overridden}" if overridden else "update the amdgpu driver",
        )
    if overridden and not _names(overridden, found.name):
        return Refusal(
            "AWQ-ROCM-019",
            f"{OVERRIDE} is {overridden}, and {device} is {found.name}: ROCm is told of another GPU than there is",
            f"unset {OVERRIDE}; these kernels are compiled for the GPU as it is",
        )
    return None


def _names(override: str, name: str) -> bool:
    """Whether `11.0.0` stands for `gfx1100`."""
    parts = override.split(".")
    return len(parts) == 3 and name == f"gfx{parts[0]}{parts[1]}" + "".join(f"{int(part):x}" for part in parts[2:])
