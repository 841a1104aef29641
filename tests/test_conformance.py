"""The conformance suite against a small zoo: every wrong backend fails with the reason, and the reference passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awq_rt import registry
from awq_rt.backend import Backend, LinearSpec, Packed
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.testing import cases, conformance
from awq_rt.testing.conformance import Failure, checks, self_test
from awq_rt.weights import AwqWeight
from awq_rt_reference import ReferenceBackend


class Right(ReferenceBackend):
    """The reference, in half the time: its one family is what "auto" means."""

    kernels = ()


class WrongZeroPoint(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        codes, zeros, *others = packed.tensors
        zeros = zeros.clone()
        zeros[-1, 3] ^= 1
        return super().linear(x, Packed(packed.layout, (codes, zeros, *others)))


class SwappedNibbles(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        codes, *others = packed.tensors
        codes = codes.clone()
        codes[:, 0] = codes[:, 0] >> 4 | codes[:, 0] << 4
        return super().linear(x, Packed(packed.layout, (codes, *others)))


class WrongForOneRow(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        return super().linear(x, packed) * (1.05 if x.numel() == x.shape[-1] else 1)


class WrongForManyRows(Right):
    """The last rows are left out, as by a grid that is rounded down."""

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        y = super().linear(x, packed)
        if y.dim() == 2 and len(y) > 32:
            y[32:] = 0
        return y


class WrongForOtherGroups(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        groups = packed.tensors[2].shape[0]
        return super().linear(x, packed) * (1 if x.shape[-1] // groups == 128 else 1.05)


class IgnoresBias(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        return super().linear(x, Packed(packed.layout, packed.tensors[:3]))


class IgnoresStrides(Right):
    """Reads as many values from where x begins as if they lay one after the other."""

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        if x.numel() and not x.is_contiguous():
            room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
            if room >= x.numel():
                strides = torch.empty(x.shape, device="meta").stride()
                x = x.as_strided(x.shape, strides)
        return super().linear(x, packed)


class ScalesActivations(Right):
    """Rounds all rows in steps of the largest value: good enough until one row is huge."""

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        if x.dtype != torch.float32 and x.numel():
            step = x.float().abs().max() / 2**14
            x = ((x.float() / step).round() * step).to(x.dtype)
        return super().linear(x, packed)


class ReusesItsBuffer(Right):
    def __init__(self) -> None:
        self.buffers: dict[tuple[object, ...], Tensor] = {}

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        y = super().linear(x, packed)
        return self.buffers.setdefault((y.shape, y.dtype), y).copy_(y)


class MutatesTheWeight(Right):
    """Corrupts one zero point, in place: what it unpacks is what the caller then holds."""

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        weight.zeros[0, 0] ^= 1
        return super().pack(weight, spec, device)


class MutatesTheInput(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        y = super().linear(x, packed)
        x.zero_()
        return y


class MutatesWhatItPacked(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        y = super().linear(x, packed)
        packed.tensors[2].mul_(1.01)
        return y


class NotDeterministic(Right):
    """Every second result is off by the last place: well within the bound."""

    def __init__(self) -> None:
        self.calls = 0

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        self.calls += 1
        y = super().linear(x, packed)
        return torch.nextafter(y, torch.full_like(y, torch.inf)) if self.calls % 2 else y


class RoundsScales(Right):
    """Its unpack is not exact, though its results are."""

    def unpack(self, packed: Packed) -> AwqWeight:
        weight = super().unpack(packed)
        return replace(weight, scales=(weight.scales.float() * 1.001).to(weight.scales.dtype))


class ReturnsFloat32(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        return super().linear(x, packed).float()


class ReturnsNan(Right):
    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        y = super().linear(x, packed)
        y[..., -1] = torch.nan
        return y


class RefusesEverything(Right):
    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        return Refusal("ZOO-001", "it is tired", "let it sleep")


class RefusesWithoutAReason(Right):
    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        return Refusal("ZOO-002", "", "")


class RefusesWithAWord(Right):
    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        return None if super().supports(spec, device) is None else "no"  # type: ignore[return-value]


class RaisesInProbe(Right):
    def probe(self) -> Probe:
        raise OSError("no driver")


ZOO: dict[Callable[[], Backend], tuple[str, bool]] = {
    WrongZeroPoint: ("times the bound", True),
    SwappedNibbles: ("times the bound", True),
    WrongForOneRow: (r"shape \[1, \d+\].*y\[0, \d+\] is .* is expected", True),
    WrongForManyRows: (r"shape \[33, \d+\].*y\[32, \d+\] is 0; ", True),
    WrongForOtherGroups: ("times the bound", True),
    IgnoresBias: ("times the bound", True),
    IgnoresStrides: (r"strides \[2560, 1024, 2\].*times the bound|times the bound for .* strides", False),
    ScalesActivations: (r"times the bound for an input of shape \[6, 256\]", False),
    ReusesItsBuffer: ("wrote a later result over an earlier one", True),
    MutatesTheWeight: (r"pack\(\) changed zeros of the weight", True),
    MutatesTheInput: (r"linear\(\) changed its input", True),
    MutatesWhatItPacked: (r"after linear\(\), unpack\(pack\(w\)\) differs from w in scales", False),
    NotDeterministic: ("gave two different results", False),
    RoundsScales: (r"unpack\(pack\(w\)\) differs from w in scales", True),
    ReturnsFloat32: (r"returned torch.float32\[\d+, \d+\]", True),
    ReturnsNan: (r"error is inf times the bound.* is nan; ", True),
    RefusesEverything: (r"refuses every linear on cpu.* it is tired; let it sleep \[ZOO-001\]", True),
    RefusesWithoutAReason: ("a complete Refusal is expected", True),
    RefusesWithAWord: ("supports.. answered 'no'", False),
    RaisesInProbe: (r"probe\(\) raised OSError: no driver", True),
}
"""By backend: what the suite says of it, and whether `self_test` finds it out too."""


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite without its larger shapes: it runs once for each animal."""
    shapes = [shape for shape in cases.HURTFUL_SHAPES if shape[0] * shape[1] <= 2**14]
    monkeypatch.setattr(cases, "HURTFUL_SHAPES", (*shapes, (256, 136, 64, 33)))


