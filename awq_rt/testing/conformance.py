"""The conformance suite: what every backend must do, ours or a stranger's.

    python -m awq_rt.testing.conformance NAME

Each check raises `Failure` with what was found. A linear that the backend refuses is skipped, and counted as that; to
refuse every linear on a device that `probe` names is a failure. `self_test` is the short form that a plugin must pass
before it is trusted in the user's process.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from ..backend import Backend, LinearSpec, Packed
from ..devices import Device, Probe, Refusal
from ..weights import AwqWeight
from .cases import HURTFUL_SHAPES, Case, hurtful_cases, hurtful_weight
from .tolerance import bound, excess, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 4, 33)
"""A vector, fewer rows than any tile has, more than one tile has: three kernels where there are three."""
SELF_TEST_SHAPES = ((256, 64, 128), (320, 200, 64))
"""(K, N, G). The second has 5 groups, and an N that no tile divides."""


class Failure(AssertionError):
    """A backend broke the contract; the message says how."""


class _Refused(Exception):
    """The backend refuses the linear that a check is made of."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a backend must do. `run` returns None, or why it was skipped: the backend's own refusal."""

    name: str
    run: Callable[[], str | None]


def spec_of(weight: AwqWeight, dtype: torch.dtype, kernel: str = "auto") -> LinearSpec:
    """What a linear with `weight` asks for."""
    return LinearSpec.of(weight, dtype, kernel)


def self_test(backend: Backend) -> str | None:
    """What is wrong with `backend`, found in a second or two on each of its devices; None when nothing is."""
    try:
        for device in _checked_probe(backend).devices:
            _short_form(backend, device)
    except Failure as failure:
        return str(failure)
    except Exception as error:  # a plugin may raise anything; here that is its failure
        return f"{type(error).__name__}: {error}"
    return None


def checks(backend: Backend) -> Iterator[Check]:
    """The whole suite, for every device that `backend` finds, every dtype and every kernel family it names."""
    try:
        devices = _checked_probe(backend).devices
    except Failure as failure:
        yield Check("probe() is an answer", partial(_fail, str(failure)))
        return
    for device in devices:
        yield Check(f"{device}: refusals are sentences", partial(_refusals_are_sentences, backend, device))
        yield Check(f"{device}: some linear is served", partial(_some_linear_is_served, backend, device))
        for kernel in ("auto", *backend.kernels):
            for dtype in DTYPES:
                label = f"{device}, {kernel}, {str(dtype).removeprefix('torch.')}"
                subject = _Subject(backend, device, dtype, kernel)
                for case in hurtful_cases(dtype):
                    yield Check(f"{label}: {case.name}", partial(_or_refusal, _linear_is_right, subject, case))
                for check in (
                    _inputs_of_any_shape,
                    _rows_of_any_size,
                    _the_same_result_every_time,
                    _results_in_memory_of_their_own,
                    _a_weight_on_the_device_already,
                    _the_gradient_with_respect_to_x,
                ):
                    name = check.__name__.strip("_").replace("_", " ")
                    yield Check(f"{label}: {name}", partial(_or_refusal, check, subject))


@dataclass(frozen=True, slots=True)
class _Subject:
    """What is looked at: a backend on one device, for activations of one dtype, with one kernel family."""

    backend: Backend
    device: Device
    dtype: torch.dtype
    kernel: str = "auto"

    @property
    def target(self) -> torch.device:
        if self.device.type == "cpu":
            return torch.device("cpu")
        return torch.device(self.device.type, self.device.index)

    def pack(self, weight: AwqWeight) -> Packed:
        """`weight` packed; it and the round trip are checked. Raises `_Refused`."""
        spec = spec_of(weight, self.dtype, self.kernel)
        if (refusal := _refusal(self.backend, spec, self.device)) is not None:
            raise _Refused(str(refusal))
        given = _copied(weight)  # the backend may change what it is given; the comparison must not change with it
        packed = self.backend.pack(given, spec, self.target)
        if not isinstance(packed, Packed) or any(t.device != self.target for t in packed.tensors):
            raise Failure(f"pack() returned {packed!r}; a Packed with tensors on {self.target} is expected")
        if changed := _differences(given, weight):
            raise Failure(f"pack() changed {changed} of the weight it was given")
        self.check_unpacked(packed, weight, "unpack(pack(w))")
        return packed

    def check_unpacked(self, packed: Packed, weight: AwqWeight, what: str) -> None:
        if wrong := _differences(self.backend.unpack(packed).to("cpu"), weight.to("cpu")):
            raise Failure(f"{what} differs from w in {wrong}")

    def check_linear(self, x: Tensor, packed: Packed, weight: AwqWeight) -> Tensor:
        """The result for `x`, which lies on the CPU: of the right shape and within the bound, `x` untouched."""
        given = x.to(self.target)
        before = given.clone()
        y = self.backend.linear(given, packed)
        what = f"an input of shape {list(x.shape)} and strides {list(x.stride())}"
        if y.shape != (*x.shape[:-1], weight.out_features) or y.dtype != self.dtype or y.device != self.target:
            raise Failure(f"linear() returned {y.dtype}{list(y.shape)} on {y.device} for {what}")
        if not torch.equal(given, before):
            raise Failure(f"linear() changed its input: {what}")
        ratio = excess(y.cpu(), x, weight)
        if not ratio <= 1:
            raise Failure(f"the largest error is {ratio:.3g} times the bound for {what}: {_worst(y.cpu(), x, weight)}")
        return y

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)


