"""Loading and launching machine code in torch's context, on torch's current stream, through hip-python.

A launch allocates nothing on the device and never waits, so a HIP graph can capture it.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from awq_rt.errors import BackendError

from . import libraries


class DriverFailed(BackendError):
    """The HIP runtime refused a call."""

    code = "AWQ-ROCM-020"


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kernel is launched."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0  # beside what the kernel declares


class Kernel:
    """A kernel loaded on one device. Every argument has a slot of 8 bytes: a pointer, or an unsigned integer."""

    def __init__(self, code: bytes, name: str, device_index: int, arguments: int) -> None:
        self.name = name
        self.arguments = arguments
        hip = runtime()
        with entered(device_index):
            # The module lives as long as the process: kernels are cached, and a graph may hold them beyond any owner.
            self._code = code
            module = checked(hip.hipModuleLoadData(code), f"loading {name}")
            self.function = checked(hip.hipModuleGetFunction(module, name.encode()), f"finding {name}")
        self._blocks = threading.local()

    def launch(self, shape: Shape, stream: int, *arguments: int) -> None:
        """Start the kernel on `stream` (a raw handle) of its device, which is current."""
        try:
            slots, pointers = self._blocks.slots, self._blocks.pointers
        except AttributeError:  # the first launch in this thread
            slots, pointers = self._new_block()
        slots[:] = arguments
        answer = runtime().hipModuleLaunchKernel(
            self.function, *shape.grid, shape.threads, 1, 1, shape.shared_bytes, stream, pointers, None
        )
        checked(answer, f"launching {self.name} with {shape}")

    def _new_block(self) -> tuple[Any, int]:
        slots = (ctypes.c_uint64 * self.arguments)()
        first = ctypes.addressof(slots)
        table = (ctypes.c_void_p * self.arguments)(*(first + 8 * i for i in range(self.arguments)))
        self._blocks.slots, self._blocks.table, self._blocks.pointers = slots, table, ctypes.addressof(table)
        return slots, ctypes.addressof(table)


_loaded: Any = None
_lock = threading.Lock()


def runtime() -> Any:
    """hip-python's module, with the HIP runtime behind it loaded. Raises what hip-python raises when there is none."""
    global _loaded
    if _loaded is None:
        with _lock, libraries.search_path():
            from hip import hip

            checked(hip.hipRuntimeGetVersion(), "asking HIP for its version", hip)
            _loaded = hip
    return _loaded


def version() -> tuple[int, int]:
    """The HIP runtime's version. Needs no device and creates no context."""
    number = checked(runtime().hipRuntimeGetVersion(), "asking HIP for its version")
    return number // 10_000_000, number // 100_000 % 100


def checked(answer: tuple[Any, ...], what: str, hip: Any = None) -> Any:
    """The value in a call's answer. Raises `DriverFailed`, which says what was tried."""
    status, *values = answer
    if status.value != 0:
        said = (hip or runtime()).hipGetErrorString(status)
        said = said[-1] if isinstance(said, tuple) else said  # hip-python 10 puts a status before it
        text = said.decode() if isinstance(said, bytes) else str(said)
        raise DriverFailed(f"{what} failed: {status.name}, {text}")
    return values[0] if values else None


def entered(device_index: int) -> AbstractContextManager[Any]:
    """The device made current, as torch does it; nothing to do where it is already."""
    if device_index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device_index)


def current_stream(device_index: int) -> int:
    """The raw handle of torch's current stream."""
    return int(torch._C._cuda_getCurrentRawStream(device_index))