def failures(backend: Backend) -> list[str]:
    """What the suite finds wrong; it ends as soon as it has found five things."""
    found: list[str] = []
    for check in checks(backend):
        try:
            check.run()
        except Failure as failure:
            found.append(str(failure))
            if len(found) == 5:
                break
    return found


@pytest.mark.usefixtures("small_shapes")
@pytest.mark.parametrize("animal", ZOO, ids=lambda animal: animal.__name__)
def test_a_wrong_backend_fails_with_the_reason(animal: Callable[[], Backend]) -> None:
    words, in_short = ZOO[animal]
    found = failures(animal())
    assert found
    with pytest.raises(Failure, match=words):
        raise Failure("\n".join(found))
    if in_short:
        with pytest.raises(Failure, match=words):
            raise Failure(self_test(animal()) or "nothing was found")


def test_the_reference_passes_and_skips_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reference = registry.get("reference")
    assert self_test(reference) is None
    assert conformance.report(reference) == 0
    assert capsys.readouterr().out.endswith(" passed, 0 failed, 0 skipped\n")


@pytest.mark.usefixtures("small_shapes")
def test_a_backend_of_one_purpose_passes_and_the_rest_is_shown_as_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    class Narrow(Right):
        """Symmetric weights in float16 only."""

        def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
            if spec.symmetric and spec.dtype == torch.float16:
                return None
            return Refusal("ZOO-003", "it serves float16 and symmetric weights", "choose those")

    assert self_test(Narrow()) is None
    assert conformance.report(Narrow()) == 0
    *skipped, counts = capsys.readouterr().out.splitlines()
    assert any(line.endswith(": it serves float16 and symmetric weights; choose those [ZOO-003]") for line in skipped)
    assert " 0 failed, " in counts


@pytest.mark.usefixtures("small_shapes")
def test_a_gradient_that_cannot_be_checked_is_shown_as_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.report(Right()) == 0
    assert "skipped 3: reference is not what is installed under that name" in capsys.readouterr().out


@pytest.mark.usefixtures("small_shapes")
def test_a_wrong_gradient_of_an_installed_backend_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(Right):
        """Its unpack is exact until it has computed something."""

        computed = False

        def linear(self, x: Tensor, packed: Packed) -> Tensor:
            self.computed = True
            return super().linear(x, packed)

        def unpack(self, packed: Packed) -> AwqWeight:
            weight = super().unpack(packed)
            return replace(weight, scales=weight.scales * 2) if self.computed else weight

    backend = Forgets()
    plugin = registry.Plugin("reference", "zoo", "1.0", backend, None)
    monkeypatch.setattr(registry, "plugins", lambda: (plugin,))
    (check,) = [c for c in checks(backend) if "float32" in c.name and "gradient" in c.name]
    with pytest.raises(Failure, match="the gradient with respect to x is wrong"):
        check.run()


def test_a_plugin_without_a_device_does_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    class Nowhere(Right):
        def probe(self) -> Probe:
            return Probe((), (Refusal("ZOO-004", "there is no zoo here", "move"),))

    assert conformance.report(Nowhere()) == 1
    assert capsys.readouterr().out.startswith("not run: there is no zoo here; move [ZOO-004]\n")
    assert self_test(Nowhere()) is None  # in a user's process that is no fault: nothing will be computed with it


@pytest.mark.usefixtures("small_shapes")
def test_an_exception_is_shown_and_the_suite_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Raises(Right):
        def linear(self, x: Tensor, packed: Packed) -> Tensor:
            if x.dim() != 2:
                raise KeyError("dimensions")
            return super().linear(x, packed)

    assert conformance.report(Raises()) == 1
    printed = capsys.readouterr().out
    assert "KeyError: 'dimensions'" in printed
    assert " 3 failed, " in printed


@pytest.mark.usefixtures("small_shapes")
def test_every_input_is_the_same_in_every_run() -> None:
    class Remembers(Right):
        def __init__(self) -> None:
            self.inputs: list[Tensor] = []

        def linear(self, x: Tensor, packed: Packed) -> Tensor:
            self.inputs.append(x.clone())
            return super().linear(x, packed)

    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        backend = Remembers()
        assert failures(backend) == []
        runs.append(backend.inputs)
    assert all(map(torch.equal, *runs))
    assert len(runs[0]) == len(runs[1])
