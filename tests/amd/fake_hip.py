"""A HIP runtime under hip-python that checks every call and executes launches in the simulator.

Device memory is the host's: tensors on the CPU stand for tensors on the GPU. `Device` is what the driver sees;
a call that the real runtime would refuse, or that leaves something undefined, raises `WrongCall` behind it.

While a stream is captured, launches are checked and kept; launching the graph runs them, with the arguments that they
had then. fake_graphs.py puts torch's part of a graph between them.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from amdsim import CodeObject, Counts, In, InOut, Kernel, Out, Program
from torch.overrides import TorchFunctionMode

SOURCE = Path(__file__).with_name("fake_hip.c")
VERSION = 70_000_000 + 1 * 100_000
STREAM = 0x5EED0
SUCCESS, INVALID_VALUE = 0, 1
RESULTS = {
    "gemv": (4,),
    "gemm": (4,),
    "dequantize_tiles": (2,),
    "exllama": (5,),
    "exllama_dequantize": (3,),
    "fused_norm": (3,),
    "fused_gated": (1,),
    "fused_logits": (2,),
    "fused_argmax": (1,),
    "fused_rope": (2,),
    "fused_attention": (9,),
    "fused_attention_sum": (1,),
}
"""Which arguments of a kernel are its results, of which it must write every byte."""
CHANGED = {"fused_norm": (1,), "fused_rope": (3, 4), "fused_attention": (2, 3)}
"""Which it may read and write: a residual, caches."""
DYNAMIC = ("exllama",)
"""Kernels whose shared memory is sized at their launch."""

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
    recording: list[Callable[[], None]] | None = None  # the nodes of the graph that is being captured
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)

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
        _expect(self.recording is None, "a module is loaded while a stream is captured")
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
        (gx, gy, gz), block, (shared_bytes, stream, parameters, extra) = rest[:3], rest[3:6], rest[6:]
        grid = (gx, gy, gz)
        code, kernel = self.functions[function]
        _expect(stream == STREAM, f"stream {stream:#x} is not the current one")
        _expect(extra == 0, "arguments are given twice")
        _expect(bool(shared_bytes) == (kernel.name in DYNAMIC), f"{shared_bytes} bytes of dynamic shared memory")
        _expect(min(grid) >= 1 and tuple(block[1:]) == (1, 1), f"grid {grid} and block {block}")
        _expect(all(g * b < 2**32 for g, b in zip(grid, block, strict=True)), f"grid {grid} is too large for HIP")
        _expect(max(grid[1:]) <= 65535, f"grid {grid} has more than 65535 blocks along y or z")
        _expect(1 <= block[0] <= 1024, f"{block[0]} threads")
        explicit = [a for a in kernel.arguments if not a.kind.startswith("hidden")]
        table = (ctypes.c_uint64 * len(explicit)).from_address(parameters)
        given: list[Any] = []
        for index, (address, argument) in enumerate(zip(table, explicit, strict=True)):
            value = int.from_bytes(ctypes.string_at(address, argument.size), "little")
            is_buffer = argument.kind == "global_buffer" and value != 0
            given.append(self._buffer(kernel.name, index, value) if is_buffer else value)
        if function not in self.programs:
            self.programs[function] = Program(code, kernel.name)
        program = self.programs[function]

        def run() -> None:
            counts = program.launch(given, grid, block[0], dynamic_lds_bytes=shared_bytes)
            self.launched.append((kernel.name, grid, block[0]))
            self.counts.append(counts)
            left = {index: counts.unwritten[index] for index in RESULTS[kernel.name] if counts.unwritten.get(index)}
            _expect(not left, f"{kernel.name} left bytes of its result unwritten, by argument: {left}")

        self.run_or_record(run)

    def _buffer(self, name: str, index: int, address: int) -> In | Out | InOut:
        _expect(address in self.tensors, f"argument {index} of {name} is {address:#x}, where no tensor begins")
        tensor = self.tensors[address]
        changed = index in CHANGED.get(name, ())
        _expect(changed or tensor.is_contiguous(), f"argument {index} is a view with strides {tensor.stride()}")
        words = np.ctypeslib.as_array((ctypes.c_uint8 * _extent(tensor)).from_address(address))
        if index in RESULTS[name]:
            return Out(words)
        return InOut(words) if changed else In(words)

    def run_or_record(self, run: Callable[[], None]) -> None:
        """Do what a launch does: now, or whenever the graph is launched that is being captured."""
        if self.recording is None:
            run()
        else:
            self.recording.append(run)

    def _hipStreamBeginCapture(self, stream: int, mode: int) -> None:  # noqa: N802
        _expect(stream == STREAM and self.recording is None, f"stream {stream:#x} cannot be captured")
        self.recording = []

    def _hipStreamEndCapture(self, stream: int, graph: int) -> None:  # noqa: N802
        _expect(stream == STREAM and self.recording is not None, f"stream {stream:#x} is not captured")
        handle = 0x6000 + 16 * len(self.graphs)
        assert self.recording is not None
        self.graphs[handle], self.recording = self.recording, None
        ctypes.c_uint64.from_address(graph).value = handle

    def _hipGraphInstantiateWithFlags(self, executable: int, graph: int, flags: int) -> None:  # noqa: N802
        _expect(graph in self.graphs and flags == 0, f"{graph:#x} is no graph")
        ctypes.c_uint64.from_address(executable).value = graph + 1

    def _hipGraphLaunch(self, executable: int, stream: int) -> None:  # noqa: N802
        _expect(stream == STREAM and self.recording is None, f"a graph is launched on stream {stream:#x}")
        for run in self.graphs[executable - 1]:
            run()


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last, whatever lies between."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _expect(condition: bool, found: str) -> None:
    if not condition:
        raise WrongCall(found)


class _Watch(TorchFunctionMode):
    """Remembers every tensor that torch gives out, so that an address in a launch can be told from a wild one.

    Of several at one address it keeps the longest; it keeps them alive, so that no address is used again.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                remember(self.device, tensor)
        return result


def remember(device: Device, tensor: torch.Tensor) -> None:
    """`tensor` is device memory."""
    if tensor.numel() == 0:
        return
    known = device.tensors.get(tensor.data_ptr())
    if known is None or _rank(known) < _rank(tensor):
        device.tensors[tensor.data_ptr()] = tensor


def _rank(tensor: torch.Tensor) -> tuple[int, bool]:
    return _extent(tensor), tensor.is_contiguous()


@contextlib.contextmanager
def watched(device: Device, *tensors: torch.Tensor) -> Iterator[None]:
    """While active, `tensors` and what torch gives out are device memory. Raises `WrongCall` behind the call."""
    outermost = not device.tensors
    if outermost:
        device.wrong.clear()
    for tensor in tensors:
        remember(device, tensor)
    try:
        with _Watch(device):
            yield
    except Exception as error:
        if device.wrong:
            raise WrongCall("; ".join(device.wrong)) from error
        raise
    finally:
        if outermost:
            device.tensors = {}
    if device.wrong:
        raise WrongCall("; ".join(device.wrong))
