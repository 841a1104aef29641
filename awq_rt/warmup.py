"""Kernels that are compiled at run time, compiled ahead: all at once before a model is loaded, never while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from . import registry
from .backend import LinearSpec, Prepared
from .checkpoint import Checkpoint, StoredLinear

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears that read the same input; they may be computed as one."""


def warmup(specs: Iterable[LinearSpec], device: torch.device, backend: str | None = None) -> Iterator[Prepared]:
    """Compile what the backends that serve `specs` on `device` need; each kernel as it is ready.

    Raises as `registry.select` and the compiler do. Backends without kernels to compile have nothing to do.
    """
    served: dict[str, list[LinearSpec]] = {}
    for spec in dict.fromkeys(specs):
        choice = registry.select(spec, registry.device_for(device), backend)
        served.setdefault(choice.backend.name, []).append(spec)
    for name, its in served.items():
        compile_ahead = getattr(registry.get(name), "warmup", None)
        if compile_ahead is not None:
            yield from compile_ahead(its, device)


def specs_of(checkpoint: Checkpoint, dtype: torch.dtype, kernel: str) -> list[LinearSpec]:
    """What the linears of `checkpoint` ask of a backend, each alone and joined with those that read the same input."""
    found = [spec_of([linear], dtype, kernel) for linear in checkpoint.linears.values()]
    places: dict[str, dict[str, StoredLinear]] = {}
    for name, linear in checkpoint.linears.items():
        place, _, last = name.rpartition(".")
        places.setdefault(place, {})[last] = linear
    for members in places.values():
        found += [spec_of(parts, dtype, kernel) for parts in _joined(members)]
    return list(dict.fromkeys(found))


def spec_of(parts: Sequence[StoredLinear], dtype: torch.dtype, kernel: str) -> LinearSpec:
    """What the linear that `parts` make up side by side asks of a backend; from headers alone."""
    first = parts[0]
    return LinearSpec(
        first.in_features,
        sum(part.out_features for part in parts),
        first.group_size,
        dtype,
        symmetric=all(part.symmetric for part in parts),
        bias=any(part.bias for part in parts),
        kernel=kernel,
        scale_dtype=_scale_dtype(first),
    )


def _joined(members: Mapping[str, StoredLinear]) -> Iterator[list[StoredLinear]]:
    for names in JOINED:
        parts = [members[name] for name in names if name in members]
        alike = {(part.in_features, part.group_size, _scale_dtype(part)) for part in parts}
        if len(parts) == len(names) and len(alike) == 1:
            yield parts


def _scale_dtype(linear: StoredLinear) -> torch.dtype:
    """Every layout calls its scales one of these."""
    return next(linear.tensors[name].dtype for name in ("scales", "weight_scale") if name in linear.tensors)
