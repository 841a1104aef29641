"""torch's graphs over the fake HIP runtime: what torch computes on the CPU takes its place between the launches.

Capturing goes through hip-python to the fake runtime, which keeps launches instead of running them. A torch operator
that makes a tensor runs, as its memory is needed, and is kept; one that changes a tensor is only kept. A replay runs
all of them again, in order, into the same memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import fake_hip
import pytest
import torch
from awq_rt_rocm import driver
from torch.utils._python_dispatch import TorchDispatchMode

from awq_rt.generation import device_graphs
from awq_rt.generation.device_graphs import DeviceGraphs
from awq_rt.generation.graphs import Graphs

FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
"""What reads a device's memory on the host, which ends a capture."""


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    executable: Any = None

    def replay(self) -> None:
        assert device_graphs._BUSY.locked()  # else another thread may be capturing
        driver.checked(driver.runtime().hipGraphLaunch(self.executable, fake_hip.STREAM), "launching a graph")


class _Stream:
    """Stands for `torch.cuda.Stream`: there is one order here."""

    def __init__(self, device: Any = None) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...


class _Event:
    """Stands for `torch.cuda.Event`: nothing runs behind the host here, so its clock is the device's."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._recorded_s: float | None = None

    def record(self) -> None:
        self._recorded_s = time.perf_counter()

    def synchronize(self) -> None:
        assert self._recorded_s is not None, "an event is waited for that was never recorded"

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds until `end`."""
        assert self._recorded_s is not None
        assert end._recorded_s is not None
        return (end._recorded_s - self._recorded_s) * 1e3


class _Recorder(TorchDispatchMode):
    def __init__(self, device: fake_hip.Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} is not permitted while a stream is captured")
        if function._schema.is_mutable:
            self.device.run_or_record(lambda: function(*args, **kwargs))
            return args[0]
        made = function(*args, **kwargs)
        is_view = any(value.alias_info is not None for value in function._schema.returns)
        if not is_view and not name.startswith(("empty", "new_empty")):
            self.device.run_or_record(lambda: _copy(made, function(*args, **kwargs)))
        return made


def _copy(to: Any, found: Any) -> None:
    pairs = zip(to, found, strict=True) if isinstance(to, (tuple, list)) else ((to, found),)
    for old, new in pairs:
        if isinstance(old, torch.Tensor):
            old.copy_(new)


@contextlib.contextmanager
def capturing(patch: pytest.MonkeyPatch, device: fake_hip.Device) -> Iterator[None]:
    """While active, `awq_rt.generation` captures its steps."""

    @contextlib.contextmanager
    def graph(
        captured: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        hip = driver.runtime()
        mode = hip.hipStreamCaptureMode.hipStreamCaptureModeGlobal
        driver.checked(hip.hipStreamBeginCapture(fake_hip.STREAM, mode), "capturing")
        with _Recorder(device):
            yield
        made = driver.checked(hip.hipStreamEndCapture(fake_hip.STREAM), "ending the capture")
        captured.executable = driver.checked(hip.hipGraphInstantiateWithFlags(made, 0), "instantiating a graph")

    begin = Graphs.__init__

    def with_graphs(self: Graphs, where: torch.device, capture: None) -> None:
        begin(self, where, DeviceGraphs(where))
        self.on_device = True

    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", graph)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    patch.setattr(torch.cuda, "Event", _Event)
    patch.setattr(torch.cuda, "Stream", _Stream)
    patch.setattr(torch.cuda, "current_stream", _Stream)
    patch.setattr(Graphs, "__init__", with_graphs)
    yield
