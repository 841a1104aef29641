"""The fused operators in float64, each with the largest error that a right kernel may make.

A kernel computes in float32 and rounds once to the dtype of its result, whose unit roundoff is u. So an element may be
off by `u |y|`, by half the smallest subnormal, and by what float32 costs, which each function derives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awq_rt.ops import AttentionSpec, AttentionTensors
from awq_rt.testing import UNIT_ROUNDOFF

FLOAT32 = 2.0**-24
STANDARD_DEVIATIONS = 6.0


@dataclass(frozen=True, slots=True, eq=False)
class Exact:
    """A result in float64 and how far from it a right kernel's may be."""

    value: Tensor
    limit: Tensor

    def excess(self, found: Tensor) -> float:
        """The largest error over its limit: at most 1 for a right kernel, infinite where it is not finite."""
        error = (found.double().cpu() - self.value).abs() / self.limit
        return float(torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf).max()) if error.numel() else 0.0


def rounded(value: Tensor, error: Tensor, dtype: torch.dtype) -> Exact:
    """`value`, known to `error` before it is rounded to `dtype`."""
    half_subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    return Exact(value, UNIT_ROUNDOFF[dtype] * value.abs() + half_subnormal + error)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Exact:
    """Squares are positive: a sum of up to 80 additions in a row errs by 80 units, its root by half of that; the root
    itself, the mean, and three products by 8 more."""
    wide = x.double().cpu()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double().cpu()
    return rounded(y, 48 * FLOAT32 * y.abs(), x.dtype)


def dense_linear(x: Tensor, weight: Tensor) -> Exact:
    """Products of 16-bit floats are exact in float32. A sum of n additions in a row errs by n units of the sum of sizes
    at most; a kernel has 32 sums side by side at least, and adds those."""
    wide, w = x.double().cpu(), weight.double().cpu()
    additions = x.shape[1] / 32 + 37
    return rounded(wide @ w.T, additions * FLOAT32 * (wide.abs() @ w.abs().T), x.dtype)


def gated_activation(gate_up: Tensor, activation: str) -> Exact:
    """exp(z) and erf(z) err by as much as their argument's error is multiplied by: z, or z^2, units of the last place.
    Where exp(-z) exceeds float32 the result is 0; it would have been below 128 of the smallest normal numbers. gelu may
    be gate / 2 * (1 + erf), or tanh, a sum that rounds at 1."""
    gate, up = gate_up.double().cpu().chunk(2, dim=-1)
    lost = 128 * 2.0**-126 * up.abs()
    if activation.startswith("gelu"):
        lost = lost + 4 * FLOAT32 * (gate * up).abs()
    if activation == "relu":
        value, units = gate.clamp(min=0), torch.zeros_like(gate)
    elif activation == "gelu":
        value, units = gate * torch.special.ndtr(gate), gate.square()
    else:
        z = gate if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        value, units = gate * torch.sigmoid(z), z.abs() * 4
    y = value * up
    return rounded(y, (16 + 4 * units) * FLOAT32 * y.abs() + lost, gate_up.dtype)


def placed(x: Tensor, positions: Tensor, spec: AttentionSpec, tensors: AttentionTensors, norm: Tensor | None) -> Exact:
    """`x` [B, heads, T, head_dim] normalised and rotated to `positions` [B, T]. A rotation is a sum of two products."""
    wide = x.double().cpu()
    if norm is not None:
        assert spec.norm_eps is not None
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.norm_eps) * norm.double().cpu()
    value, size = wide.clone(), wide.abs()
    half = spec.rotary_dim // 2
    if half:
        at = positions.long().cpu()
        cos, sin = (table.double().cpu()[at][:, None] for table in (tensors.cos, tensors.sin))
        turned = slice(0, spec.rotary_dim, 2) if spec.interleaved else slice(0, half)
        partner = slice(1, spec.rotary_dim, 2) if spec.interleaved else slice(half, spec.rotary_dim)
        a, b = wide[..., turned], wide[..., partner]
        value[..., turned], value[..., partner] = a * cos - b * sin, b * cos + a * sin
        size[..., turned] = size[..., partner] = a.abs() + b.abs()
    if norm is None and not half:
        return Exact(value, torch.zeros_like(value))  # copied
    return rounded(value, 64 * FLOAT32 * size, x.dtype)


