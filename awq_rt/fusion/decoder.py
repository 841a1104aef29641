"""A fused decoder: what a model computes, in fewer and larger operators, with a cache that stays in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops import AttentionTensors, Ops
from ..parallel.group import Group
from ..parallel.linears import VocabularyParallelHead
from .cache import KeyValueCache
from .description import Description, GatedMlp, Layer, Norm
from .prefill import prefill_attention
from .projection import Projection

CHUNK_TOKENS = 8192
"""Tokens that go through the layers at a time while a prompt is read: their activations are all that grows with it."""

LONG_PROMPT = 1024
QUICK_TO_LAUNCH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""cuDNN's attention is the fastest on the GPU, and takes the host 0.4 ms a layer: it pays where a layer takes longer
(H100, torch 2.11, 2026-11-22)."""


class Decoder:
    """Logits of `description`. Stateless but for tables of angles: keys and values are the caller's.

    `flash` reads prompts with the package flash-attn, as `attn_implementation="flash_attention_2"` asks for.
    """

    def __init__(
        self, description: Description, ops: Ops, device: torch.device, dtype: torch.dtype, flash: bool = False
    ):
        self.description, self.ops, self.device, self.dtype, self.flash = description, ops, device, dtype, flash
        self._head = _head(description.head, ops)
        projections = [projection for layer in description.layers for projection in layer.projections]
        self._places = [place for projection in projections for place in projection.places]
        self._tensors: list[AttentionTensors] = []
        self.positions = 0
        self.reserve(1)

    @property
    def intact(self) -> bool:
        """Whether the model still consists of the parts that this was made of, with no hooks on them."""
        parts, hooks = self.description.parts, self.description.hooks
        return not any(hooks) and all(children.get(name) is child for children, name, child in parts)

    @property
    def has_mixtures(self) -> bool:
        """Whether reading a prompt lets the host choose experts, which a graph cannot hold."""
        return not all(isinstance(layer.mlp, GatedMlp) for layer in self.description.layers)

    @property
    def current(self) -> bool:
        """Whether the weights are still where they were: a model that moved needs another decoder."""
        embedding = self.description.embedding.weight
        assert isinstance(embedding, Tensor)
        for tensors, name, pointer in self._places:
            tensor = tensors.get(name)
            if tensor is None or tensor.data_ptr() != pointer:
                return False
        return embedding.device == self.device

    def reserve(self, positions: int) -> None:
        """Make the tables of angles long enough for `positions`."""
        if positions <= self.positions:
            return
        empty = torch.empty(0, device=self.device)
        rotary = self.description.rotary
        cos, sin = rotary(positions) if rotary is not None else (empty, empty)
        attentions = [layer.attention for layer in self.description.layers]
        self._tensors = [AttentionTensors(cos, sin, a.q_norm, a.k_norm, a.slopes) for a in attentions]
        self.positions = positions

    def prefill(self, tokens: Tensor, last: Tensor, cache: KeyValueCache) -> Tensor:
        """Read prompts: `tokens` [B, T], row b ends at position `last[b]`, int64. Returns the logits after each [B, V].

        What a row has past its end is computed and never seen: attention looks back only, and its slots in the cache
        are written again before they are read.
        """
        rows = max(1, CHUNK_TOKENS // tokens.shape[1])
        parts = [slice(first, first + rows) for first in range(0, len(tokens), rows)]
        hidden = [self._last_hidden(tokens[part], last[part], cache.rows(part)) for part in parts]
        return self._logits(hidden[0] if len(hidden) == 1 else torch.cat(hidden))

    def _last_hidden(self, tokens: Tensor, last: Tensor, cache: KeyValueCache) -> Tensor:
        """Final hidden states [B, H] at positions `last`, chunk by chunk where the rows are long."""
        batch, count = tokens.shape
        hidden = None
        for start in range(0, count, CHUNK_TOKENS):
            chunk = tokens[:, start : start + CHUNK_TOKENS]
            found = self._chunk(chunk, start, cache).view(batch, chunk.shape[1], -1)
            at = (last - start).clamp(0, chunk.shape[1] - 1)
            of_last = found[torch.arange(batch, device=self.device), at]
            ends = ((last >= start) & (last < start + CHUNK_TOKENS))[:, None]
            hidden = of_last if hidden is None else torch.where(ends, of_last, hidden)
        assert hidden is not None
        return hidden

    def step(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache, seen: int | None = None) -> Tensor:
        """One more token a row: `tokens` [B] at `positions` int32 [B]. Returns logits [B, V].

        `seen` bounds the positions that any row has, where the caller knows; a captured step cannot.
        """

        def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            keys, values = cache.keys[index], cache.values[index]
            if seen is not None and "decode_attention" not in self.ops.own:  # the definition reads all that it is given
                keys, values = keys[:, :, :seen], values[:, :, :seen]
            spec, tensors = layer.attention.spec, self._tensors[index]
            return self.ops.decode_attention(qkv, positions, keys, values, spec, tensors)

        return self._logits(self._layers(tokens, attend))

    def _chunk(self, tokens: Tensor, start: int, cache: KeyValueCache) -> Tensor:
        """Final hidden states [B T, H] of `tokens` [B, T] at positions from `start` on."""
        batch, count = tokens.shape
        first = torch.full((batch,), start, dtype=torch.int32, device=self.device)
        end = start + count

        def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
            spec, tensors = layer.attention.spec, self._tensors[index]
            keys, values = cache.keys[index], cache.values[index]
            q = self.ops.rope_append(qkv.view(batch, count, -1), first, keys, values, spec, tensors)
            y = prefill_attention(q, keys[:, :, :end], values[:, :, :end], spec, tensors.slopes, self.flash)
            return y.transpose(1, 2).reshape(batch * count, -1)

        with sdpa_kernel(QUICK_TO_LAUNCH) if count < LONG_PROMPT else contextlib.nullcontext():
            return self._layers(tokens.reshape(-1), attend)

    def _layers(self, tokens: Tensor, attend: Callable[[int, Layer, Tensor], Tensor]) -> Tensor:
        """Normalised hidden states [M, H] of `tokens` [M] after every layer."""
        ops, layers = self.ops, self.description.layers
        hidden = self._embed(tokens)
        x = ops.rms_norm(hidden, layers[0].attention_norm.weight, layers[0].attention_norm.eps)
        for index, layer in enumerate(layers):
            attention, mlp = layer.attention, layer.mlp
            y = attention.out.partial(attend(index, layer, attention.qkv(x)))
            x = self._add_and_norm(y, hidden, layer.attention_post_norm, layer.mlp_norm, attention.out.group)
            after = layers[index + 1].attention_norm if index + 1 < len(layers) else self.description.norm
            group = mlp.down.group if isinstance(mlp, GatedMlp) else None
            x = self._add_and_norm(self._mlp(mlp, x), hidden, layer.mlp_post_norm, after, group)
        return x

    def _embed(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.description.embedding(tokens).to(self.dtype)
        return hidden if self.description.embedding_scale == 1.0 else hidden * self.description.embedding_scale

    def _add_and_norm(self, y: Tensor, hidden: Tensor, post: Norm | None, norm: Norm, group: Group | None) -> Tensor:
        """`hidden` += `y`, which is a part where there is a `group` to sum it over; returns the norm of it."""
        if group is not None and post is None:
            return self.ops.all_reduce_add_rms_norm(y, hidden, norm.weight, norm.eps, group)
        if group is not None:
            y = group.all_reduce(y)
        if post is not None:
            y = self.ops.rms_norm(y, post.weight, post.eps)
        return self.ops.add_rms_norm(y, hidden, norm.weight, norm.eps)

    def _mlp(self, mlp: GatedMlp | nn.Module, x: Tensor) -> Tensor:
        """The MLP's result, of a gated one this process's part."""
        if isinstance(mlp, GatedMlp):
            return mlp.down.partial(self.ops.gated_activation(mlp.gate_up(x), mlp.activation))
        y = mlp(x[None])  # transformers' modules take [batch, tokens, H], and some return their router's choice too
        found: Tensor = y[0] if isinstance(y, tuple) else y
        return found.reshape(x.shape)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self._head(x)
        cap = self.description.logit_softcap
        return logits if cap is None else functional.tanh(logits / cap) * cap


def _head(head: nn.Module, ops: Ops) -> Callable[[Tensor], Tensor]:
    """The linear that gives logits. Its weight may be of 16 bits: `models.narrow`."""
    if not isinstance(head, nn.Linear):
        return Projection([head])
    weight = head.weight
    if isinstance(head, VocabularyParallelHead):
        return lambda x: head.gather(ops.dense_linear(x, weight, head.bias))
    return lambda x: ops.dense_linear(x, weight, head.bias)
