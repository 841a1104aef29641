"""The PyTorch reference backend: right for every shape, dtype and device, and the default where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from awq_rt import devices
from awq_rt.backend import LinearSpec, Packed
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.weights import AwqWeight

from . import bag, packing, specification

__version__ = "0.1.0"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ReferenceBackend:
    """Implements `awq_rt.backend.Backend`. Packed tensors: rows of codes, zeros, scales, perhaps bias."""

    name = "reference"
    version = __version__
    contract = (1, 0)
    priority = 0
    kernels: tuple[str, ...] = ("torch",)
    ops: Mapping[str, Callable[..., Tensor]] = {}

    def probe(self) -> Probe:
        return devices.cpu()

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        if spec.dtype in DTYPES:
            return None
        return Refusal("AWQ-REFERENCE-001", f"activations are {spec.dtype}", f"choose one of {DTYPES}")

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        weight = weight.to(device)
        tensors = [packing.pack_rows(weight.codes), weight.zeros.contiguous(), weight.scales.contiguous()]
        if weight.bias is not None:
            tensors.append(weight.bias.contiguous())
        return Packed("rows", tuple(tensors))

    def unpack(self, packed: Packed) -> AwqWeight:
        rows, zeros, scales, *bias = packed.tensors
        return AwqWeight(packing.unpack_rows(rows, scales.shape[1]), zeros, scales, *bias)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        rows, zeros, scales, *bias = packed.tensors
        if x.device.type != "cpu" or not bag.available():
            return specification.linear(x, self.unpack(packed))
        y = bag.linear(x.reshape(-1, x.shape[-1]), rows, zeros, scales, bias[0] if bias else None)
        return y.view(*x.shape[:-1], scales.shape[1])


backend = ReferenceBackend()
