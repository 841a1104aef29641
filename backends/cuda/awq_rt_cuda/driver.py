"""Loading and launching machine code in torch's context, on torch's current stream, with the CUDA driver API.

A launch allocates nothing on the device and never waits, so a CUDA graph can capture it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
from cuda.bindings import driver

from awq_rt.errors import BackendError

NO_OVERLAP = "AWQ_RT_CUDA_NO_OVERLAP"
"""Set to 1 to launch without programmatic dependent launch: each kernel then starts when the one before has ended."""


class DriverFailed(BackendError):
    """The CUDA driver refused a call."""

    code = "AWQ-CUDA-020"


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kernel is launched. `cluster` blocks along x are neighbours that reach each other's shared memory."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    cluster: int = 1


MOST_BLOCKS_Y = 65535
"""The hardware's limit on a grid's second and third dimension; the first may have 2^31 - 1."""


def tall(blocks: int) -> tuple[int, int]:
    """`blocks` or a few more as a grid's y and z: block z * y's size + y is the one meant, if there are so many."""
    z = -(-blocks // MOST_BLOCKS_Y)
    return -(-blocks // z), z


class Kernel:
    """A kernel loaded on one device. Every argument takes a slot of 8 bytes: a pointer, or an unsigned integer."""

    def __init__(self, code: bytes, name: str, device_index: int, arguments: int, shared_bytes: int = 0) -> None:
        self.name = name
        self.arguments = arguments
        self.overlap = may_overlap(device_index)
        with torch.cuda.device(device_index):
            _enter_context(device_index)
            # The module lives as long as the process: kernels are cached, and a graph may hold them beyond any owner.
            module = checked(driver.cuModuleLoadData(code), f"loading {name}")
            self.function = checked(driver.cuModuleGetFunction(module, name.encode()), f"finding {name}")
            if shared_bytes > 48 * 1024:
                attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                checked(
                    driver.cuFuncSetAttribute(self.function, attribute, shared_bytes),
                    f"asking for {shared_bytes} bytes of shared memory for {name}",
                )
        self._blocks = threading.local()

    def launch(self, shape: Shape, stream: int, *arguments: int) -> None:
        """Start the kernel on `stream` (a raw handle) of its device, whose context is current."""
        try:
            slots, pointers = self._blocks.slots, self._blocks.pointers
        except AttributeError:  # the first launch in this thread
            slots, pointers = self._new_block()
        slots[:] = arguments
        (status,) = driver.cuLaunchKernelEx(_config(shape, stream, self.overlap), self.function, pointers, 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            checked((status,), f"launching {self.name} with {shape}")

    def _new_block(self) -> tuple[Any, int]:
        slots = (ctypes.c_uint64 * self.arguments)()
        first = ctypes.addressof(slots)
        table = (ctypes.c_void_p * self.arguments)(*(first + 8 * i for i in range(self.arguments)))
        self._blocks.slots, self._blocks.table, self._blocks.pointers = slots, table, ctypes.addressof(table)
        return slots, ctypes.addressof(table)


def checked(answer: tuple[Any, ...], what: str) -> Any:
    """The value in a driver call's answer. Raises `DriverFailed`, which says what was tried."""
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        said = text.decode() if isinstance(text, bytes) else str(text)
        raise DriverFailed(f"{what} failed: {status.name}, {said}")
    return values[0] if values else None


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the installed driver serves. Needs no device and creates no context."""
    version = checked(driver.cuDriverGetVersion(), "asking the driver for its version")
    return version // 1000, version % 1000 // 10


def shared_bytes_per_block(device_index: int) -> int:
    """The most shared memory that a block may ask for. Torch has initialised the device."""
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    device = checked(driver.cuDeviceGet(device_index), "opening the device")
    return int(checked(driver.cuDeviceGetAttribute(attribute, device), "asking for its shared memory"))


@functools.cache
def may_overlap(device_index: int) -> bool:
    """Whether launches on this device use programmatic dependent launch (compute capability 9.0 and later)."""
    return torch.cuda.get_device_capability(device_index) >= (9, 0) and os.environ.get(NO_OVERLAP, "0") in ("", "0")


def current_stream(device_index: int) -> int:
    """The raw handle of torch's current stream, in a thread whose context is then sure to be current."""
    if not getattr(_thread, "entered", False):
        _enter_context(device_index)
        _thread.entered = True
    return int(torch._C._cuda_getCurrentRawStream(device_index))


_thread = threading.local()


def _enter_context(device_index: int) -> None:
    """Make torch's context current in a thread that has none yet: torch may answer from its caches without one."""
    if int(checked(driver.cuCtxGetCurrent(), "asking for the context")) == 0:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        device = checked(driver.cuDeviceGet(device_index), "opening the device")
        context = checked(driver.cuDevicePrimaryCtxRetain(device), "opening the device's context")
        checked(driver.cuCtxSetCurrent(context), "entering the device's context")


@functools.lru_cache(maxsize=4096)
def _config(shape: Shape, stream: int, overlap: bool) -> Any:
    """The launch configuration. Building one costs more than a launch, so each is kept."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = shape.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = shape.threads, 1, 1
    config.sharedMemBytes = shape.shared_bytes
    config.hStream = driver.CUstream(stream)
    attributes = []
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        attributes.append(attribute)
    if shape.cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        value = driver.CUlaunchAttributeValue()
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = shape.cluster, 1, 1
        attribute.value = value
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config
