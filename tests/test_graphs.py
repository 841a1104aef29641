"""A capture that fails, without a GPU: what is reported, and that torch is brought out of it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from awq_rt.generation import device_graphs
from awq_rt.generation.device_graphs import DeviceGraphs
from awq_rt.generation.graphs import Graphs

POOL = (0, 7)
BROKEN = "operation failed due to a previous error during capture"


class Torch:
    """torch's captures as 2.11 has them: one that was broken cannot be ended, and leaves what it changed."""

    def __init__(self, patch: pytest.MonkeyPatch, can_capture: bool = True) -> None:
        self.can_capture = can_capture
        self.stream, self.generator_captures, self.open_pools = "the caller's", False, set[Any]()
        self.broken = False
        generator = SimpleNamespace(graphsafe_set_state=self._set_state, clone_state=lambda: "a copy")
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: POOL)
        patch.setattr(torch.cuda, "CUDAGraph", object)
        patch.setattr(torch.cuda, "Stream", lambda device: "a side stream")
        patch.setattr(torch.cuda, "stream", self._on)
        patch.setattr(torch.cuda, "graph", self._capture)
        patch.setattr(torch.cuda, "default_generators", {None: generator})
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_pool, raising=False)

    def _set_state(self, state: str) -> None:
        assert state == "a copy"
        self.generator_captures = False

    @contextlib.contextmanager
    def _on(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def _capture(
        self, graph: object, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # else an allocation of another thread breaks it
        assert device_graphs._BUSY.locked()  # else another capture does
        self.stream, self.generator_captures = "left behind", True
        if not self.can_capture:
            raise RuntimeError("capturing is not supported")
        self.open_pools.add(pool)
        try:
            yield
        finally:
            if self.broken:
                self.broken = False
                raise RuntimeError(BROKEN)
            self.open_pools.remove(pool)
            self.generator_captures = False

    def _end_pool(self, device_index: int | None, pool: Any) -> None:
        if pool not in self.open_pools:
            raise RuntimeError("not currently recording to mempool_id")
        self.open_pools.remove(pool)

    @property
    def is_as_before(self) -> bool:
        return (self.stream, self.generator_captures, self.open_pools) == ("the caller's", False, set())


def graphs() -> Graphs:
    """On a CPU, where everything but the capture itself can be run."""
    return Graphs(torch.device("cpu"), DeviceGraphs(torch.device("cpu")))


def run_twice(made: Graphs, function: Callable[[], Tensor]) -> Tensor:
    made.run("key", function)
    return made.run("key", function)


def test_a_broken_capture_says_what_broke_it_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, made, calls = Torch(monkeypatch), graphs(), []

    def function() -> Tensor:
        calls.append(fake.generator_captures)
        if fake.generator_captures:
            fake.broken = True
            raise ValueError("a copy to the host waits")
        return torch.tensor(3.0)

    with pytest.warns(UserWarning, match="capturing failed: a copy to the host waits$") as warned:
        assert run_twice(made, function) == 3.0
    assert len(warned) == 1
    assert calls == [False, True, False]
    assert fake.is_as_before
    assert made.run("key", function) == 3.0
    assert calls[3:] == [False]


def test_an_interrupt_of_a_capture_is_no_failure_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, made = Torch(monkeypatch), graphs()

    def function() -> Tensor:
        if fake.generator_captures:
            fake.broken = True
            raise KeyboardInterrupt
        return torch.tensor(3.0)

    with pytest.raises(KeyboardInterrupt):
        run_twice(made, function)
    assert fake.is_as_before
    assert not device_graphs._BUSY.locked()


def test_a_capture_that_failed_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python's collector of cycles: what a function holds is a model's memory."""
    fake, made, held = Torch(monkeypatch), graphs(), torch.tensor(3.0)

    def function(held: Tensor = held) -> Tensor:
        if fake.generator_captures:
            fake.broken = True
            raise ValueError("a copy to the host waits")
        return held + 1

    watched = weakref.ref(held)
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="capturing failed"):
            run_twice(made, function)
        del function, held
        assert watched() is None
    finally:
        gc.enable()


def test_a_capture_that_fails_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, made = Torch(monkeypatch), graphs()

    def function() -> Tensor:
        fake.broken = fake.generator_captures  # something else broke it, silently
        return torch.tensor(3.0)

    with pytest.warns(UserWarning, match=BROKEN):
        assert run_twice(made, function) == 3.0
    assert fake.is_as_before


def test_where_nothing_can_be_captured_the_generator_gets_a_new_state(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, made = Torch(monkeypatch, can_capture=False), graphs()
    with pytest.warns(UserWarning, match="capturing is not supported"):
        assert run_twice(made, lambda: torch.tensor(3.0)) == 3.0
    assert fake.is_as_before


def test_an_error_of_the_function_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, made, calls = Torch(monkeypatch), graphs(), []

    def function() -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no memory")
        return torch.tensor(3.0)

    with pytest.warns(UserWarning, match="no memory"), pytest.raises(torch.OutOfMemoryError):
        run_twice(made, function)
    assert fake.is_as_before


def test_an_interrupt_ends_the_capture_and_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, made, calls = Torch(monkeypatch), graphs(), []

    def function() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.tensor(3.0)

    with pytest.raises(KeyboardInterrupt):
        run_twice(made, function)
    assert fake.is_as_before
    assert made.capturing
