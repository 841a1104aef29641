"""What a decoding step must read, over the read bandwidth, and what a prompt must compute: the least time of each."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..linear import AwqLinear
from ..models.experts import AwqExperts


def step_bytes(model: Any, batch: int, prefill: int, decode: int) -> float | None:
    """Bytes that a step reads on average over `decode` steps after `prefill` positions; None for a mixture of experts,
    whose router decides how many of them a step reads.

    Packed codes, zero points and scales once, the output matrix once, keys and values of every row. Norms, biases and
    the embedding's one row a token are below a thousandth and left out.
    """
    if any(isinstance(module, AwqExperts) for module in model.modules()):
        return None
    linears = [module for module in model.modules() if isinstance(module, AwqLinear)]
    weights = sum(map(packed_bytes, linears)) + _dense_head_bytes(model)
    return weights + batch * cached_bytes(model, prefill, decode)


def prefill_flops(model: Any, batch: int, prefill: int) -> float | None:
    """Operations of reading the prompts: two a weight of every packed linear and token, two a weight of the output
    matrix and row, and attention's two products over the positions that each one sees. None as for `step_bytes`."""
    if any(isinstance(module, AwqExperts) for module in model.modules()):
        return None
    linears = [module for module in model.modules() if isinstance(module, AwqLinear)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)
    text = model.config.get_text_config()
    width = text.num_attention_heads * _head_dim(text)
    seen = 0
    for window in _windows(text):
        seen += sum(min(position, window or position) for position in range(1, prefill + 1))
    head = model.get_output_embeddings()
    dense = head.weight.numel() if isinstance(head, nn.Linear) else 0
    return float(2 * batch * (prefill * weights + dense + 2 * width * seen))


def packed_bytes(linear: AwqLinear) -> float:
    """Of the canonical weight: 4 bits a code and a zero point, where it has any, and the scales."""
    spec = linear.spec
    assert spec is not None
    zero_bytes = 0.0 if spec.symmetric else 0.5
    groups = spec.in_features // spec.group_size
    return spec.out_features * (spec.in_features / 2 + groups * (spec.scale_dtype.itemsize + zero_bytes))


def cached_bytes(model: Any, prefill: int, decode: int) -> float:
    """Keys and values of one row that a step reads, on average over positions prefill + 1 to prefill + decode."""
    text = model.config.get_text_config()
    total = 0.0
    for window in _windows(text):
        seen = [position if window is None else min(position, window) for position in _positions(prefill, decode)]
        total += position_bytes(model) / text.num_hidden_layers * sum(seen) / len(seen)
    return total


def position_bytes(model: Any) -> int:
    """Keys and values of one position in all layers."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * text.num_hidden_layers * kv_heads * _head_dim(text) * model.dtype.itemsize)


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _positions(prefill: int, decode: int) -> range:
    return range(prefill + 1, prefill + decode + 1)


def _windows(text: Any) -> list[int | None]:
    """How far each layer looks back; None is to the beginning."""
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _dense_head_bytes(model: Any) -> int:
    head = model.get_output_embeddings()
    return head.weight.nbytes if isinstance(head, nn.Linear) else 0
