"""The AMD backend: kernels for CDNA2 to 4 and RDNA2 to 4, compiled by hipRTC for the GPU that is there.

Compiled and simulated, not run on hardware.

pack     AwqWeight -> tiles (packing.py, tiled.py), or rows where a shape fits no tile (rows.py)
linear   few rows: kernels/gemv.hip; some: kernels/gemm.hip; many: kernels/dequantize.hip and torch's BLAS
         (selection.py says which)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from awq_rt import devices
from awq_rt.backend import LinearSpec, Packed, Prepared
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.weights import AwqWeight

from . import driver, packing, requirements, rows, targets, tiled

__version__ = "0.1.0"

DTYPES = (torch.float16, torch.bfloat16)


class RocmBackend:
    """Implements `awq_rt.backend.Backend`."""

    name = "rocm"
    version = __version__
    contract = (1, 1)
    priority = 90
    kernels: tuple[str, ...] = ("gemv", "gemm")
    ops: Mapping[str, Callable[..., Tensor]] = {}

    def probe(self) -> Probe:
        found = devices.amd()
        if not found.devices:
            return found
        if refusal := requirements.missing():
            return Probe((), (*found.refusals, refusal))
        usable = tuple(device for device in found.devices if targets.refusal(device) is None)
        refusals = tuple(refusal for device in found.devices if (refusal := targets.refusal(device)))
        return replace(found, devices=usable, refusals=(*found.refusals, *refusals))

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        if device.platform != "amd":
            return Refusal("AWQ-ROCM-010", f"{device} is no AMD GPU", "choose a device that `awq-rt doctor` lists")
        if refusal := targets.refusal(device):
            return refusal
        if spec.dtype not in DTYPES:
            return Refusal("AWQ-ROCM-012", f"activations are {spec.dtype}", f"choose one of {DTYPES}, or the reference")
        if spec.kernel != "auto" and (reason := _unserved(spec, device)):
            return Refusal("AWQ-ROCM-013", f"kernel {spec.kernel!r} cannot serve it: {reason}", "choose kernel='auto'")
        return None

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        moved = weight.to(device)
        fits = packing.fits(spec.in_features, spec.group_size)
        if not fits or (moved.bias is not None and moved.bias.dtype not in tiled.SCALE_KINDS):
            return rows.pack(moved, spec)
        packed = tiled.pack(moved, spec)
        if device.type == "cuda":
            tiled.plan(packed.layout, _index(device)).build()
        return packed

    def unpack(self, packed: Packed) -> AwqWeight:
        return rows.unpack(packed) if packed.layout == rows.PREFIX else tiled.unpack(packed)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        flat = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
        if packed.layout == rows.PREFIX:
            y = rows.linear(flat, packed)
        else:
            if flat.data_ptr() % 16:  # a view that begins in the middle of somebody's storage
                flat = flat.clone()
            index = _index(x.device)
            with driver.entered(index):
                y = tiled.plan(packed.layout, index).linear(flat, packed)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def warmup(self, specs: Sequence[LinearSpec], device: torch.device) -> Iterator[Prepared]:
        served = [spec for spec in specs if packing.fits(spec.in_features, spec.group_size)]
        yield from tiled.warmup([tiled.Layout.of(spec, spec.scale_dtype, None) for spec in served], _index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _unserved(spec: LinearSpec, device: Device) -> str:
    """Why no kernel of the family asked for serves `spec`; empty when one does."""
    if not packing.fits(spec.in_features, spec.group_size):
        return f"in_features {spec.in_features} and group_size {spec.group_size} must be multiples of 8"
    found = targets.architecture(device.arch)
    group_size = packing.kernel_group_size(spec.in_features, spec.group_size)
    if spec.kernel == "gemm" and (found is None or not found.matrix):
        return f"{device.arch} has no matrix unit that the kernels know"
    if spec.kernel == "gemm" and group_size % 32:
        return f"group_size {spec.group_size} must be a multiple of 32"
    return ""


backend = RocmBackend()
