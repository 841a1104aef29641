"""vLLM's linears on awq_rt's backends: continuous batching, paged attention, the server and its processes are vLLM's.

    pip install awq-rt[vllm]
    vllm serve MODEL

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). From then on `config` serves AWQ
checkpoints in the gemm layout, and compressed-tensors with 4-bit weights; `--quantization awq` asks for vLLM's own.

stored     which tensors a linear has in a checkpoint, and what they say; needs no vLLM
config     which layers are whose
method     a linear of vLLM's that holds an `AwqLinear`
"""

from __future__ import annotations

METHOD = "awq_rt"
"""The name of vLLM's `--quantization`."""


def register() -> None:
    """Tell vLLM of this way to run AWQ checkpoints. May be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import AwqRtConfig

    register_quantization_config(METHOD)(AwqRtConfig)
