"""PEFT's LoRA beside a packed linear: the 4-bit weight stays frozen, gradients pass through it to the adapter.

PEFT asks a fixed list of functions which LoRA layer fits a module. `dispatching` gives the one among them that is for
AWQ, which knows GPTQModel's linears only, a successor that knows `AwqLinear` too, and lets "all-linear" find them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from .errors import UnsupportedAdapter
from .linear import AwqLinear
from .models.experts import AwqExperts

NEEDS_NO_WEIGHT = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that do not decompose the weight of the base."""


NEEDS_WEIGHT = ("use_dora", "mica", "kasa_config")
"""Variants of LoRA that decompose the weight of the base, or take its norms."""


class AwqLoraLinear(LoraLinear):  # type: ignore[misc]
    """`base_layer(x) + B(A(x)) * scaling`, the base an `AwqLinear`. It cannot be merged."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)  # it takes the sizes all the same
            super().__init__(base_layer, adapter_name, *args, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config")
        if needs := [name for name in NEEDS_WEIGHT if getattr(config, name, None)]:
            raise UnsupportedAdapter(
                f"{needs[0]} computes with the weight itself, which is packed in 4 bits; use plain LoRA"
            )
        start = getattr(config, "init_lora_weights", True)
        if start not in NEEDS_NO_WEIGHT:
            raise UnsupportedAdapter(
                f"init_lora_weights={start!r} takes part of the weight into the adapter, and the weight is packed in "
                "4 bits; choose True, 'gaussian' or 'orthogonal'"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise UnsupportedAdapter(
            f"{self.get_base_layer()!r} cannot take an adapter into itself: rounding the sum to 4 bits again would "
            "lose most of what was learnt. Keep the adapter beside the model, or merge it into the dense model that "
            "this one was made of and quantise the result with awq_rt.quantize"
        )

    def __repr__(self) -> str:
        return f"lora.{nn.Module.__repr__(self)}"


def dispatching() -> list[tuple[Any, str, Callable[..., Any]]]:
    """(module of PEFT, name in it, the function to put there), each round the one that is there now."""
    dispatch, include = lora_model.dispatch_awq, tuners_utils._maybe_include_all_linear_layers

    def dispatch_awq(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if isinstance(base, AwqLinear):
            return AwqLoraLinear(target, adapter_name, *args, **kwargs)
        found: nn.Module | None = dispatch(target, adapter_name, *args, **kwargs)
        return found

    def include_all(config: Any, model: nn.Module) -> Any:
        asked = getattr(config, "target_modules", None)
        config = include(config, model)
        if isinstance(asked, str) and asked.lower() == "all-linear":
            config.target_modules = {*config.target_modules, *_plain_linears(model)}
        return config

    return [
        (lora_model, "dispatch_awq", dispatch_awq),
        (tuners_utils, "_maybe_include_all_linear_layers", include_all),
    ]


def _plain_linears(model: nn.Module) -> set[str]:
    """The packed linears that would be `nn.Linear` in a dense model: not the output, no mixture's experts."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    experts = {m for module in model.modules() if isinstance(module, AwqExperts) for m in module.modules()}
    return {n for n, m in model.named_modules() if isinstance(m, AwqLinear) and m is not output and m not in experts}
