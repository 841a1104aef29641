"""The AMD backend: kernels for CDNA2 to 4 and RDNA2 to 4, compiled by hipRTC for the GPU that is there.

Compiled and simulated, not run on hardware.

pack     AwqWeight -> tiles (packing.py, tiled.py), or rows where a shape fits no tile (awq_rt/packing/rows.py)
linear   few rows: kernels/gemv.hip, on CDNA kernels/gemm.hip; some: kernels/gemm.hip; many: kernels/dequantize.hip and
         torch's BLAS (selection.py says which)
exllama  a family with a layout and kernels of its own, for who asks for it (exllama.py)
ops      the fused operators of a decoder, whose kernels all vendors share (awq_rt/kernels, launcher.py)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from awq_rt import devices
from awq_rt.backend import LinearSpec, Packed, Prepared
from awq_rt.devices import Device, Probe, Refusal, Tool
from awq_rt.kernels.operators import Operators
from awq_rt.ops import AttentionSpec
from awq_rt.packing import SCALE_KINDS, Layout, rows
from awq_rt.packing import exllama as strips
from awq_rt.packing.joining import join
from awq_rt.weights import AwqWeight

from . import device as gpu
from . import driver, exllama, packing, requirements, targets, tiled
from .launcher import HipLauncher

__version__ = "0.1.0"

DTYPES = (torch.float16, torch.bfloat16)
OPERATORS = Operators(HipLauncher())


class RocmBackend:
    """Implements `awq_rt.backend.Backend`."""

    name = "rocm"
    version = __version__
    contract = (1, 1)
    priority = 90
    kernels: tuple[str, ...] = ("gemv", "gemm", "exllama")
    ops: Mapping[str, Callable[..., Tensor]] = OPERATORS.by_name

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

    def tools(self) -> Sequence[Tool]:
        return requirements.tools()

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        moved = weight.to(device)
        if _unfit(spec) or (moved.bias is not None and moved.bias.dtype not in SCALE_KINDS):
            return rows.pack(moved)
        packed = strips.pack(moved, spec) if spec.kernel == strips.PREFIX else tiled.pack(moved, spec)
        if device.type == "cuda":
            _plan(packed.layout, gpu.index_of(device)).build()
        return packed

    def join(self, parts: Sequence[Packed]) -> tuple[Packed, tuple[Packed, ...]] | None:
        joined = join(parts, tiled.PREFIX, packing.STRIP)
        if joined is not None and (device := joined[0].tensors[0].device).type == "cuda":
            _plan(joined[0].layout, gpu.index_of(device)).build()
        return joined

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
            index = gpu.index_of(x.device)
            with driver.entered(index):
                y = _plan(packed.layout, index).linear(flat, packed)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def warmup(self, specs: Sequence[LinearSpec], device: torch.device) -> Iterator[Prepared]:
        index = gpu.index_of(device)
        layouts = (_layout(spec) for spec in specs if not _unfit(spec))
        programs = list(dict.fromkeys(program for layout in layouts for program in _plan(layout, index).programs()))
        for done, built in enumerate(gpu.builder().build(programs), start=1):
            yield Prepared(str(built.program), built.compiled, done, len(programs))

    def prepare_ops(
        self,
        dtype: torch.dtype,
        device: torch.device,
        hidden: Collection[int],
        mlps: Collection[tuple[int, str]],
        attentions: Collection[tuple[AttentionSpec, bool]],
    ) -> None:
        gpu.builder().machine_codes(OPERATORS.programs(dtype, gpu.index_of(device), hidden, mlps, attentions))


def _plan(layout: str, device_index: int) -> tiled.TiledLinear | exllama.ExllamaLinear:
    """What computes with a weight in `layout`, which is not that of rows."""
    plan = exllama.plan if layout.startswith(strips.PREFIX) else tiled.plan
    return plan(layout, device_index)


def _layout(spec: LinearSpec) -> str:
    """The layout that `spec` is packed in, as far as programs depend on it."""
    return str(Layout.expected(strips.PREFIX if spec.kernel == strips.PREFIX else tiled.PREFIX, spec))


def _unfit(spec: LinearSpec) -> str:
    """Why `spec` does not fit the form that its kernel family packs; empty when it does."""
    if spec.kernel == strips.PREFIX:
        return strips.refusal(spec)
    if not packing.fits(spec.in_features, spec.group_size):
        return f"in_features {spec.in_features} and group_size {spec.group_size} must be multiples of 8"
    return ""


def _unserved(spec: LinearSpec, device: Device) -> str:
    """Why no kernel of the family asked for serves `spec`; empty when one does."""
    if reason := _unfit(spec):
        return reason
    found = targets.architecture(device.arch)
    if spec.kernel == "gemm" and (found is None or not found.matrix):
        return f"{device.arch} has no matrix unit that the kernels know"
    return ""


backend = RocmBackend()
