"""Compilers of freestanding HIP that need neither ROCm nor a GPU: ziglang's clang from PyPI, or Debian's clang-19.

Either implements `awq_rt.rtc.Compiler`, so that it can stand in for hipRTC. They compile the same text with the same
defines; what hipRTC of a given ROCm makes of it may differ in detail.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from awq_rt.rtc import CompileFailed, Program

OPTIONS = (
    "-x", "hip", "--offload-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib",
    "-std=c++17", "-O3", "-mcode-object-version=5", "-Werror", "-Wall", "-Wno-unused-command-line-argument",
)  # fmt: skip
LINKER = """#!/bin/sh
while [ "$1" = -flavor ] || [ "$1" = gnu ]; do shift; done
exec "{zig}" ld.lld "$@"
"""
TIME_LIMIT_S = 300


@dataclass(frozen=True, slots=True)
class Clang:
    """A clang as a command line; `version` names it in cache keys."""

    command: tuple[str, ...]
    version: str

    def compile(self, program: Program) -> bytes:
        """The code object. Raises `CompileFailed` with what the compiler said."""
        return compile_with_log(self, program)[0]

    def knows(self, arch: str) -> bool:
        """Debian's clang-19 does not know gfx950."""
        return not (arch == "gfx950" and "19." in self.version)


def compile_with_log(clang: Clang, program: Program) -> tuple[bytes, str]:
    """The code object of `program` and what the compiler said."""
    with tempfile.TemporaryDirectory(prefix="awq_rt-clang-") as name:
        folder = Path(name)
        for file, text in program.sources:
            (folder / file).write_text(text)
        _write_linker(folder)
        defines = [f"-D{define}={value}" for define, value in program.defines]
        command = [
            *clang.command,
            f"-B{folder}",
            *OPTIONS,
            f"--offload-arch={program.arch}",
            *program.options,
            *defines,
        ]
        command += [str(folder / program.name), "-o", str(folder / "out.hsaco")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
        said = done.stdout + done.stderr
        if done.returncode:
            raise CompileFailed(f"{clang.version} refused {program} with {' '.join(command)}:\n{said}")
        return (folder / "out.hsaco").read_bytes(), said


def _write_linker(folder: Path) -> None:
    """clang runs a program named lld; ziglang's is a subcommand of its own."""
    if (zig := _zig()) is None:
        return
    for name in ("lld", "ld.lld"):
        file = folder / name
        file.write_text(LINKER.format(zig=zig))
        file.chmod(0o755)


def _zig() -> Path | None:
    """The program in ziglang's wheel. `python -m ziglang` would start it too, after an interpreter."""
    spec = importlib.util.find_spec("ziglang")
    return None if spec is None or spec.origin is None else Path(spec.origin).with_name("zig")


@functools.cache
def compilers() -> tuple[Clang, ...]:
    """Those that are installed, the preferred one first."""
    found = []
    if (zig := _zig()) is not None:
        command = (str(zig), "clang")
        found.append(Clang(command, _version(command)))
    if program := shutil.which("clang-19"):
        found.append(Clang((program,), _version((program,))))
    return tuple(found)


def _version(command: tuple[str, ...]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()[0].strip()
