"""The CPU backend: 4-bit kernels in C++ for AVX-512, AVX2, NEON and any processor, chosen when they are first needed.

pack     AwqWeight -> strips of 16 columns (strips.py)
linear   few rows: codes are multiplied as they are decoded; many: a tile is dequantised once (src/linear.inc)
ops      the operators between the linears of a decoder (fused.py)
capture  a step's work, repeated by one call (capture.py)

`AWQ_RT_CPU_ISA=avx512|avx2|neon|plain` forces an instruction set. `AWQ_RT_CPU_INT8=1` rounds activations to 8 bits a
group, which is faster and leaves the bound of the exact kernels; it is never the default.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from awq_rt import devices
from awq_rt.backend import LinearSpec, Packed
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.weights import AwqWeight

from . import _native, capture, fused, strips

__version__ = "0.1.0"


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CpuBackend:
    """Implements `awq_rt.backend.Backend`."""

    name = "cpu"
    version = __version__
    contract = (1, 0)
    priority = 5
    kernels: tuple[str, ...] = ("gemv", "gemm")
    ops: Mapping[str, Callable[..., Tensor]] = fused.OPS

    def probe(self) -> Probe:
        if refusal := _unusable():
            return Probe((), (refusal,))
        return Probe(tuple(replace(device, driver=_chosen_and_why()) for device in devices.cpu().devices))

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        if device.type != "cpu":
            return Refusal("AWQ-CPU-010", f"{device} is no CPU", "choose device='cpu'")
        if refusal := _unusable():
            return refusal
        if spec.dtype not in DTYPES:
            return Refusal("AWQ-CPU-011", f"activations are {spec.dtype}", f"choose one of {DTYPES}")
        if spec.in_features == 0:
            return Refusal("AWQ-CPU-012", "the linear has no input features", "use backend='reference'")
        return None

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        mode = "int8" if spec.kernel == "auto" and _int8_wanted() else spec.kernel
        if mode == "int8":
            _say_int8()
        moved = weight.to(device)
        return strips.pack(moved, strips.Layout.of(moved, spec, mode))

    unpack = staticmethod(strips.unpack)
    linear = staticmethod(strips.linear)
    join = staticmethod(strips.join)
    capture = staticmethod(capture.capture)


def _int8_wanted() -> bool:
    return os.environ.get("AWQ_RT_CPU_INT8", "0") not in ("", "0")


@functools.cache
def _say_int8() -> None:
    warnings.warn(
        "AWQ_RT_CPU_INT8 is set: activations are rounded to 8 bits a group; results are no longer exact",
        RuntimeWarning,
        stacklevel=4,
    )


def _unusable() -> Refusal | None:
    """Why what the environment asks for cannot be had here."""
    try:
        isa, _ = _native.chosen()
    except ValueError as error:
        return Refusal("AWQ-CPU-001", str(error), "unset AWQ_RT_CPU_ISA, or set it to one of those")
    if _int8_wanted() and not _native.has_int8():
        reason = f"AWQ_RT_CPU_INT8 asks for 8-bit activations, for which {isa} has no kernels"
        return Refusal("AWQ-CPU-002", reason, "unset AWQ_RT_CPU_INT8")
    return None


def _chosen_and_why() -> str:
    """`avx512 with VNNI, the widest here`: for `awq-rt doctor`."""
    isa, features = _native.chosen()
    why = "as AWQ_RT_CPU_ISA asks" if os.environ.get("AWQ_RT_CPU_ISA") else "the widest here"
    rounding = ", activations rounded to 8 bits" if _int8_wanted() else ""
    return f"{isa}{' with ' + features if features else ''}, {why}{rounding}"


backend = CpuBackend()
