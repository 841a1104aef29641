"""What a backend brings to the host halves of the shared kernels, and what those ask of tensors."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..rtc import Program

Defines = Mapping[str, str | int]
HALF = {torch.float16: 1, torch.bfloat16: 0}
"""ACTIVATION_HALF in device code."""


class Launcher(Protocol):
    """A backend's GPUs, its compiler and its launches."""

    def device_index(self, x: Tensor) -> int | None:
        """The index of the GPU that `x` lies on; None where it lies elsewhere."""

    def lanes(self, device_index: int) -> int:
        """Lanes of a wave."""

    def multiprocessors(self, device_index: int) -> int:
        """Of the GPU: as many blocks run at once, at least."""

    def program(self, name: str, defines: Defines, device_index: int) -> Program:
        """`NAME.cu` for the GPU."""

    def load(self, program: Program, arguments: int, device_index: int) -> Any:
        """That program's kernel, compiled and loaded, as `launch` takes it."""

    def launch(
        self,
        kernel: Any,
        device_index: int,
        grid: tuple[int, int, int],
        threads: int,
        *arguments: int,
        shared_bytes: int = 0,
    ) -> None:
        """Start it on its device's current stream. An argument is a pointer, an integer, or the bits of a float."""


def serves(x: Tensor) -> bool:
    """Whether kernels can read `x`: 16-bit floats, contiguous, in whole loads of 16 bytes."""
    return x.dtype in HALF and x.is_contiguous() and x.data_ptr() % 16 == 0


def bits(value: float) -> int:
    """`value` as the float32 that a kernel's argument holds."""
    return int.from_bytes(struct.pack("<f", value), "little")


def pointer(tensor: Tensor | None) -> int:
    """Its address; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