def _or_refusal(check: Callable[..., str | None], *arguments: object) -> str | None:
    try:
        return check(*arguments)
    except _Refused as refused:
        return str(refused)


def _fail(message: str) -> None:
    raise Failure(message)


def _checked_probe(backend: Backend) -> Probe:
    try:
        probe = backend.probe()
    except Exception as error:
        raise Failure(f"probe() raised {type(error).__name__}: {error}; a missing device is an answer") from error
    if not isinstance(probe, Probe):
        raise Failure(f"probe() returned {type(probe).__name__}; a Probe is expected")
    return probe


def _short_form(backend: Backend, device: Device) -> None:
    """Zero points and none, bias and none, so that a backend with a narrow purpose is tried at it too."""
    refusal, served = "", False
    for dtype in DTYPES:
        subject = _Subject(backend, device, dtype)
        for shape in SELF_TEST_SHAPES:
            x = subject.random(max(ROWS), shape[0])
            for kind, bias in (("random", True), ("extreme zeros", True), ("symmetric", False)):
                weight = hurtful_weight(kind, *shape, bias=bias)
                try:
                    packed = subject.pack(weight)
                except _Refused as refused:
                    refusal = str(refused)
                    continue
                served = True
                for rows in ROWS:
                    subject.check_linear(x[:rows], packed, weight)
        _or_refusal(_results_in_memory_of_their_own, subject)
    if not served:
        raise Failure(f"it refuses every linear on {device}, at last because {refusal}")


def _refusal(backend: Backend, spec: LinearSpec, device: Device) -> Refusal | None:
    refusal = backend.supports(spec, device)
    complete = isinstance(refusal, Refusal) and bool(refusal.code and refusal.reason and refusal.fix)
    if refusal is not None and not complete:
        raise Failure(f"supports() answered {refusal!r}; None or a complete Refusal is expected")
    return refusal


def _refusals_are_sentences(backend: Backend, device: Device) -> None:
    if _refusal(backend, LinearSpec(64, 64, 64, torch.int32), device) is None:
        raise Failure("supports() answered None to int32 activations; a Refusal is expected")


def _some_linear_is_served(backend: Backend, device: Device) -> None:
    """Everything else is skipped where it is refused: here a backend that refuses everything fails."""
    refusal = None
    for k, n, group_size, _ in HURTFUL_SHAPES:
        for dtype in DTYPES:
            for symmetric in (False, True):
                for bias in (False, True):
                    spec = LinearSpec(k, n, group_size, dtype, symmetric, bias)
                    if (refusal := _refusal(backend, spec, device)) is None:
                        return
    raise Failure(f"supports() refuses every linear on {device}, at last because {refusal}")


def _linear_is_right(subject: _Subject, case: Case) -> None:
    """Pack, unpack and compute one case: the round trip exact, the result within the bound, all inputs untouched."""
    subject.check_linear(case.x, subject.pack(case.weight), case.weight)


def _small(subject: _Subject) -> tuple[AwqWeight, Packed]:
    weight = hurtful_weight("random", 256, 128, 128, bias=True)
    return weight, subject.pack(weight)


def _inputs_of_any_shape(subject: _Subject) -> None:
    """No rows, one dimension, three dimensions, and views: with strides, transposed, repeated, not aligned."""
    weight, packed = _small(subject)
    k = weight.in_features
    wide = subject.random(3, 5, 2 * k)
    for x in (
        wide[:0, 0, :k],
        wide[0, 0, :k],
        wide[:, :, :k],
        wide[:, ::2, ::2],
        wide.transpose(0, 1)[..., 1::2],
        wide.flatten()[1 : 1 + 2 * k].view(2, k),
        wide[:1, 0, :k].expand(3, k),
        subject.random(k, 5).T,
    ):
        subject.check_linear(x, packed, weight)


def _rows_of_any_size(subject: _Subject) -> None:
    """Zeros give the bias; values near the dtype's limits spoil no row beside them."""
    weight, packed = _small(subject)
    x = subject.random(6, weight.in_features)
    x[1] = 0
    x[3] *= 2.0**12 if subject.dtype == torch.float16 else 2.0**40
    x[4] *= 2.0**-8
    subject.check_linear(x, packed, weight)


def _the_same_result_every_time(subject: _Subject) -> None:
    """Bit for bit; and what was packed stays what it was."""
    weight, packed = _small(subject)
    for rows in ROWS:
        x = subject.random(rows, weight.in_features)
        first = subject.check_linear(x, packed, weight).clone()
        subject.check_unpacked(packed, weight, "after linear(), unpack(pack(w))")
        for _ in range(3):
            if not torch.equal(subject.check_linear(x, packed, weight), first):
                raise Failure(f"the same input of {rows} rows gave two different results")


