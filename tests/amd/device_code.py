"""Small kernels for the tests of the simulator, with the backend's own platform header in front."""

from __future__ import annotations

import functools
from pathlib import Path

from amdsim import CodeObject, Program
from amdsim.toolchain import Clang

from awq_rt.rtc import Program as Source

KERNELS = Path(__file__).resolve().parents[2] / "backends" / "rocm" / "awq_rt_rocm" / "kernels"


def source(body: str, arch: str, **defines: int) -> Source:
    """A translation unit of `body`."""
    text = f'#include "platform.h"\n{body}'
    ordered = tuple(sorted((name, str(value)) for name, value in defines.items()))
    return Source((("test.hip", text), ("platform.h", (KERNELS / "platform.h").read_text())), ordered, arch)


@functools.cache
def compiled(clang: Clang, body: str, arch: str, **defines: int) -> CodeObject:
    """The code object of `body`."""
    return CodeObject.parse(clang.compile(source(body, arch, **defines)))


def kernel(clang: Clang, body: str, arch: str, **defines: int) -> Program:
    """The only kernel of `body`, ready to run."""
    code = compiled(clang, body, arch, **defines)
    return Program(code, next(iter(code.kernels)))
