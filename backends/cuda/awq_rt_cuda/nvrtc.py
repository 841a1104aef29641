"""NVRTC as a run-time compiler: CUDA C++ text in, a cubin for one architecture out. Needs no toolkit and no GPU."""

from __future__ import annotations

import functools
from typing import Any

from cuda.bindings import nvrtc

from awq_rt.rtc import CompileFailed, Program

OPTIONS = ("--std=c++17",)


class Nvrtc:
    """Implements `awq_rt.rtc.Compiler`."""

    @functools.cached_property
    def version(self) -> str:
        major, minor = _checked(nvrtc.nvrtcVersion())
        return f"nvrtc {major}.{minor}"

    def compile(self, program: Program) -> bytes:
        return compile_with_log(program)[0]


def compile_with_log(program: Program, *extra: str) -> tuple[bytes, str]:
    """The cubin of `program` and what the compiler said. Raises `CompileFailed` with log and options."""
    (name, text), *headers = program.sources
    options = [f"--gpu-architecture={program.arch}", *OPTIONS, *program.options, *extra]
    options += [f"-D{define}={value}" for define, value in program.defines]
    handle = _checked(
        nvrtc.nvrtcCreateProgram(
            text.encode(),
            name.encode(),
            len(headers),
            [header.encode() for _, header in headers],
            [header.encode() for header, _ in headers],
        )
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(handle))
        _checked(nvrtc.nvrtcGetProgramLog(handle, log))
        said = log.rstrip(b"\0 ").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileFailed(f"NVRTC refused {name} ({status.name}) with {' '.join(options)}:\n{said}")
        cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(handle))
        _checked(nvrtc.nvrtcGetCUBIN(handle, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(handle)
    return cubin, said


@functools.cache
def target(arch: str) -> str:
    """The newest architecture that NVRTC knows whose code runs on `arch` (`sm_89`): itself, or an older minor.

    Raises `CompileFailed` when there is none.
    """
    known = sorted(_checked(nvrtc.nvrtcGetSupportedArchs()))
    wanted = int(arch.removeprefix("sm_"))
    fitting = [number for number in known if number // 10 == wanted // 10 and number <= wanted]
    if not fitting:
        raise CompileFailed(
            f"{Nvrtc().version} cannot compile for {arch}; it knows {', '.join(f'sm_{n}' for n in known)}; "
            "install a newer nvidia-cuda-nvrtc, or a build of torch for this GPU"
        )
    return f"sm_{fitting[-1]}"


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileFailed(f"NVRTC failed with {status.name}; reinstall nvidia-cuda-nvrtc")
    return values[0] if len(values) == 1 else tuple(values)
