"""What every fused operator needs of the host: which tensors it serves, its kernel, and the launch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from awq_rt import kernels
from awq_rt.kernels import launcher
from awq_rt.kernels.launcher import HALF, bits
from awq_rt.rtc import Program

from ..driver import Kernel, Shape, current_stream
from ..gemm import KERNELS
from ..nvrtc import target
from ..tiled import builder, target_of


def serves(x: Tensor) -> bool:
    """Whether kernels can read `x`: 16-bit floats on a GPU, contiguous, in whole loads of 16 bytes."""
    return x.is_cuda and launcher.serves(x)


def program(name: str, arch: str, defines: Mapping[str, str | int]) -> Program:
    """`NAME.cu` of `kernels/`, or of the core's; its one kernel has the same name."""
    own = KERNELS / f"{name}.cu"
    if own.exists():
        return Program.from_file(own, arch, defines, folders=(kernels.SOURCES,))
    return kernels.program(name, arch, defines, KERNELS)


def load(name: str, defines: Mapping[str, str | int], arguments: int, device_index: int) -> Kernel:
    """That program compiled and loaded."""
    code = builder().machine_code(program(name, arch_of(device_index), defines))
    return Kernel(code, name, device_index, arguments)


@functools.cache
def arch_of(device_index: int) -> str:
    """What kernels for this device are compiled for."""
    return target(f"sm_{target_of(device_index).arch}")


def ordinary(kernel: Kernel) -> Kernel:
    """`kernel`, started when all before it in the stream have ended, even where others start early."""
    later = copy.copy(kernel)
    later.overlap = False
    return later


def launch(kernel: Kernel, shape: Shape, device_index: int, *arguments: int) -> None:
    """Start `kernel` on its device's current stream."""
    if device_index == torch.cuda.current_device():
        kernel.launch(shape, current_stream(device_index), *arguments)
    else:
        with torch.cuda.device(device_index):
            kernel.launch(shape, current_stream(device_index), *arguments)


__all__ = ["HALF", "arch_of", "bits", "launch", "load", "ordinary", "program", "serves"]
