"""A HIP runtime under hip-python that checks every call and executes launches in the simulator.

Device memory is the host's: tensors on the CPU stand for tensors on the GPU. `Device` is what the driver sees;
a call that the real runtime would refuse, or that leaves something undefined, raises `WrongCall` behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from amdsim import CodeObject, Counts, In, Kernel, Out, Program
from torch.overrides import TorchFunctionMode

SOURCE = Path(__file__).with_name("fake_hip.c")
VERSION = 70_000_000 + 1 * 100_000
STREAM = 0x5EED0
SUCCESS, INVALID_VALUE = 0, 1
RESULT = {"gemv": 4, "gemm": 4, "dequantize_tiles": 2}
"""Which argument of a kernel is its result."""

Hook = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_int)


class WrongCall(AssertionError):
    """The host side called the runtime in a way that a real one would not have forgiven."""


def build(folder: Path) -> Path:
    """The library, at `folder`/lib as hip-python looks for it below ROCM_PATH."""
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    library = folder / "lib" / "libamdhip64.so"
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return library


@dataclass
class Device:
    """One simulated GPU behind the fake runtime: what was loaded, launched, and what shall fail."""

    calls: list[str] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)  # function -> status
    counts: list[Counts] = field(default_factory=list)
    launched: list[tuple[str, tuple[int, int, int], int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)  # by address
    modules: dict[int, CodeObject] = field(default_factory=dict)
    functions: dict[int, tuple[CodeObject, Kernel]] = field(default_factory=dict)
    programs: dict[int, Program] = field(default_factory=dict)

    def call(self, name: str, arguments: list[int]) -> int:
        self.calls.append(name)
        if name in self.fail:
            return self.fail[name]
        handler = getattr(self, f"_{name}")
        try:
            handler(*arguments)
        except Exception as error:  # an exception cannot cross the C library: it is raised behind it
            self.wrong.append(f"{type(error).__name__}: {error}")
            return INVALID_VALUE
        return SUCCESS

    def _hipRuntimeGetVersion(self, version: int) -> None:  # noqa: N802  # the runtime's name
        ctypes.c_int.from_address(version).value = VERSION

    def _hipModuleLoadData(self, module: int, image: int) -> None:  # noqa: N802
        header = ctypes.string_at(image, 64)
        sections, size, count = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
        handle = 0x1000 + 16 * len(self.modules)
        self.modules[handle] = CodeObject.parse(ctypes.string_at(image, sections + size * count))
        ctypes.c_uint64.from_address(module).value = handle

    def _hipModuleGetFunction(self, function: int, module: int, name: int) -> None:  # noqa: N802
        code = self.modules[module]
        kernel = code.kernels[ctypes.string_at(name).decode()]
        handle = 0x9000 + 16 * len(self.functions)
        self.functions[handle] = code, kernel
        ctypes.c_uint64.from_address(function).value = handle

    def _hipModuleLaunchKernel(self, function: int, *rest: int) -> None:  # noqa: N802
        grid, block, (shared_bytes, stream, parameters, extra) = rest[:3], rest[3:6], rest[6:]
        code, kernel = self.functions[function]
        _expect(stream == STREAM, f"stream {stream:#x} is not the current one")
        _expect(extra == 0, "arguments are given twice")
        _expect(shared_bytes == 0, f"{shared_bytes} bytes of dynamic shared memory that the kernel does not use")
        _expect(min(grid) >= 1 and block[1:] == (1, 1), f"grid {grid} and block {block}")
        _expect(all(g * b < 2**32 for g, b in zip(grid, block, strict=True)), f"grid {grid} is too large for HIP")
        _expect(max(grid[1:]) <= 65535, f"grid {grid} has more than 65535 blocks along y or z")
        _expect(block[0] % kernel.wave_size == 0 and block[0] <= 1024, f"{block[0]} threads")
        explicit = [a for a in kernel.arguments if not a.kind.startswith("hidden")]
        table = (ctypes.c_uint64 * len(explicit)).from_address(parameters)
        values = [
            int.from_bytes(ctypes.string_at(address, argument.size), "little")
            for address, argument in zip(table, explicit, strict=True)
        ]
        given: list[Any] = []
        for index, (value, argument) in enumerate(zip(values, explicit, strict=True)):
            if argument.kind != "global_buffer" or value == 0:
                given.append(value)
                continue
            _expect(value in self.tensors, f"argument {index} is {value:#x}, where no tensor begins")
            tensor = self.tensors[value]
            _expect(tensor.is_contiguous(), f"argument {index} is a view with strides {tensor.stride()}")
            words = np.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(value))
            given.append(Out(words) if index == RESULT[kernel.name] else In(words))
        if function not in self.programs:
            self.programs[function] = Program(code, kernel.name)
        counts = self.programs[function].launch(given, (grid[0], grid[1], grid[2]), block[0])
        self.launched.append((kernel.name, (grid[0], grid[1], grid[2]), block[0]))
        self.counts.append(counts)
        left = {index: missing for index, missing in counts.unwritten.items() if missing}
        _expect(not left, f"{kernel.name} left bytes of its result unwritten, by argument: {left}")


def _expect(condition: bool, found: str) -> None:
    if not condition:
        raise WrongCall(found)


class _Watch(TorchFunctionMode):
    """Remembers every tensor that torch makes, so that an address in a launch can be told from a wild one."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = (torch.empty, torch.Tensor.clone, torch.Tensor.contiguous)
        if isinstance(result, torch.Tensor) and function in made:
            self.device.tensors[result.data_ptr()] = result
        return result


@contextlib.contextmanager
def watched(device: Device, *tensors: torch.Tensor) -> Iterator[None]:
    """While active, `tensors` and what torch makes are device memory. Raises `WrongCall` behind the call."""
    device.tensors = {tensor.data_ptr(): tensor for tensor in tensors}
    device.wrong.clear()
    try:
        with _Watch(device):
            yield
    except Exception as error:
        if device.wrong:
            raise WrongCall("; ".join(device.wrong)) from error
        raise
    if device.wrong:
        raise WrongCall("; ".join(device.wrong))
