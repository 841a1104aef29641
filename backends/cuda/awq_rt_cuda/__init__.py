"""The NVIDIA backend: kernels on the matrix units of sm_80 and later, compiled by NVRTC for the GPU that is there.

pack     AwqWeight -> tiles (packing.py, tiled.py), or rows where a shape fits no tile (rows.py)
linear   few rows: gemm.py; many: dequantize.py and torch's BLAS; selection.py says which, and how cut
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from awq_rt import devices
from awq_rt.backend import LinearSpec, Packed
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.weights import AwqWeight

from . import packing, requirements, rows, tiled

__version__ = "0.1.0"

DTYPES = (torch.float16, torch.bfloat16)
OLDEST = 80
"""Compute capability 8.0: bfloat16 and cp.async."""


class CudaBackend:
    """Implements `awq_rt.backend.Backend`."""

    name = "cuda"
    version = __version__
    contract = (1, 0)
    priority = 100
    kernels: tuple[str, ...] = ("gemv", "gemm")
    ops: Mapping[str, Callable[..., Tensor]] = {}

    def probe(self) -> Probe:
        found = devices.nvidia()
        if not found.devices:
            return found
        if refusal := requirements.missing():
            return Probe((), (*found.refusals, refusal))
        usable = tuple(device for device in found.devices if _old(device) is None)
        refusals = tuple(refusal for device in found.devices if (refusal := _old(device)))
        return replace(found, devices=usable, refusals=(*found.refusals, *refusals))

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        if device.platform != "nvidia":
            return Refusal("AWQ-CUDA-010", f"{device} is no NVIDIA GPU", "choose a device that `awq-rt doctor` lists")
        if refusal := _old(device):
            return refusal
        if spec.dtype not in DTYPES:
            return Refusal("AWQ-CUDA-012", f"activations are {spec.dtype}", f"choose one of {DTYPES}, or the reference")
        if spec.kernel != "auto" and (reason := _no_tiles(spec)):
            return Refusal("AWQ-CUDA-013", f"kernel {spec.kernel!r} cannot serve it: {reason}", "choose kernel='auto'")
        return None

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        moved = weight.to(device)
        if _no_tiles(spec) or (moved.bias is not None and moved.bias.dtype not in tiled.SCALE_KINDS):
            return rows.pack(moved, spec)
        packed = tiled.pack(moved, spec)
        if device.type == "cuda":
            tiled.plan(packed.layout, _index(device)).build()
            # Kernels read the weight before the kernels ahead of them have ended: it must be there by now.
            torch.cuda.current_stream(device).synchronize()
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
            plan = tiled.plan(packed.layout, index)
            if index == torch.cuda.current_device():
                y = plan.linear(flat, packed)
            else:
                with torch.cuda.device(index):
                    y = plan.linear(flat, packed)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _old(device: Device) -> Refusal | None:
    capability = int(device.arch.removeprefix("sm_")) if device.arch.startswith("sm_") else 0
    if capability >= OLDEST:
        return None
    return Refusal(
        "AWQ-CUDA-011",
        f"{device} has compute capability {capability // 10}.{capability % 10}; 8.0 or later is needed",
        "use backend='reference' on this GPU",
    )


def _no_tiles(spec: LinearSpec) -> str:
    """Why `spec` does not fit tiles; empty when it does."""
    if spec.in_features % 8 or spec.out_features % 8:
        return f"in_features {spec.in_features} and out_features {spec.out_features} must be multiples of 8"
    if packing.kernel_group_size(spec.in_features, spec.group_size) < packing.SMALLEST_GROUP:
        return f"group_size {spec.group_size} has no factor of {packing.SMALLEST_GROUP}"
    return ""


backend = CudaBackend()
