"""Weights are read ahead of who packs them: in order, no more than a few, and what fails says so."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from awq_rt.formats import LinearShape
from awq_rt.linear import AwqLinear
from awq_rt.models import reading
from awq_rt.models.experts import empty_linear
from awq_rt.testing.cases import hurtful_weight
from awq_rt.weights import AwqWeight


class Recorded:
    """A checkpoint whose weights are told apart by their number of rows."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.asked: list[str] = []
        self.threads: set[int] = set()

    def read(self, name: str, device: torch.device) -> AwqWeight:
        self.asked.append(name)
        self.threads.add(threading.get_ident())
        if name == self.broken:
            raise ValueError(f"{name} is broken")
        return hurtful_weight("random", 16 * (int(name) + 1), 8, 16)


def linears(count: int, device: str) -> list[tuple[AwqLinear, tuple[str, ...]]]:
    return [(empty_linear(LinearShape(16, 8, 16)).to_empty(device=device), (str(index),)) for index in range(count)]


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device "meta" stands for a GPU here: it is not the CPU."""
    monkeypatch.setattr(reading, "_current_stream", lambda device: nullcontext())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_linear_gets_its_weight_in_order(device: str) -> None:
    asked: Any = linears(12, device)
    found = list(reading.weights_of(Recorded(), asked))  # type: ignore[arg-type]
    assert [(linear, names) for linear, names, _ in found] == asked
    assert [weight.in_features for _, _, weight in found] == [16 * (index + 1) for index in range(12)]


def test_parts_are_laid_side_by_side() -> None:
    ((_, names, weight),) = reading.weights_of(Recorded(), [(linears(1, "cpu")[0][0], ("2", "2"))])  # type: ignore[arg-type]
    assert names == ("2", "2")
    assert (weight.in_features, weight.out_features) == (48, 16)


def test_a_cpu_reads_what_it_is_asked_for_and_a_gpu_a_few_more() -> None:
    for device, ahead in (("cpu", 0), ("meta", reading.AHEAD)):
        checkpoint = Recorded()
        read = reading.weights_of(checkpoint, linears(20, device))  # type: ignore[arg-type]
        for index in range(5):
            next(read)
            assert index + 1 <= len(checkpoint.asked) <= index + 1 + ahead
        assert (threading.get_ident() in checkpoint.threads) == (device == "cpu")
        read.close()
        assert len(checkpoint.asked) <= 5 + ahead


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_cannot_be_read_is_raised_when_its_turn_comes(device: str) -> None:
    read = reading.weights_of(Recorded(broken="3"), linears(9, device))  # type: ignore[arg-type]
    for _ in range(3):
        next(read)
    with pytest.raises(ValueError, match="3 is broken"):
        next(read)
