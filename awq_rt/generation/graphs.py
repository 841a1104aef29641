"""Work on fixed tensors that is captured as a CUDA (HIP) graph when it comes again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MOST_GRAPHS = 16


class Graphs:
    """Runs functions by key: as they are the first time, which loads kernels and makes workspaces; then as a graph.

    A function reads and writes tensors that stay where they are. On devices without graphs, and where capturing fails
    (one warning), it runs as it is every time.
    """

    def __init__(self, device: torch.device):
        self.capturing = device.type == "cuda"
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if self.capturing else None
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}

    def run(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """What `function` returns; with a graph, the tensor that every replay writes."""
        if not self.capturing:
            return function()
        if key not in self._captured:
            if len(self._captured) == MOST_GRAPHS:
                del self._captured[next(iter(self._captured))]
            self._captured[key] = None
            return function()
        captured = self._captured[key] or self._capture(key, function)
        if captured is None:
            return function()
        graph, result = captured
        graph.replay()
        return result

    def _capture(self, key: Hashable, function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor] | None:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                result = function()
        except RuntimeError as error:
            self.capturing = False
            warnings.warn(f"decoding runs without graphs, more slowly: capturing failed: {error}", stacklevel=2)
            return None
        # Before it captures, torch sets the random generator's offset to 0, on that stream. Where other programs use
        # the GPU too, that may come after the offset of the first replay, which then draws what was drawn before.
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._captured[key] = graph, result
        return graph, result

    def __len__(self) -> int:
        return sum(captured is not None for captured in self._captured.values())
