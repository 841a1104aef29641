"""Embedding and head kept in the checkpoint's 16 bits under a model that computes in float32.

transformers widens every dense tensor to the model's dtype, which on a CPU is float32. These two are the large ones,
and only looked up and multiplied: both can widen what they read, so the 16 bits are all that need be held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NARROW = (torch.float16, torch.bfloat16)


class NarrowEmbedding(nn.Embedding):
    """An embedding whose 16-bit rows are widened when they are looked up."""

    def __init__(self, wide: nn.Embedding, stored: torch.dtype):
        super().__init__(wide.num_embeddings, wide.embedding_dim, wide.padding_idx, device="meta", dtype=stored)
        _remember_dtype(self, wide)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.get_buffer("computed").dtype)

    def requires_grad_(self, requires_grad: bool = True) -> NarrowEmbedding:
        _refuse_training(requires_grad)
        return self


class NarrowHead(nn.Linear):
    """A linear whose 16-bit weight `dense_linear`, a backend's operator (`awq_rt.ops`), reads as it is."""

    def __init__(self, wide: nn.Linear, stored: torch.dtype, dense_linear: Callable[..., Tensor]):
        super().__init__(wide.in_features, wide.out_features, bias=False, device="meta", dtype=stored)
        _remember_dtype(self, wide)
        self.bias = wide.bias
        self._dense_linear = dense_linear

    def forward(self, x: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
        if not plain and x.dtype == torch.float32 and x.device.type == "cpu":
            y = self._dense_linear(x.reshape(-1, self.in_features), self.weight, self.bias)
            if y is not NotImplemented:
                return y.view(*x.shape[:-1], self.out_features)
        return functional.linear(x, self.weight.to(x.dtype), self.bias)

    def requires_grad_(self, requires_grad: bool = True) -> NarrowHead:
        _refuse_training(requires_grad)
        return self


def narrow(model: Any, stored: Mapping[str, torch.dtype], dense_linear: Callable[..., Tensor]) -> None:
    """Let the embedding and the head of `model`, whose weights are not loaded yet, hold 16 bits where they are plain.

    `stored` says in which dtype the checkpoint has the model's tensor of that name.
    """
    paths = {module: path for path, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    plain = {module: f"{paths[module]}.weight" for module in ends if type(module) in (nn.Embedding, nn.Linear)}
    names = set(plain.values())
    tied = {name for pair in model.all_tied_weights_keys.items() if names & {*pair} for name in pair}
    if tied:
        dtypes = {stored[name] for name in names if name in stored}
        if tied != names or len(dtypes) != 1:
            return
        stored = dict.fromkeys(names, dtypes.pop())
    for module, name in plain.items():
        if (dtype := stored.get(name)) in NARROW:
            new = (
                NarrowEmbedding(module, dtype)
                if isinstance(module, nn.Embedding)
                else NarrowHead(module, dtype, dense_linear)
            )
            model.set_submodule(paths[module], new)


def settle(model: nn.Module) -> None:
    """Let the narrow modules of `model`, which is loaded now, own their weights, as buffers.

    As they are loaded they share the pages of the file. `model.dtype` is that of the first parameter, which must not be
    theirs; while it loads, transformers ties parameters only.
    """
    copies: dict[int, Tensor] = {}
    for module in _narrowed(model).values():
        loaded = module.weight.detach()
        if loaded.data_ptr() not in copies:
            copies[loaded.data_ptr()] = loaded.clone()
        del module.weight
        module.register_buffer("weight", copies[loaded.data_ptr()])


def widen(model: Any) -> None:
    """Put plain modules, with weights of the dtype that is computed in, where `narrow` put its own."""
    weights: dict[int, nn.Parameter] = {}
    for path, module in _narrowed(model).items():
        at = module.weight.data_ptr()
        if at not in weights:
            weights[at] = nn.Parameter(module.weight.to(module.get_buffer("computed").dtype))
        if isinstance(module, NarrowEmbedding):
            new: nn.Module = nn.Embedding(
                module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta"
            )
        else:
            new = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            new.bias = module.bias
        new.weight = weights[at]
        model.set_submodule(path, new)


def _narrowed(model: Any) -> dict[str, NarrowEmbedding | NarrowHead]:
    return {path: module for path, module in model.named_modules() if isinstance(module, NarrowEmbedding | NarrowHead)}


def _remember_dtype(module: nn.Module, wide: nn.Embedding | nn.Linear) -> None:
    """Keep the dtype that is computed in, as that of an empty buffer: it follows a model that is moved or cast."""
    module.register_buffer("computed", wide.weight.new_empty(0), persistent=False)


def _refuse_training(wanted: bool) -> None:
    if wanted:
        raise NotImplementedError(
            "the embedding and the head are kept in 16 bits and cannot be trained; load the model with fuse=False"
        )
