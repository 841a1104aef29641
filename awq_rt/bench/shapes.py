"""Shapes of well-known models, for `--synthetic`: the sizes in their config.json, and nothing that was learned."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """`model_type` and `sizes` make a transformers configuration; the linears of its layers get groups of this size."""

    model_type: str
    sizes: dict[str, Any]
    group_size: int = 128

    def config(self) -> Any:
        """The transformers configuration, without special tokens: a random model must not stop at one."""
        from transformers import AutoConfig

        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return AutoConfig.for_model(self.model_type, **{**self.sizes, **special, "dtype": "float16"})


def _sizes(
    vocabulary: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    positions: int,
    rope: dict[str, Any] | float = 1e4,
    eps: float = 1e-5,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "rope_parameters": rope if isinstance(rope, dict) else {"rope_type": "default", "rope_theta": rope},
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        **more,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_llama = functools.partial(Shape, "llama")
_qwen2 = functools.partial(_sizes, rope=1e6, eps=1e-6, positions=32768)
_qwen3 = functools.partial(_sizes, rope=1e6, eps=1e-6, positions=40960, head_dim=128)

SHAPES: dict[str, Shape] = {
    "tiny": _llama(_sizes(256, 64, 128, 2, 4, 2, positions=2048), group_size=32),
    "smollm2-135m": _llama(_sizes(49152, 576, 1536, 30, 9, 3, positions=8192, rope=1e5, tied=True), group_size=64),
    "llama-2-7b": _llama(_sizes(32000, 4096, 11008, 32, 32, 32, positions=4096)),
    "llama-2-13b": _llama(_sizes(32000, 5120, 13824, 40, 40, 40, positions=4096)),
    "llama-2-70b": _llama(_sizes(32000, 8192, 28672, 80, 64, 8, positions=4096)),
    "llama-3.1-8b": _llama(_sizes(128256, 4096, 14336, 32, 32, 8, positions=131072, rope=_llama3_rope(8.0))),
    "llama-3.1-70b": _llama(_sizes(128256, 8192, 28672, 80, 64, 8, positions=131072, rope=_llama3_rope(8.0))),
    "llama-3.2-1b": _llama(
        _sizes(128256, 2048, 8192, 16, 32, 8, positions=131072, rope=_llama3_rope(32.0), tied=True, head_dim=64)
    ),
    "llama-3.2-3b": _llama(
        _sizes(128256, 3072, 8192, 28, 24, 8, positions=131072, rope=_llama3_rope(32.0), tied=True, head_dim=128)
    ),
    "mistral-7b": Shape(
        "mistral", _sizes(32000, 4096, 14336, 32, 32, 8, positions=32768, rope=1e6, sliding_window=None)
    ),
    "qwen2.5-0.5b": Shape("qwen2", _qwen2(151936, 896, 4864, 24, 14, 2, tied=True)),
    "qwen2.5-7b": Shape("qwen2", _qwen2(152064, 3584, 18944, 28, 28, 4)),
    "qwen2.5-14b": Shape("qwen2", _qwen2(152064, 5120, 13824, 48, 40, 8)),
    "qwen2.5-32b": Shape("qwen2", _qwen2(152064, 5120, 27648, 64, 40, 8)),
    "qwen3-0.6b": Shape("qwen3", _qwen3(151936, 1024, 3072, 28, 16, 8, tied=True)),
    "qwen3-8b": Shape("qwen3", _qwen3(151936, 4096, 12288, 36, 32, 8)),
    "qwen3-32b": Shape("qwen3", _qwen3(151936, 5120, 25600, 64, 64, 8)),
    "phi-3-mini": Shape("phi3", _sizes(32064, 3072, 8192, 32, 32, 32, positions=4096)),
    "mixtral-8x7b": Shape(
        "mixtral",
        _sizes(
            32000, 4096, 14336, 32, 32, 8,
            positions=32768, rope=1e6, sliding_window=None, num_local_experts=8, num_experts_per_tok=2,
        ),
    ),
}  # fmt: skip
