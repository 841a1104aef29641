"""Work on fixed tensors that is captured when it comes again."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..backend import Capture
from .device_graphs import DeviceGraphs

MOST_GRAPHS = 16


class Graphs:
    """Runs functions by key: as they are the first time, which loads kernels and makes workspaces; then captured.

    A function reads and writes tensors that stay where they are. A GPU's graphs capture it, on other devices what
    the backend brings; where there is neither, and from where capturing fails on, it runs as it is every time.
    """

    def __init__(self, device: torch.device, capture: Capture | None):
        self.on_device = device.type == "cuda"  # a replay is launched, and runs behind the host
        self._capture = DeviceGraphs(device) if self.on_device else capture
        self._captured: dict[Hashable, tuple[Callable[[], None], Tensor] | None] = {}

    @property
    def capturing(self) -> bool:
        return self._capture is not None

    def run(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """What `function` returns; where it is captured, the tensor that every replay writes."""
        if self._capture is None:
            return function()
        if key not in self._captured:
            if len(self._captured) == MOST_GRAPHS:
                del self._captured[next(iter(self._captured))]
            self._captured[key] = None
            return function()
        captured = self._captured[key]
        if captured is not None:
            replay, result = captured
            replay()
            return result
        again, result = self._capture(function)
        if again is None:
            self._capture = None
        else:
            self._captured[key] = again, result
        return result

    def __len__(self) -> int:
        return sum(captured is not None for captured in self._captured.values())
