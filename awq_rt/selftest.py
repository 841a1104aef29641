"""Before a backend serves a model, one linear of each shape is compared with the reference; a wrong one gives way.

A kernel may be right on the machine it was written on and wrong on this one: another driver, another compiler, a GPU
that fails. On a GPU every (linear, device) is tried once and a pass is remembered, per device, driver, plugin files,
torch and shape. On a CPU, where packing a weight to try it costs as much as packing the model's own, it is tried where
`AWQ_RT_CHECK` is set. The reference itself, of priority 0, is what is trusted.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import astuple, replace

import torch
from torch import Tensor

from . import cache, examination, registry
from .backend import Backend, LinearSpec, Packed
from .devices import Device, Refusal
from .errors import AwqRtError
from .testing.tolerance import excess
from .tripwire import wanted as checking
from .weights import SYMMETRIC_ZERO, AwqWeight

CODE = "AWQ-BACKEND-020"
ROWS = (1, 4, 33, 1100)
"""A vector, fewer rows than a tile, more than one tile, and more than kernels for few rows serve."""

SAMPLES = 48
"""Of rows, and of columns, that are compared where there are more than twice as many."""


def choose(spec: LinearSpec, target: torch.device, backend: str | None = None) -> registry.Choice:
    """As `registry.select`, of backends that compute `spec` rightly on `target`; warns of the first that does not.

    Raises what `select` does: `NoBackend` where a pinned backend is wrong.
    """
    device = registry.device_for(target)
    while True:
        choice = registry.select(spec, device, backend)
        if choice.backend.priority == 0 or (target.type == "cpu" and not checking()):
            return choice
        refusal = _refusal(choice.backend, spec, device, target)  # type: ignore[arg-type]  # hashed by identity
        if refusal is None:
            return choice
        _distrust(choice.backend, spec, device, refusal)


def _distrust(backend: Backend, spec: LinearSpec, device: Device, refusal: Refusal) -> None:
    first = registry.distrust(backend.name, spec, device, refusal)
    if first:
        warnings.warn(
            f"backend {backend.name!r} computes a linear of {spec.in_features} x {spec.out_features}, group size "
            f"{spec.group_size}, {spec.dtype}, wrongly on {device}: {refusal.reason}; another backend serves it. "
            f"`awq-rt doctor` says more [{CODE}]",
            RuntimeWarning,
            stacklevel=4,
        )


@functools.cache
def _refusal(backend: Backend, spec: LinearSpec, device: Device, target: torch.device) -> Refusal | None:
    """None when `backend` is right for `spec`, as far as was tried now or is remembered."""
    remembered = cache.cache_dir() / "linears" / f"{_key(backend, spec, device)}.json"
    if cache.read_json(remembered) == "passed":
        return None
    try:
        worst = try_linear(backend, spec, target)
    except torch.OutOfMemoryError:
        return None  # the model's own weights will say so better
    except AwqRtError:
        raise  # no room, no compiler: faults of their own, and with their own remedy
    except Exception as error:  # a plugin may raise anything; that it does is the answer
        return Refusal(CODE, f"it raised {type(error).__name__}: {error}", f"update {backend.name}")
    if worst <= 1:
        cache.write_json(remembered, "passed")
        return None
    amount = f"its largest error is {worst:.3g} times the bound" if math.isfinite(worst) else "its result is not finite"
    return Refusal(CODE, amount, f"update the driver and {backend.name}")


def try_linear(backend: Backend, spec: LinearSpec, target: torch.device) -> float:
    """The largest error over the bound of a linear as `spec` says, made up on `target`. Raises what `backend` does."""
    weight = random_weight(spec, target)
    packed = backend.pack(weight, spec, target)
    rows = ROWS if target.type != "cpu" else ROWS[:3]
    return worst_excess(backend, packed, weight, spec.dtype, rows, target)


def random_weight(spec: LinearSpec, target: torch.device) -> AwqWeight:
    """A weight made on `target` as `spec` says, with values as trained models have them and every zero point."""
    random = torch.Generator(target).manual_seed(0)
    groups, n = spec.in_features // spec.group_size, spec.out_features

    def integers(rows: int) -> Tensor:
        return torch.randint(0, 16, (rows, n), dtype=torch.uint8, device=target, generator=random)

    zeros = integers(groups)
    scales = torch.rand(groups, n, device=target, generator=random) * 0.01 + 0.001
    bias = torch.randn(n, device=target, generator=random).to(spec.scale_dtype) if spec.bias else None
    return AwqWeight(
        integers(spec.in_features),
        torch.full_like(zeros, SYMMETRIC_ZERO) if spec.symmetric else zeros,
        scales.to(spec.scale_dtype),
        bias,
    )


def worst_excess(
    backend: Backend,
    packed: Packed,
    weight: AwqWeight,
    dtype: torch.dtype,
    rows: Iterable[int],
    reference_device: torch.device,
) -> float:
    """The largest error over the bound for activations of each number of rows, in a few columns over the whole depth.

    Infinite where anything in a result is not finite. The reference is computed on `reference_device`.
    """
    columns, place = sampled(weight.out_features), packed.tensors[0].device
    inputs, outputs = [], []
    for count in rows:
        x = torch.randn(count, weight.in_features, generator=torch.Generator().manual_seed(count)).to(dtype)
        y = backend.linear(x.to(place), packed)
        if not bool(torch.isfinite(y).all()):
            return math.inf
        some = sampled(count)
        inputs.append(x[some].to(reference_device))
        outputs.append(y[some.to(place)][:, columns.to(place)].to(reference_device))
    return excess(torch.cat(outputs), torch.cat(inputs), columns_of(weight, columns).to(reference_device))


def sampled(count: int) -> Tensor:
    """Numbers below `count`, spread over all, the first and the last among them; every one where they are few."""
    if count <= 2 * SAMPLES:
        return torch.arange(count)
    return torch.linspace(0, count - 1, SAMPLES, dtype=torch.float64).long()


def columns_of(weight: AwqWeight, columns: Tensor) -> AwqWeight:
    """The weight that has these columns of `weight` alone."""
    chosen = columns.to(weight.codes.device)
    bias = None if weight.bias is None else weight.bias[chosen]
    codes, zeros, scales = (part[:, chosen] for part in (weight.codes, weight.zeros, weight.scales))
    return replace(weight, codes=codes, zeros=zeros, scales=scales, bias=bias)


def _key(backend: Backend, spec: LinearSpec, device: Device) -> str:
    switches = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("AWQ_RT_")]
    kept = [switch for switch in switches if not switch.startswith(("AWQ_RT_CACHE=", "AWQ_RT_CHECK="))]
    plugin = examination.fingerprint(backend.name, backend.version)
    parts = [plugin, *map(str, astuple(device)), *map(str, astuple(spec)), *kept]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
