"""Implements `awq_rt.kernels.launcher.Launcher`: the kernels that vendors share, on AMD GPUs."""

from __future__ import annotations

from torch import Tensor

from awq_rt import kernels
from awq_rt.kernels.launcher import Defines
from awq_rt.rtc import Program

from . import device, driver
from .driver import Kernel, Shape
from .kernel import KERNELS


class HipLauncher:
    """Through hip-python."""

    def device_index(self, x: Tensor) -> int | None:
        return x.get_device() if x.is_cuda else None

    def lanes(self, device_index: int) -> int:
        return device.architecture_of(device_index).wave_size

    def multiprocessors(self, device_index: int) -> int:
        return device.compute_units(device_index)

    def program(self, name: str, defines: Defines, device_index: int) -> Program:
        return kernels.program(name, device.architecture_of(device_index).name, defines, KERNELS)

    def load(self, program: Program, arguments: int, device_index: int) -> Kernel:
        code = device.builder().machine_code(program)
        return Kernel(code, program.name.removesuffix(".cu"), device_index, arguments)

    def launch(
        self,
        kernel: Kernel,
        device_index: int,
        grid: tuple[int, int, int],
        threads: int,
        *arguments: int,
        shared_bytes: int = 0,
    ) -> None:
        with driver.entered(device_index):
            stream = driver.current_stream(device_index)
            kernel.launch(Shape(grid, threads, shared_bytes), stream, *arguments)
