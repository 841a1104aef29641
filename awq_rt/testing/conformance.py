"""The conformance suite: what every backend must do, ours or a stranger's.

    python -m awq_rt.testing.conformance NAME

Each check is a function that raises `Failure` with what was found. `self_test` is the short form that a plugin
must pass before it is trusted in the user's process.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..backend import Backend, LinearSpec, Packed
from ..devices import Device, Probe, Refusal
from ..weights import AwqWeight
from .cases import Case, hurtful_cases, hurtful_weight
from .tolerance import excess

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Failure(AssertionError):
    """A backend broke the contract; the message says how."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a backend must do on one device with one dtype."""

    name: str
    run: Callable[[], None]


def spec_of(weight: AwqWeight, dtype: torch.dtype, kernel: str = "auto") -> LinearSpec:
    """What a linear with `weight` asks for."""
    return LinearSpec(
        weight.in_features,
        weight.out_features,
        weight.group_size,
        dtype,
        weight.symmetric,
        weight.bias is not None,
        kernel,
    )


def self_test(backend: Backend) -> str | None:
    """What is wrong with `backend`, found in a second or two on each of its devices; None when nothing is."""
    try:
        probe = _checked_probe(backend)
        for device in probe.devices:
            for dtype in DTYPES:
                for kind in ("random", "extreme zeros"):
                    weight = hurtful_weight(kind, 256, 64, 128, bias=True)
                    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
                    _linear_is_right(backend, device, Case(kind, x, weight))
    except Failure as failure:
        return str(failure)
    except Exception as error:  # a plugin may raise anything; here that is its failure
        return f"{type(error).__name__}: {error}"
    return None


def checks(backend: Backend) -> Iterator[Check]:
    """The whole suite, for every device that `backend` finds, every dtype and every kernel family it supports."""
    probe = _checked_probe(backend)
    for device in probe.devices:
        yield Check(f"{device}: refusals are sentences", partial(_refusals_are_sentences, backend, device))
        for kernel in ("auto", *backend.kernels):
            for dtype in DTYPES:
                label = f"{device}, {kernel}, {str(dtype).removeprefix('torch.')}"
                for case in hurtful_cases(dtype):
                    if backend.supports(spec_of(case.weight, dtype, kernel), device) is None:
                        yield Check(f"{label}: {case.name}", partial(_linear_is_right, backend, device, case, kernel))
                for name, check in (
                    ("inputs of any shape", _inputs_of_any_shape),
                    ("the same result twice", _same_result_twice),
                    ("the gradient with respect to x", _gradient_is_right),
                ):
                    yield Check(f"{label}: {name}", partial(check, backend, device, dtype, kernel))


def _checked_probe(backend: Backend) -> Probe:
    try:
        probe = backend.probe()
    except Exception as error:
        raise Failure(f"probe() raised {type(error).__name__}: {error}; a missing device is an answer") from error
    if not isinstance(probe, Probe):
        raise Failure(f"probe() returned {type(probe).__name__}; a Probe is expected")
    return probe


def _refusals_are_sentences(backend: Backend, device: Device) -> None:
    impossible = LinearSpec(64, 64, 64, torch.int32)
    refusal = backend.supports(impossible, device)
    if not isinstance(refusal, Refusal) or not (refusal.code and refusal.reason and refusal.fix):
        raise Failure(f"supports() answered {refusal!r} to int32 activations; a complete Refusal is expected")


def _linear_is_right(backend: Backend, device: Device, case: Case, kernel: str = "auto") -> None:
    """Pack, unpack and compute one case: the round trip exact, the result within the bound, the weight untouched."""
    spec = spec_of(case.weight, case.x.dtype, kernel)
    refusal = backend.supports(spec, device)
    if refusal is not None:
        return
    target = _torch_device(device)
    packed = backend.pack(case.weight, spec, target)
    if not isinstance(packed, Packed) or any(t.device != target for t in packed.tensors):
        raise Failure(f"pack() returned {packed!r}; a Packed with tensors on {target} is expected")
    unpacked = backend.unpack(packed).to("cpu")
    if not unpacked.equal(case.weight):
        raise Failure(f"unpack(pack(w)) differs from w ({case.name})")
    y = backend.linear(case.x.to(target), packed)
    if y.shape != (*case.x.shape[:-1], spec.out_features) or y.dtype != spec.dtype:
        raise Failure(f"linear() returned {y.dtype}{list(y.shape)} ({case.name})")
    ratio = excess(y.cpu(), case.x, case.weight)
    if not ratio <= 1:
        raise Failure(f"the largest error is {ratio:.3g} times the bound ({case.name}, {case.x.dtype})")


