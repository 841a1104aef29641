"""A backend that awq_rt has never heard of: plain codes in, one matrix product out."""

from __future__ import annotations

import torch
from torch import Tensor

from awq_rt import devices
from awq_rt.backend import LinearSpec, Packed
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.weights import AwqWeight


class StrangerBackend:
    name = "stranger"
    version = "1.2.3"
    contract = (1, 0)
    priority = 10
    kernels = ("plain",)
    ops = {}  # noqa: RUF012

    def probe(self) -> Probe:
        return devices.cpu()

    def supports(self, spec: LinearSpec, device: Device) -> Refusal | None:
        if spec.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return Refusal("STRANGER-001", f"activations are {spec.dtype}", "choose float32")
        if device.type != "cpu":
            return Refusal("STRANGER-002", f"{device} is not a CPU", "choose device='cpu'")
        return None

    def pack(self, weight: AwqWeight, spec: LinearSpec, device: torch.device) -> Packed:
        bias = [] if weight.bias is None else [weight.bias.to(device)]
        return Packed("plain", (weight.codes.to(device), weight.zeros.to(device), weight.scales.to(device), *bias))

    def unpack(self, packed: Packed) -> AwqWeight:
        return AwqWeight(*packed.tensors)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        weight = self.unpack(packed)
        y = x.double() @ weight.dequantize(torch.float64)
        return (y if weight.bias is None else y + weight.bias.double()).to(x.dtype)


backend = StrangerBackend()
