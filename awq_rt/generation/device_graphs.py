"""Work captured as a CUDA (HIP) graph."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_BUSY = threading.Lock()
"""Held while a graph is captured or launched. Before torch captures it waits for the whole device, which breaks another
thread's capture, and until it has captured the device's random generator refuses every replay."""


class DeviceGraphs:
    """Captures for `device`, all into one pool of memory. Where that fails it says why, once, and runs the work."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all: memory of a pool that a graph has freed serves only later ones of the same stream.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None] | None, Tensor]:
        graph = torch.cuda.CUDAGraph()

        def replay() -> None:
            with _BUSY:
                graph.replay()

        with _BUSY:
            result = self._captured(graph, function)
        if isinstance(result, str):
            warnings.warn(f"decoding runs without graphs, more slowly: capturing failed: {result}", stacklevel=3)
            return None, function()
        replay()
        return replay, result

    def _captured(self, graph: torch.cuda.CUDAGraph, function: Callable[[], Tensor]) -> Tensor | str:
        """What `function` returns, its kernels in `graph`; or what broke the capture, which has been left."""
        # Ending a capture that is broken raises another error. What broke it is kept as a text: an exception that is
        # raised while another is handled makes a cycle with it, and with the model.
        reason, interrupt = "", None
        try:
            # torch.cuda.graph leaves its stream current where the capture cannot be ended; the outer context does not.
            # Other threads may allocate and copy meanwhile, but not draw: only what this one does is of the capture.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = function()
                except Exception as error:
                    reason = str(error)
                    raise
                except BaseException as error:
                    interrupt = error
                    raise
        except BaseException as error:
            _leave_capture(self._device, self._pool)
            if interrupt is not None:
                raise interrupt from None
            if not isinstance(error, Exception):
                raise
            return reason or str(error)
        # Before it captures, torch sets the generator's offset to 0, on that stream. Where other programs use the GPU
        # too, that may come after the offset of the first replay, which then draws what was drawn before.
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return result


def _leave_capture(device: torch.device, pool: tuple[int, int]) -> None:
    """Bring torch out of a capture that could not be ended.

    In 2.11 its random generator then refuses every draw, and every replay of any graph, until a capture ends well; and
    its allocator gives no memory back until it is told that the capture into `pool` has ended. Later ones do a part.
    """
    with contextlib.suppress(RuntimeError):  # it has been told
        torch._C._cuda_endAllocateToPool(device.index, pool)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    try:
        mark = torch.empty(1, device=device)
        graph = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(stream), graph:
            mark.zero_()
    except RuntimeError:  # nothing can be captured here, so no graph needs the generator's state as it is
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
