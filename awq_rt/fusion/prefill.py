"""Attention while a prompt is read: torch's own where it can, and never a full square of scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import AttentionSpec

BLOCK = 512
"""Queries at a time where a mask has to be written out: it is BLOCK x keys then."""


def prefill_attention(
    q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, slopes: Tensor | None, flash: bool = False
) -> Tensor:
    """The last T of S positions attend to all before them.

    `q` [B, heads, T, head_dim]; `keys` and `values` [B, kv_heads, S, head_dim] -> [B, heads, T, head_dim]. `flash` uses
    the package flash-attn, which takes windows, soft caps and slopes without a mask.
    """
    if flash:
        return _by_flash_attn(q, keys, values, spec, slopes)
    count, seen = q.shape[2], keys.shape[2]
    grouped = spec.heads != spec.kv_heads
    everything = spec.window is None or seen <= spec.window
    if everything and count == seen and spec.softcap is None and slopes is None:
        return functional.scaled_dot_product_attention(
            q, keys, values, is_causal=True, scale=spec.scale, enable_gqa=grouped
        )
    blocks = []
    for start in range(0, count, BLOCK):
        block = q[:, :, start : start + BLOCK]
        first = seen - count + start  # position of the block's first query
        last = first + block.shape[2]
        oldest = 0 if spec.window is None else max(0, first - spec.window + 1)
        k, v = keys[:, :, oldest:last], values[:, :, oldest:last]
        distance = torch.arange(oldest, last, device=q.device) - torch.arange(first, last, device=q.device)[:, None]
        unseen = distance > 0
        if spec.window is not None:
            unseen |= distance <= -spec.window
        if spec.softcap is not None:
            blocks.append(_capped(block, k, v, unseen, spec, slopes, distance))
            continue
        mask = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device).masked_fill(unseen, -torch.inf)
        if slopes is not None:
            mask = mask + (slopes[:, None, None] * distance).to(q.dtype)
        blocks.append(
            functional.scaled_dot_product_attention(block, k, v, attn_mask=mask, scale=spec.scale, enable_gqa=grouped)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _by_flash_attn(q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec, slopes: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    y: Tensor = flash_attn_func(
        q.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        softmax_scale=spec.scale,
        causal=True,
        window_size=(-1, -1) if spec.window is None else (spec.window - 1, 0),
        softcap=spec.softcap or 0.0,
        alibi_slopes=slopes,
    )
    return y.transpose(1, 2)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, spec: AttentionSpec, slopes: Tensor | None, distance: Tensor
) -> Tensor:
    """Attention with soft-capped scores, which torch's operator has no argument for."""
    assert spec.softcap is not None
    batch, _, count, _ = q.shape
    grouped = q.view(batch, spec.kv_heads, -1, count, spec.head_dim).float()
    scores = grouped @ k[:, :, None].float().transpose(3, 4) * spec.scale
    scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if slopes is not None:
        scores = scores + slopes.view(spec.kv_heads, -1, 1, 1) * distance
    shares = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return (shares @ v[:, :, None].float()).view(q.shape).to(q.dtype)
