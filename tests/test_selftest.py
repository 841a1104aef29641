"""A backend that computes wrongly on this machine does not serve a model: it is tried, and gives way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from awq_rt import registry, selftest
from awq_rt.backend import LinearSpec, Packed
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.errors import BackendError, NoBackend, OutOfMemory
from awq_rt.linear import AwqLinear
from awq_rt.testing import excess, hurtful_weight
from awq_rt.weights import AwqWeight

CPU = torch.device("cpu")
SPEC = LinearSpec(256, 64, 128, torch.float32)


class Fast:
    """The reference under another name, with a fault for linears of `faulty` output features."""

    name = "fast"
    version = "1"
    contract = (1, 1)
    priority = 50
    kernels: tuple[str, ...] = ()
    ops: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, fault: str = "", faulty: int = 64):
        self.reference = registry.get("reference")
        self.fault, self.faulty, self.packed = fault, faulty, 0

    def probe(self) -> Probe:
        return self.reference.probe()

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        return self.reference.supports(spec, device)

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        self.packed += 1
        if self.fault == "memory":
            raise OutOfMemory("no room")
        if self.fault == "torch memory":
            raise torch.OutOfMemoryError("no room")
        return self.reference.pack(weight, spec, device)

    def unpack(self, packed: Packed) -> AwqWeight:
        return self.reference.unpack(packed)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        y = self.reference.linear(x, packed)
        if y.shape[-1] != self.faulty:
            return y
        if self.fault == "raises":
            raise RuntimeError("no luck")
        if self.fault == "NaN" and len(y) > 4:
            y[5, 3] = torch.nan
        if self.fault == "last column":
            y[:, -1] += 0.5
        return y * 1.01 if self.fault == "wrong" else y


@pytest.fixture(autouse=True)
def checked_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Where there is no GPU, a linear is tried when asked for; what was found is forgotten afterwards."""
    monkeypatch.setenv("AWQ_RT_CHECK", "1")
    monkeypatch.setenv("AWQ_RT_CACHE", str(tmp_path))
    monkeypatch.setattr(registry, "_distrusted", {})
    selftest._refusal.cache_clear()
    yield
    selftest._refusal.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `fast` the best backend."""

    def install(fast: Fast) -> Fast:
        reference = registry.get("reference")
        monkeypatch.setattr(registry, "backends", lambda: (fast, reference))
        monkeypatch.setattr(registry, "get", lambda name: {"fast": fast, "reference": reference}[name])
        return fast

    return install


def test_a_right_backend_serves_and_is_tried_once_a_shape(installed: Any) -> None:
    fast = installed(Fast())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selftest.choose(SPEC, CPU).backend is fast
        assert selftest.choose(SPEC, CPU).backend is fast
        assert fast.packed == 1
        assert selftest.choose(replace(SPEC, out_features=72), CPU).backend is fast
        assert selftest.choose(replace(SPEC, dtype=torch.bfloat16), CPU).backend is fast
    assert fast.packed == 3


def test_a_pass_is_remembered_by_other_processes_until_something_changes(
    installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = installed(Fast())

    def another_process() -> int:
        selftest._refusal.cache_clear()
        selftest.choose(SPEC, CPU)
        return fast.packed

    assert [another_process(), another_process()] == [1, 1]
    monkeypatch.setattr(selftest.examination, "fingerprint", lambda name, version: "other plugin files")
    assert [another_process(), another_process()] == [2, 2]
    device = registry.device_for(CPU)
    monkeypatch.setattr(registry, "device_for", lambda target: replace(device, driver="another driver"))
    assert [another_process(), another_process()] == [3, 3]
    monkeypatch.setenv("AWQ_RT_FAST_MODE", "on")
    assert [another_process(), another_process()] == [4, 4]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong", "times the bound"),
        ("last column", "times the bound"),
        ("NaN", "its result is not finite"),
        ("raises", "it raised RuntimeError: no luck"),
    ],
)
def test_a_wrong_backend_gives_way_with_one_warning(installed: Any, fault: str, words: str) -> None:
    installed(Fast(fault))
    weight = hurtful_weight("random", 256, 64, 128)
    linear, other = AwqLinear(256, 64, 128), AwqLinear(256, 72, 128)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice = linear.bind(weight, torch.float32, "cpu")
        other.bind(hurtful_weight("random", 256, 72, 128), torch.float32, "cpu")
        AwqLinear(256, 64, 128).bind(weight, torch.bfloat16, "cpu")
    assert len(caught) == 1  # for all shapes
    assert words in str(caught[0].message)
    assert "backend 'fast' computes a linear of 256 x 64" in str(caught[0].message)
    assert str(caught[0].message).endswith("`awq-rt doctor` says more [AWQ-BACKEND-020]")
    assert (linear.backend_name, other.backend_name) == ("reference", "fast")  # another shape is right
    assert [(name, refusal.code) for name, refusal in choice.refusals] == [("fast", "AWQ-BACKEND-020")]
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    assert excess(linear(x), x, weight) <= 1


def test_a_failure_is_tried_again_by_the_next_process(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(Fast("wrong"))
    with pytest.warns(RuntimeWarning):
        selftest.choose(SPEC, CPU)
    monkeypatch.setattr(registry, "_distrusted", {})
    selftest._refusal.cache_clear()
    mended = installed(Fast())
    assert selftest.choose(SPEC, CPU).backend is mended


def test_a_wrong_backend_that_is_pinned_is_an_error(installed: Any) -> None:
    installed(Fast("wrong"))
    with (
        pytest.warns(RuntimeWarning, match="AWQ-BACKEND-020"),
        pytest.raises(NoBackend, match=r"fast: its largest error is .* times the bound.*AWQ-BACKEND-020"),
    ):
        selftest.choose(SPEC, CPU, "fast")


def test_no_room_is_no_verdict_on_a_kernel(installed: Any) -> None:
    fast = installed(Fast("torch memory"))
    assert selftest.choose(SPEC, CPU).backend is fast
    installed(Fast("memory"))
    with pytest.raises(OutOfMemory):
        selftest.choose(SPEC, CPU)
    assert issubclass(NoBackend, BackendError)


def test_without_being_asked_nothing_is_tried_on_a_cpu(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWQ_RT_CHECK")
    fast = installed(Fast("wrong"))
    assert selftest.choose(SPEC, CPU).backend is fast
    assert fast.packed == 0


def test_the_reference_is_what_is_trusted(installed: Any) -> None:
    fast = installed(Fast("wrong"))
    fast.priority = 0
    assert selftest.choose(SPEC, CPU).backend is fast


@pytest.mark.parametrize("count", [1, 96, 97, 4096])
def test_samples_are_spread_over_all(count: int) -> None:
    chosen = selftest.sampled(count).tolist()
    assert chosen[0] == 0
    assert chosen[-1] == count - 1
    assert len(set(chosen)) == len(chosen) == (count if count <= 96 else 48)
    assert max(b - a for a, b in zip([-1, *chosen], chosen, strict=False)) <= -(-count // 40)


def test_columns_are_those_asked_for() -> None:
    weight = hurtful_weight("random", 128, 32, 64, bias=True)
    part = selftest.columns_of(weight, torch.tensor([3, 31]))
    assert torch.equal(part.dequantize(), weight.dequantize()[:, [3, 31]])
    assert part.bias is not None
    assert weight.bias is not None
    assert torch.equal(part.bias, weight.bias[[3, 31]])


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_tried_is_as_the_spec_says(symmetric: bool) -> None:
    spec = LinearSpec(512, 96, 64, torch.bfloat16, symmetric, bias=True, scale_dtype=torch.bfloat16)
    weight = selftest.random_weight(spec, CPU)
    assert LinearSpec.of(weight, torch.bfloat16) == spec
    assert weight.zeros.unique().tolist() == ([8] if symmetric else list(range(16)))
    assert weight.codes.unique().tolist() == list(range(16))


def test_activations_go_where_the_packed_weight_is() -> None:
    """A weight made on the host is packed on a GPU: kernels that were given the host's activations read anywhere."""
    seen = []

    class Recorder(Fast):
        def linear(self, x: Tensor, packed: Packed) -> Tensor:
            seen.append(x.device.type)
            raise RuntimeError("enough")

    packed = Packed("", (torch.empty(8, device="meta"),))
    with pytest.raises(RuntimeError, match="enough"):
        selftest.worst_excess(Recorder(), packed, hurtful_weight("random", 64, 16, 32), torch.float32, (1,), CPU)
    assert seen == ["meta"]
