"""Whether a fused decoder computes what the model does: both read the same few tokens, through one layer of each kind.

Names in a model cannot tell how its parts act together; its own forward pass can. Structural differences (another order
of norms, a factor on a residual, parallel branches) change the logits entirely, rounding in other places hardly.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Ops
from .cache import KeyValueCache
from .decoder import Decoder
from .description import Description, Layer
from .discovery import CannotFuse

TOKENS = 6
ROUNDINGS = 64
"""Roundings between a token and a logit in one layer and the head, in both ways of computing it: 10 to 14 results are
rounded each, and those inside attention and the MLP count for every operand. Their errors add like a random walk, so
that sqrt(64) = 8 units are expected at most; 64 units bound them even where they conspire."""


def verified(
    description: Description, model: Any, ops: Ops, device: torch.device, dtype: torch.dtype, flash: bool
) -> Description:
    """`description` with the scale of its embedding. Raises `CannotFuse` when the logits differ."""
    kinds = _kinds(description)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    name = type(model).__name__
    expected, embedded = _by_transformers(model, kinds, tokens)
    plain = description.embedding(tokens).float()
    scale = float((embedded * plain).sum() / plain.square().sum())
    if not _close(plain * scale, embedded, dtype):
        raise CannotFuse(name, "it does more to embeddings than to scale them")
    if _close(plain, embedded, dtype):
        scale = 1.0
    found = dataclasses.replace(description, embedding_scale=scale)
    layers = tuple(description.layers[kind] for kind in kinds)
    decoder = Decoder(dataclasses.replace(found, layers=layers), ops, device, dtype, flash)
    decoder.reserve(TOKENS)
    cache = KeyValueCache(decoder.description, 1, TOKENS, dtype, device)
    # All but the last token as a prompt, the last as a step: both ways through the decoder are tried.
    position = torch.full((1,), TOKENS - 1, dtype=torch.int32, device=device)
    of_prompt = decoder.prefill(tokens[:, :-1], position.long() - 1, cache)
    of_step = decoder.step(tokens[:, -1], position, cache)
    for logits, at, what in ((of_prompt, -2, "prompt"), (of_step, -1, "step")):
        if not _close(logits[0].float(), expected[at], dtype):
            error = float((logits[0].float() - expected[at]).norm() / expected[at].norm())
            raise CannotFuse(
                name,
                f"fused, logits of a {what} differ from transformers' own by {error:.1%}: its parts act otherwise",
            )
    return found


def _kinds(description: Description) -> list[int]:
    """The first layer of each kind."""
    kinds: dict[Any, int] = {}
    for index, layer in enumerate(description.layers):
        kinds.setdefault(_kind(layer), index)
    return sorted(kinds.values())


def _kind(layer: Layer) -> Any:
    return (layer.attention.spec, type(layer.mlp), layer.attention_post_norm is None, layer.mlp_post_norm is None)


def _by_transformers(model: Any, kinds: list[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of the model with these layers only, and what its first layer was given [1, T, H]; float32."""
    entered: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        entered.append(hidden.float().clone())

    with _only_layers(model, kinds) as first:
        hook = first.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            logits: Tensor = model(tokens, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a configuration that nobody wrote makes of a model
            raise CannotFuse(type(model).__name__, f"transformers' own forward pass fails: {error}") from error
        finally:
            hook.remove()
    return logits[0].float(), entered[0]


@contextlib.contextmanager
def _only_layers(model: Any, kinds: list[int]) -> Iterator[nn.Module]:
    base = model.get_decoder()
    whole = base.layers
    base.layers = nn.ModuleList(whole[kind] for kind in kinds)
    try:
        yield base.layers[0]
    finally:
        base.layers = whole


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return bool((found - expected).norm() <= ROUNDINGS * torch.finfo(dtype).eps / 2 * expected.norm())
