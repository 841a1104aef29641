"""Work captured as a CUDA (HIP) graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class DeviceGraphs:
    """Captures for `device`, all into one pool of memory. Where that fails it says why, once, and runs the work."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None] | None, Tensor]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        reason = ""
        try:
            # torch.cuda.graph leaves its stream current where the capture cannot be ended; the outer context does not.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=self._pool, stream=stream):
                try:
                    result = function()
                except Exception as error:
                    reason = str(error)  # ending a capture that this broke raises another error
                    raise
        except Exception as error:
            _leave_capture(self._device, self._pool)
            message = f"decoding runs without graphs, more slowly: capturing failed: {reason or error}"
            warnings.warn(message, stacklevel=3)
            return None, function()
        # Before it captures, torch sets the random generator's offset to 0, on that stream. Where other programs use
        # the GPU too, that may come after the offset of the first replay, which then draws what was drawn before.
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph.replay()
        return graph.replay, result


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
        with torch.cuda.stream(stream), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            mark.zero_()
    except RuntimeError:  # nothing can be captured here, so no graph needs the generator's state as it is
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())
