"""Device code without a matrix unit, the same for every vendor: text, in CUDA's and HIP's common language.

    fused_*.cu    the operators of `awq_rt.ops`
    exllama*.cu   a linear in ExLlama's form: its product, and the weight dequantised
    *.cuh         what they share

A backend compiles them beside a folder of its own with one file, `platform.cuh`: integer types, the number of lanes of
a wave, and the functions that activations.cuh, fused.cuh and exllama.cuh name at their heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..rtc import Program

SOURCES = Path(__file__).parent


def program(name: str, arch: str, defines: Mapping[str, str | int], platform: Path) -> Program:
    """`NAME.cu`, whose one kernel has the same name, with the `platform.cuh` that lies in the folder `platform`."""
    return Program.from_file(SOURCES / f"{name}.cu", arch, defines, folders=(platform,))