def heads_of(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv` [B, T, features] as q, k and v [B, heads, T, head_dim]."""
    heads = qkv.view(*qkv.shape[:2], -1, spec.head_dim).transpose(1, 2)
    q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
    return q, k, v


def attention(
    qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Exact:
    """Attention of `qkv` [B, features] over caches that hold the new position already.

    q is rounded before it is used: u in each of its products with k, a random walk. A score's float32 error counts
    its products and its own size. An error d of the score of position j moves the result by `share_j (v_j - y) d`.
    A matrix unit takes shares as the sum of two 16-bit floats, which errs by u^2.
    """
    q, _, _ = heads_of(qkv[:, None], spec)
    query = placed(q, positions[:, None], spec, tensors, tensors.q_norm).value[:, :, 0]  # [B, heads, head_dim]
    rows, group = len(qkv), spec.heads // spec.kv_heads
    values, limits = [], []
    for row in range(rows):
        at = int(positions[row])
        first = 0 if spec.window is None else max(0, at - spec.window + 1)
        keys = k_cache[row, :, first : at + 1].double().cpu().repeat_interleave(group, 0)  # [heads, n, head_dim]
        held = v_cache[row, :, first : at + 1].double().cpu().repeat_interleave(group, 0)
        products = keys * query[row][:, None]
        scores = products.sum(-1) * spec.scale
        error = UNIT_ROUNDOFF[qkv.dtype] * STANDARD_DEVIATIONS * products.square().sum(-1).sqrt()
        error = (error + 32 * FLOAT32 * products.abs().sum(-1)) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
            error = error + 8 * FLOAT32 * spec.softcap
        if tensors.slopes is not None:
            distance = torch.arange(first, at + 1) - at
            bias = tensors.slopes.double().cpu()[:, None] * distance
            scores, error = scores + bias, error + 4 * FLOAT32 * bias.abs()
        error = error + 8 * FLOAT32 * scores.abs()
        shares = scores.softmax(-1)
        y = (shares[..., None] * held).sum(1)
        spread = (shares * error)[..., None] * (held - y[:, None]).abs()
        units = FLOAT32 * (64 + held.shape[1] ** 0.5) + UNIT_ROUNDOFF[qkv.dtype] ** 2
        sums = units * (shares[..., None] * held.abs()).sum(1)
        values.append(y.flatten())
        limits.append((spread.sum(1) + sums).flatten())
    return rounded(torch.stack(values), torch.stack(limits), qkv.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """An attention layer with a filled cache and new tokens: the arguments of `decode_attention`."""

    qkv: Tensor  # [B, features]
    positions: Tensor  # int32 [B]
    k_cache: Tensor  # [B, kv_heads, S, head_dim]; NaN past each row's position
    v_cache: Tensor
    spec: AttentionSpec
    tensors: AttentionTensors

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, AttentionSpec, AttentionTensors]:
        return self.qkv, self.positions, self.k_cache, self.v_cache, self.spec, self.tensors

    def on(self, device: torch.device) -> Layer:
        """The same on `device`, in memory of its own."""
        names = ("cos", "sin", "q_norm", "k_norm", "slopes")
        given = {name: getattr(self.tensors, name) for name in names}
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in given.items()}
        caches = {name: getattr(self, name).to(device, copy=True) for name in ("k_cache", "v_cache")}
        return replace(
            self,
            qkv=self.qkv.to(device, copy=True),
            positions=self.positions.to(device, copy=True),
            tensors=AttentionTensors(**moved),
            **caches,
        )

    def excess(self, y: Tensor) -> float:
        """How far `y`, and what was put into the caches, are off, over what is allowed."""
        _, k, v = heads_of(self.qkv[:, None], self.spec)
        at = self.positions.long()
        rows = torch.arange(len(at), device=at.device)
        stored_k, stored_v = self.k_cache[rows, :, at][:, :, None], self.v_cache[rows, :, at][:, :, None]
        if not torch.equal(stored_v, v):
            return torch.inf
        k_exact = placed(k, self.positions[:, None], self.spec, self.tensors, self.tensors.k_norm)
        if bool(((stored_k.double().cpu() - k_exact.value).abs() > k_exact.limit).any()):
            return torch.inf
        return attention(*self.arguments).excess(y)


def layer(
    spec: AttentionSpec,
    positions: list[int],
    slots: int,
    dtype: torch.dtype,
    *,
    slopes: bool = False,
    seed: int = 0,
    sharp: float = 1.0,
) -> Layer:
    """A random layer on the CPU. `sharp` widens the scores' spread."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance)

    rows = len(positions)
    qkv = normal(rows, (spec.heads + 2 * spec.kv_heads) * spec.head_dim) * sharp
    caches = [normal(rows, spec.kv_heads, slots, spec.head_dim) for _ in range(2)]
    for cache in caches:
        for row, position in enumerate(positions):
            cache[row, :, position:] = torch.nan
    angles = torch.arange(slots)[:, None] / 100.0 ** (torch.arange(spec.rotary_dim // 2) / max(1, spec.rotary_dim // 2))
    normed = spec.norm_eps is not None
    tensors = AttentionTensors(
        angles.cos(),
        angles.sin(),
        normal(spec.head_dim) if normed else None,
        normal(spec.head_dim) if normed else None,
        torch.rand(spec.heads, generator=chance) * 0.1 if slopes else None,
    )
    at = torch.tensor(positions, dtype=torch.int32)
    return Layer(qkv.to(dtype), at, caches[0].to(dtype), caches[1].to(dtype), spec, tensors)