def _results_in_memory_of_their_own(subject: _Subject) -> None:
    """A result that the caller keeps is not what a later call writes to."""
    weight, packed = _small(subject)
    for rows in ROWS:
        inputs = [subject.random(rows, weight.in_features, seed=seed).to(subject.target) for seed in range(3)]
        results, copies = [], []
        for x in inputs:
            results.append(subject.backend.linear(x, packed))
            copies.append(results[-1].clone())
        if not all(map(torch.equal, results, copies)):
            raise Failure(f"linear() wrote a later result over an earlier one ({rows} rows)")
        places = {result.data_ptr() for result in results}
        if len(places) < len(results) or not places.isdisjoint(tensor.data_ptr() for tensor in packed.tensors):
            raise Failure(f"linear() returned memory that is in use already ({rows} rows)")


def _a_weight_on_the_device_already(subject: _Subject) -> None:
    weight, _ = _small(subject)
    subject.pack(weight.to(subject.target))


def _the_gradient_with_respect_to_x(subject: _Subject) -> str | None:
    """Through the module that models use, which finds its backend by name."""
    from .. import registry
    from ..linear import AwqLinear

    weight, _ = _small(subject)
    if not any(installed is subject.backend for installed in registry.backends()):
        return f"{subject.backend.name} is not what is installed under that name, and gradients go through the registry"
    linear = AwqLinear(weight.in_features, weight.out_features, weight.group_size)
    linear.bind(weight, subject.dtype, subject.target, backend=subject.backend.name, kernel=subject.kernel)
    x = subject.random(4, weight.in_features).to(subject.target).requires_grad_()
    grad = subject.random(4, weight.out_features, seed=1)
    linear(x).backward(grad.to(subject.target))
    transposed = weight.dequantize(torch.float64).T
    exact = grad.double() @ transposed
    u = torch.finfo(subject.dtype).eps
    # Each weight, each product's accumulation and the result round to the dtype: the worst case of a sum of N terms.
    limit = u * exact.abs() + 6 * u * ((grad.double() ** 2) @ transposed.square()).sqrt() + 1e-6
    if x.grad is None or not bool(((x.grad.cpu().double() - exact).abs() <= limit).all()):
        raise Failure("the gradient with respect to x is wrong")
    return None


def _copied(weight: AwqWeight) -> AwqWeight:
    return AwqWeight(*(None if t is None else t.clone() for t in _parts(weight).values()))  # type: ignore[arg-type]


def _parts(weight: AwqWeight) -> dict[str, Tensor | None]:
    return {field.name: getattr(weight, field.name) for field in fields(weight)}


def _differences(found: AwqWeight, expected: AwqWeight) -> str:
    """The names of the tensors that differ, bit for bit; empty when none does."""
    names = []
    for name, one in _parts(found).items():
        other = _parts(expected)[name]
        same = one is other if one is None or other is None else one.dtype == other.dtype and torch.equal(one, other)
        if not same:
            names.append(name)
    return ", ".join(names)


def _worst(y: Tensor, x: Tensor, weight: AwqWeight) -> str:
    """Which element is farthest from its bound, and what it should be."""
    exact, limit = reference(x, weight), bound(x, weight)
    ratio = (y.double() - exact).abs() / limit.clamp_min(torch.finfo(torch.float64).tiny)
    place = int(torch.nan_to_num(ratio, nan=torch.inf).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), y.shape)]
    found, right, allowed = (float(tensor.flatten()[place]) for tensor in (y, exact, limit))
    return f"y{index} is {found:.6g}; {right:.6g} within {allowed:.2g} is expected"


def _main() -> int:
    from .. import registry

    if len(sys.argv) != 2:
        print("usage: python -m awq_rt.testing.conformance NAME", file=sys.stderr)
        return 2
    return report(registry.get(sys.argv[1]))


def report(backend: Backend) -> int:
    """Run the whole suite and print what failed and what was skipped. 0 when all that the backend serves is right."""
    passed = failed = 0
    skipped: Counter[str] = Counter()
    for check in checks(backend):
        try:
            reason = check.run()
        except Failure as failure:
            failed += 1
            print(f"FAILED {check.name}\n       {failure}")
        except Exception:  # a plugin may raise anything; the suite goes on and shows it
            failed += 1
            print(f"FAILED {check.name}\n{traceback.format_exc()}")
        else:
            passed += reason is None
            skipped.update([] if reason is None else [reason])
    for reason, count in skipped.items():
        print(f"skipped {count}: {reason}")
    with contextlib.suppress(Failure):  # which is among the failed checks already
        for refusal in _checked_probe(backend).refusals:
            print(f"not run: {refusal}")
    counts = f"{passed} passed, {failed} failed, {skipped.total()} skipped"
    print(f"{backend.name} {backend.version}: {counts}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(_main())