def _torch_device(device: Device) -> torch.device:
    return torch.device("cpu") if device.type == "cpu" else torch.device(device.type, device.index)


def _small(backend: Backend, device: Device, dtype: torch.dtype, kernel: str) -> tuple[AwqWeight, Packed] | None:
    weight = hurtful_weight("random", 256, 128, 128, bias=True)
    spec = spec_of(weight, dtype, kernel)
    if backend.supports(spec, device) is not None:
        return None
    return weight, backend.pack(weight, spec, _torch_device(device))


def _inputs_of_any_shape(backend: Backend, device: Device, dtype: torch.dtype, kernel: str) -> None:
    """No rows, one dimension, three dimensions, and a view with strides."""
    if (made := _small(backend, device, dtype, kernel)) is None:
        return
    weight, packed = made
    wide = torch.randn(3, 5, 2 * weight.in_features).to(dtype)
    for x in (
        wide[:0, 0, :256],
        wide[0, 0, :256],
        wide[:, :, :256],
        wide[:, ::2, ::2],
        wide.transpose(0, 1)[..., 1::2],
    ):
        y = backend.linear(x.to(packed.tensors[0].device), packed).cpu()
        if y.shape != (*x.shape[:-1], weight.out_features):
            raise Failure(f"an input of shape {list(x.shape)} gave {list(y.shape)}")
        if not excess(y, x, weight) <= 1:
            raise Failure(f"an input of shape {list(x.shape)} and strides {x.stride()} gave a wrong result")


def _same_result_twice(backend: Backend, device: Device, dtype: torch.dtype, kernel: str) -> None:
    if (made := _small(backend, device, dtype, kernel)) is None:
        return
    weight, packed = made
    x = torch.randn(4, weight.in_features).to(dtype).to(packed.tensors[0].device)
    if not torch.equal(backend.linear(x, packed), backend.linear(x, packed)):
        raise Failure("the same input gave two different results")


def _gradient_is_right(backend: Backend, device: Device, dtype: torch.dtype, kernel: str) -> None:
    """The gradient with respect to x, through the module that models use."""
    from .. import registry
    from ..linear import AwqLinear

    if (made := _small(backend, device, dtype, kernel)) is None:
        return
    weight, packed = made
    if not any(loaded is backend for loaded in registry.backends()):
        return  # the op finds backends through the registry; one that is not installed has no op
    linear = AwqLinear(weight.in_features, weight.out_features, weight.group_size)
    linear.bind(weight, dtype, packed.tensors[0].device, backend=backend.name, kernel=kernel)
    x = torch.randn(4, weight.in_features).to(dtype).to(packed.tensors[0].device).requires_grad_()
    grad = torch.randn(4, weight.out_features).to(dtype)
    linear(x).backward(grad.to(x.device))
    transposed = weight.dequantize(torch.float64).T
    exact = grad.double() @ transposed
    u = torch.finfo(dtype).eps
    # Each weight, each product's accumulation and the result round to `dtype`: the worst case of a sum of N terms.
    limit = u * exact.abs() + 6 * u * ((grad.double() ** 2) @ transposed.square()).sqrt() + 1e-6
    if x.grad is None or bool(((x.grad.cpu().double() - exact).abs() > limit).any()):
        raise Failure("the gradient with respect to x is wrong")


def _main() -> int:
    from .. import registry

    if len(sys.argv) != 2:
        print("usage: python -m awq_rt.testing.conformance NAME", file=sys.stderr)
        return 2
    backend = registry.get(sys.argv[1])
    passed = failed = 0
    for check in checks(backend):
        try:
            check.run()
            passed += 1
        except Failure as failure:
            failed += 1
            print(f"FAILED {check.name}\n       {failure}")
        except Exception:  # a plugin may raise anything; the suite goes on and shows it
            failed += 1
            print(f"FAILED {check.name}\n{traceback.format_exc()}")
    for refusal in backend.probe().refusals:
        print(f"not run: {refusal}")
    print(f"{backend.name} {backend.version}: {passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(_main())
