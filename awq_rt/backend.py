"""The contract between the core and a backend plugin, on one screen.

A plugin is a distribution with an entry point in the group `awq_rt.backends` that names an object (a module will do)
with the members of `Backend`. It receives canonical weights and returns opaque packed ones, which the core only holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from .devices import Device, Probe, Refusal, Tool
from .weights import AwqWeight

if TYPE_CHECKING:
    from .ops import AttentionSpec

CONTRACT = (1, 1)
"""(major, minor). A plugin is accepted when its major is ours and its minor is not above ours."""


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What a linear asks of a backend. `dtype` is that of its input and output; `kernel` is a family name or "auto"."""

    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype
    symmetric: bool = False
    bias: bool = False
    kernel: str = "auto"
    bits: Literal[4] = 4
    scale_dtype: torch.dtype = torch.float16

    @classmethod
    def of(cls, weight: AwqWeight, dtype: torch.dtype, kernel: str = "auto") -> LinearSpec:
        sizes = (weight.in_features, weight.out_features, weight.group_size)
        bias = weight.bias is not None
        return cls(*sizes, dtype, weight.symmetric, bias, kernel, scale_dtype=weight.scales.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A backend's own form of one weight: tensors on one device, and `layout`, a string that only the backend reads."""

    layout: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A kernel that is ready in the cache, `done` of `total`; `compiled` says that it was not there before."""

    name: str
    compiled: bool
    done: int
    total: int


class Backend(Protocol):
    name: str
    version: str
    contract: tuple[int, int]
    priority: int  # the highest that supports a linear is chosen; 0 is the reference
    kernels: tuple[str, ...]  # families that `kernel=` may name
    ops: Mapping[str, Callable[..., Tensor]]  # fused operators by name; the core falls back to torch for each

    def probe(self) -> Probe:
        """The devices this backend drives here, and why not others. Never raises, creates no device context."""

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        """None when `pack` and `linear` will work for `spec` on `device`, else the reason."""

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        """The weight in this backend's form, complete on `device`. `weight` may lie on the CPU or on `device`."""

    def unpack(self, packed: Packed) -> AwqWeight:
        """The exact inverse of `pack`, on the packed tensors' device."""

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """`x` [..., K] of the spec's dtype -> [..., N]. On the current stream; never waits; memory from torch only."""


class Joins(Protocol):
    """What a backend may bring beside: weights that read the same x, as one."""

    def join(self, parts: Sequence[Packed]) -> tuple[Packed, tuple[Packed, ...]] | None:
        """One `Packed` with the columns of all `parts`, and each again as a view of it; None where there is none."""


class Warms(Protocol):
    """What a backend may bring beside (since 1.1): kernels that are compiled at run time, compiled ahead."""

    def warmup(self, specs: Sequence[LinearSpec], device: torch.device) -> Iterator[Prepared]:
        """Compile all that `linear` will need for `specs` on `device`; each kernel as it is ready, before `pack`."""


class PreparesOps(Protocol):
    """What a backend may bring beside (since 1.1): its fused operators, compiled before a decoder's first step."""

    def prepare_ops(
        self,
        dtype: torch.dtype,
        device: torch.device,
        hidden: Collection[int],
        mlps: Collection[tuple[int, str]],
        attentions: Collection[tuple[AttentionSpec, bool]],
    ) -> None:
        """For norms of sizes `hidden`, (intermediate size, activation) and (attention, whether it has slopes)."""


Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None] | None, Tensor]]


class Captures(Protocol):
    """What a backend may bring beside (since 1.1) where devices have no graphs: work repeated without its Python."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None] | None, Tensor]:
        """Run `function`; what does its work again on the same tensors, None where that cannot be, and its result."""


class Equipped(Protocol):
    """What a backend may bring beside (since 1.1): what it compiles with at run time, for `awq-rt doctor`."""

    def tools(self) -> Sequence[Tool]:
        """The compiler, its headers and the runtime, and where each was found. Creates no device context."""
