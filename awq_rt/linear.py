"""The quantised linear: one `torch.library` op with a fake kernel, and the module that holds a packed weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import registry, selftest
from .backend import LinearSpec, Packed
from .errors import InvalidInput
from .weights import AwqWeight


@torch.library.custom_op("awq_rt::linear", mutates_args=())
def linear_op(x: Tensor, tensors: Sequence[Tensor], backend: str, layout: str, out_features: int) -> Tensor:
    """`x` [..., K] -> [..., N] through the named backend; `tensors` and `layout` are the parts of its `Packed`."""
    return registry.get(backend).linear(x, Packed(layout, tuple(tensors)))


@linear_op.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], backend: str, layout: str, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("awq_rt::linear_grad", mutates_args=())
def linear_grad_op(grad: Tensor, tensors: Sequence[Tensor], backend: str, layout: str, in_features: int) -> Tensor:
    """The gradient with respect to x: `grad` [..., N] @ W.T -> [..., K]. The weight itself has no gradient."""
    weight = registry.get(backend).unpack(Packed(layout, tuple(tensors)))
    return grad @ weight.dequantize().to(grad.dtype).T


@linear_grad_op.register_fake
def _(grad: Tensor, tensors: Sequence[Tensor], backend: str, layout: str, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, tensors, ctx.backend, ctx.layout, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    tensors = list(ctx.saved_tensors)  # once: checkpointing unpacks each time it is asked, and refuses a second time
    grad_x = linear_grad_op(grad, tensors, ctx.backend, ctx.layout, ctx.in_features)
    return grad_x, [None] * len(tensors), None, None, None


linear_op.register_autograd(_backward, setup_context=_setup_context)


class AwqLinear(nn.Module):
    """A linear whose weight is 4-bit: `y = x @ W + bias`, computed by the backend that `bind` selected.

    Built empty, then filled by `bind`. Until then a buffer of the packed weight's size stands in for it, so that device
    maps see how large the layer will be. The packed tensors are the backend's own: they are not in the state dict, and
    `.to(dtype)` never casts them (`weight_canonical()` gives the canonical weight).
    """

    packed_0: Tensor
    execution_device: torch.device | None = None
    """Where each product's weight is copied to, of a linear that is offloaded; None where it is used where it lies."""

    def __init__(self, in_features: int, out_features: int, group_size: int, device: torch.device | str = "meta"):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.backend_name = ""
        self.layout = ""
        self.spec: LinearSpec | None = None
        self.pinned_backend: str | None = None
        packed_bytes = out_features * (in_features // 2 + 3 * (in_features // group_size))
        self.register_buffer("packed_0", torch.empty(packed_bytes, dtype=torch.uint8, device=device), persistent=False)
        self._packed_count = 1

    def bind(
        self,
        weight: AwqWeight,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        backend: str | None = None,
        kernel: str = "auto",
    ) -> registry.Choice:
        """Pack `weight` for activations of `dtype` on `device` and keep it; returns the choice of backend."""
        target = torch.device(device) if device is not None else self._device
        spec = LinearSpec.of(weight, dtype, kernel)
        choice = selftest.choose(spec, target, backend)
        self.hold(choice.backend.pack(weight, spec, target))
        self.execution_device = None
        self.backend_name, self.spec = choice.backend.name, spec
        self.pinned_backend = backend
        return choice

    def hold(self, packed: Packed) -> None:
        """Keep `packed`, this linear's weight in the form of its backend."""
        for index in range(self._packed_count):
            delattr(self, f"packed_{index}")
        for index, tensor in enumerate(packed.tensors):
            self.register_buffer(f"packed_{index}", tensor, persistent=False)
        self._packed_count = len(packed.tensors)
        self.layout = packed.layout

    def offload(self, home: Sequence[Tensor]) -> None:
        """Keep `home`, copies of the packed tensors in the host's memory, and copy them back for each product."""
        self.execution_device = self._device
        self.hold(Packed(self.layout, tuple(home)))

    @property
    def packed(self) -> Packed:
        """The packed weight where it lies."""
        return Packed(self.layout, tuple(getattr(self, f"packed_{i}") for i in range(self._packed_count)))

    @property
    def _device(self) -> torch.device:
        """Where the products are computed."""
        return self.execution_device or self.get_buffer("packed_0").device

    def _packed_there(self) -> Packed:
        """The packed weight on `_device`: a copy of one that is offloaded."""
        packed, there = self.packed, self.execution_device
        if there is None:
            return packed
        return Packed(self.layout, tuple(tensor.to(there, non_blocking=True) for tensor in packed.tensors))

    def weight_canonical(self) -> AwqWeight:
        """The canonical weight, unpacked again; exact."""
        return registry.get(self.backend_name).unpack(self._packed_there())

    @property
    def weight(self) -> Tensor:
        """An empty tensor: some model code asks a linear's weight for its dtype and device, or initialises it."""
        empty = torch.empty(0, dtype=self.spec.dtype if self.spec else None, device=self._device)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers then leaves it alone
        return empty

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise InvalidInput(f"{self!r}: the input has shape {list(x.shape)}; [..., {self.in_features}] is expected")
        if self.spec is None:
            raise InvalidInput(f"{self!r} holds no weight yet; call bind first")
        if x.dtype != self.spec.dtype and torch.is_autocast_enabled(x.device.type):
            cast: Tensor = self(x.to(self.spec.dtype)).to(torch.get_autocast_dtype(x.device.type))
            return cast
        if x.dtype != self.spec.dtype:
            raise InvalidInput(
                f"{self!r}: the input is {x.dtype}; {self.spec.dtype} is expected, "
                "chosen when the model was loaded (dtype=)"
            )
        packed = self._packed_there()
        if x.device != packed.tensors[0].device:  # a kernel would read at an address of another memory
            raise InvalidInput(
                f"{self!r}: the input is on {x.device}, the weight on {packed.tensors[0].device}; move one of them"
            )
        if type(x) is Tensor and not (torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())):
            # Straight to the backend: the op's dispatch alone takes 30 us a call, longer than a small linear does.
            return registry.get(self.backend_name).linear(x, packed)
        y: Tensor = linear_op(x, list(packed.tensors), self.backend_name, self.layout, self.out_features)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AwqLinear:
        """Follow the model to another device or dtype by packing anew; packed tensors are never cast."""
        if self.spec is None:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        probe = fn(torch.empty(0, dtype=self.spec.dtype, device=self._device))
        if probe.device != self._device or probe.dtype != self.spec.dtype:
            weight = self.weight_canonical()
            self.bind(weight, probe.dtype, probe.device, backend=self.pinned_backend, kernel=self.spec.kernel)
        return self

    def extra_repr(self) -> str:
        served = self.backend_name or "not loaded"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, {served}"
        )
