"""The backend as it is, on simulated GPUs: its own host code, hip-python, the fake runtime, the simulator."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import awq_rt_rocm
import fake_hip
import pytest
import torch
from amdsim import TARGETS
from amdsim.toolchain import Clang
from awq_rt_rocm import RocmBackend, driver, exllama, targets, tiled
from awq_rt_rocm import device as gpu
from awq_rt_rocm.launcher import HipLauncher
from torch import Tensor

from awq_rt.backend import Packed
from awq_rt.devices import Device, Probe
from awq_rt.kernels.operators import Operators
from awq_rt.rtc import Builder, KernelStore

ARCHITECTURES = tuple(TARGETS)


@dataclass
class Machine:
    """Every target at once, the index of a device being its place in `ARCHITECTURES`."""

    hip: fake_hip.Device
    index: int = 0
    compute_units: int = 8

    @property
    def device(self) -> Device:
        name = ARCHITECTURES[self.index]
        return Device("cpu", 0, f"simulated {name}", "amd", name, 64 << 30, TARGETS[name].wave_size)


class SimulatedBackend(RocmBackend):
    """The backend with memory on the CPU. Only where a tensor lies differs from a real machine."""

    def __init__(self, machine: Machine, kernels: Sequence[str] = RocmBackend.kernels) -> None:
        self.machine = machine
        self.kernels = tuple(kernels)

    def probe(self) -> Probe:
        return Probe((self.machine.device,))

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        with fake_hip.watched(self.machine.hip, x, *packed.tensors):
            return super().linear(x, packed)


@contextlib.contextmanager
def machine(clang: Clang, folder: Path) -> Iterator[Machine]:
    """Put the fake runtime under the backend, for one process: hip-python loads a library once."""
    library = fake_hip.build(folder)
    hip = fake_hip.Device()
    here = Machine(hip)

    @fake_hip.Hook
    def hook(name: bytes, arguments: ctypes.Array[ctypes.c_uint64], count: int) -> int:
        return hip.call(name.decode(), list(arguments[:count]))

    ctypes.CDLL(str(library)).fake_hip_set_hook(hook)
    builder = Builder(clang, KernelStore(folder / "kernels"))

    def architecture(index: int) -> targets.Architecture:
        found = targets.architecture(ARCHITECTURES[index])
        assert found is not None
        return found

    for cached in (tiled.load, tiled.load_dequantize, tiled.plan, exllama.load, exllama.plan):
        cached.cache_clear()  # handles of a machine before this one
    operators = Operators(HipLauncher())  # those of the backend keep what they loaded, too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awq_rt_rocm, "OPERATORS", operators)
        patch.setattr(RocmBackend, "ops", operators.by_name)
        patch.setenv("ROCM_PATH", str(folder))
        patch.setattr(driver, "entered", lambda index: contextlib.nullcontext())
        patch.setattr(driver, "current_stream", lambda index: fake_hip.STREAM)
        patch.setattr(gpu, "builder", lambda: builder)
        patch.setattr(gpu, "architecture_of", architecture)
        patch.setattr(gpu, "compute_units", lambda index: here.compute_units)
        patch.setattr(gpu, "index_of", lambda device: here.index)
        patch.setattr(HipLauncher, "device_index", lambda self, x: here.index)
        yield here
    assert torch.get_default_device().type == "cpu"
