"""The NVIDIA backend: kernels on the matrix units of sm_80 and later, compiled by NVRTC for the GPU that is there.

pack     AwqWeight -> tiles (packing.py, tiled.py), or rows where a shape fits no tile (awq_rt/packing/rows.py)
linear   few rows: gemm.py; many: dequantize.py and torch's BLAS; selection.py says which, and how cut
exllama  a family with a layout and kernels of its own, for who asks for it (exllama.py)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from awq_rt import devices
from awq_rt.backend import LinearSpec, Packed, Prepared
from awq_rt.devices import Device, Probe, Refusal, Tool
from awq_rt.errors import OutOfMemory
from awq_rt.ops import AttentionSpec
from awq_rt.packing import SCALE_KINDS, Layout, rows
from awq_rt.packing import exllama as strips
from awq_rt.weights import AwqWeight

from . import exllama, fused, joining, packing, requirements, tiled

__version__ = "0.1.0"

DTYPES = (torch.float16, torch.bfloat16)
OLDEST = 80
"""Compute capability 8.0: bfloat16 and cp.async."""


class CudaBackend:
    """Implements `awq_rt.backend.Backend`."""

    name = "cuda"
    version = __version__
    contract = (1, 1)
    priority = 100
    kernels: tuple[str, ...] = ("gemv", "gemm", "exllama")
    ops: Mapping[str, Callable[..., Tensor]] = fused.OPS

    def probe(self) -> Probe:
        found = devices.nvidia()
        if not found.devices:
            return found
        if refusal := requirements.missing():
            return Probe((), (*found.refusals, refusal))
        answers = [(device, _old(device) or requirements.unknown(device)) for device in found.devices]
        usable = tuple(device for device, refusal in answers if refusal is None)
        refusals = tuple(refusal for _, refusal in answers if refusal is not None)
        return replace(found, devices=usable, refusals=(*found.refusals, *refusals))

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        if device.platform != "nvidia":
            return Refusal("AWQ-CUDA-010", f"{device} is no NVIDIA GPU", "choose a device that `awq-rt doctor` lists")
        if refusal := _old(device):
            return refusal
        if spec.dtype not in DTYPES:
            return Refusal("AWQ-CUDA-012", f"activations are {spec.dtype}", f"choose one of {DTYPES}, or the reference")
        if spec.kernel != "auto" and (reason := _unfit(spec)):
            return Refusal("AWQ-CUDA-013", f"kernel {spec.kernel!r} cannot serve it: {reason}", "choose kernel='auto'")
        return requirements.missing() or requirements.unknown(device)

    def tools(self) -> Sequence[Tool]:
        return requirements.tools()

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        with contextlib.suppress(torch.OutOfMemoryError):
            packed = _packed(weight, spec, device)
            _make_ready(packed, device)
            return packed
        # Raised here, where torch's error has gone and with it the frames that held what was half made.
        raise OutOfMemory(_no_room(spec, device))

    def join(self, parts: Sequence[Packed]) -> tuple[Packed, tuple[Packed, ...]] | None:
        joined = joining.join(parts)
        if joined is not None:
            _make_ready(joined[0], joined[0].tensors[0].device)
        return joined

    def warmup(self, specs: Sequence[LinearSpec], device: torch.device) -> Iterator[Prepared]:
        layouts = (_layout(spec) for spec in specs if not _unfit(spec))
        found = (program for layout in layouts for program in _plan(layout, _index(device)).programs())
        programs = list(dict.fromkeys(found))
        for done, built in enumerate(tiled.builder().build(programs), start=1):
            yield Prepared(str(built.program), built.compiled, done, len(programs))

    def prepare_ops(
        self,
        dtype: torch.dtype,
        device: torch.device,
        hidden: Collection[int],
        mlps: Collection[tuple[int, str]],
        attentions: Collection[tuple[AttentionSpec, bool]],
    ) -> None:
        tiled.builder().machine_codes(fused.programs(dtype, _index(device), hidden, mlps, attentions))

    def unpack(self, packed: Packed) -> AwqWeight:
        if packed.layout == rows.PREFIX:
            return rows.unpack(packed)
        return strips.unpack(packed) if packed.layout.startswith(strips.PREFIX) else tiled.unpack(packed)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        flat = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
        if packed.layout == rows.PREFIX:
            y = rows.linear(flat, packed)
        else:
            if flat.data_ptr() % 16:  # a view that begins in the middle of somebody's storage
                flat = flat.clone()
            index = _index(x.device)
            plan = _plan(packed.layout, index)
            if index == torch.cuda.current_device():
                y = plan.linear(flat, packed)
            else:
                with torch.cuda.device(index):
                    y = plan.linear(flat, packed)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _packed(weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
    moved = weight.to(device)
    if _unfit(spec) or (moved.bias is not None and moved.bias.dtype not in SCALE_KINDS):
        return rows.pack(moved)
    return strips.pack(moved, spec) if spec.kernel == strips.PREFIX else tiled.pack(moved, spec)


def _make_ready(packed: Packed, device: torch.device) -> None:
    """Compile what `packed` needs, and wait for its tensors."""
    if device.type == "cuda" and packed.layout != rows.PREFIX:
        _build(packed.layout, _index(device))
        # Kernels read the weight before the kernels ahead of them have ended: it must be there by now.
        torch.cuda.current_stream(device).synchronize()


@functools.cache  # a model has hundreds of linears in a handful of layouts
def _build(layout: str, device_index: int) -> None:
    _plan(layout, device_index).build()


def _no_room(spec: LinearSpec, device: torch.device) -> str:
    """What `OutOfMemory` says; `device` is a GPU, for only there does torch raise it."""
    codes_mib = spec.in_features * spec.out_features / 2**20
    free, total = (size / 2**20 for size in torch.cuda.mem_get_info(device))
    ours = torch.cuda.memory_allocated(device) / 2**20
    return (
        f"{device} has no room to pack a linear of {spec.in_features} x {spec.out_features}: about {3 * codes_mib:.0f} "
        f"MiB are needed for a moment, and {codes_mib / 2:.0f} MiB stay; {free:.0f} of {total:.0f} MiB are free, and "
        f"this process holds {ours:.0f} MiB; end other programs on it, choose a larger device, or several with "
        "device_map='auto'"
    )


def _layout(spec: LinearSpec) -> str:
    """The layout that `spec` is packed in, as far as programs depend on it."""
    return str(Layout.expected(strips.PREFIX if spec.kernel == strips.PREFIX else tiled.PREFIX, spec))


def _plan(layout: str, device_index: int) -> tiled.TiledLinear | exllama.ExllamaLinear:
    """What computes with a weight in `layout`, which is not that of rows."""
    plan = exllama.plan if layout.startswith(strips.PREFIX) else tiled.plan
    return plan(layout, device_index)


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


def _unfit(spec: LinearSpec) -> str:
    """Why `spec` does not fit the form that its kernel family packs; empty when it does."""
    if spec.kernel == strips.PREFIX:
        return strips.refusal(spec)
    if spec.in_features % 8 or spec.out_features % 8:
        return f"in_features {spec.in_features} and out_features {spec.out_features} must be multiples of 8"
    if packing.kernel_group_size(spec.in_features, spec.group_size) < packing.SMALLEST_GROUP:
        return f"group_size {spec.group_size} has no factor of {packing.SMALLEST_GROUP}"
    return ""


backend = CudaBackend()
