"""Which layers of a model that vLLM builds are awq_rt's."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ..checkpoint.config import OLD_FILES, parse
from ..errors import AwqRtError, InvalidConfig, UnsupportedFormat
from . import METHOD
from .method import AwqRtLinearMethod
from .stored import SERVED

log = logging.getLogger("vllm.awq_rt")

PACKED = ("qweight", "weight_packed")
"""Last parts of names that packed linears have."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configurations call the number of a mixture's experts."""


class AwqRtConfig(QuantizationConfig):  # type: ignore[misc]
    """One checkpoint: its layout, group size and zero points, and the names of its packed linears."""

    def __init__(self, layout: str, group_size: int, symmetric: bool):
        super().__init__()
        self.layout, self.group_size, self.symmetric = layout, group_size, symmetric
        self.packed: list[str] = []

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return list(OLD_FILES)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> Any:
        """`METHOD` for AWQ models unless another one was asked for. A mixture of experts is left to vLLM."""
        if user_quant not in (None, METHOD):
            return None
        try:
            parse(hf_quant_cfg, "quantization_config")
        except AwqRtError:
            return None
        if any(getattr(hf_config, name, None) for name in EXPERTS):
            log.info("awq_rt leaves mixtures of experts to vLLM's own kernels")
            return None
        return METHOD

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AwqRtConfig:
        """Raises `UnsupportedFormat` for layouts that vLLM cannot cut, `InvalidConfig` without a group size."""
        found = parse(config, "quantization_config")
        layout = next((layout for layout in found.layouts or ("gemm",) if layout in SERVED), None)
        if layout is None:
            raise UnsupportedFormat(
                f"the checkpoint is in the layout {' or '.join(found.layouts)}; under vLLM awq_rt runs "
                f"{' and '.join(SERVED)}: awq-rt convert MODEL NEW --to gemm"
            )
        if found.group_size is None:
            raise InvalidConfig("quantization_config names no group size, or several; under vLLM one is needed")
        return cls(layout, found.group_size, found.zero_point is False and layout != "gemm")

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Note which linears are packed: tensors say so, whatever the configuration excludes."""
        names = get_safetensors_params_metadata(model_name, revision=revision)
        self.packed = [prefix for prefix, _, last in (name.rpartition(".") for name in names) if last in PACKED]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.packed = hf_to_vllm_mapper.apply_list(self.packed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead) and prefix in self.packed:
            raise NotImplementedError(f"{prefix} is packed; under vLLM awq_rt runs the linears of layers only")
        if not isinstance(layer, LinearBase):
            return None
        packed = [name in self.packed for name in self._parts(prefix)]
        if all(packed) or not self.packed:  # names are known of safetensors only
            return AwqRtLinearMethod(self.layout, self.group_size, self.symmetric, prefix)
        if any(packed):
            raise UnsupportedFormat(
                f"some of {', '.join(self._parts(prefix))} are packed, which vLLM joins to one linear"
            )
        return UnquantizedLinearMethod()

    def _parts(self, prefix: str) -> list[str]:
        """The names in the checkpoint of what vLLM joins to the linear `prefix`."""
        parent, _, last = prefix.rpartition(".")
        return [f"{parent}.{part}" for part in self.packed_modules_mapping.get(last, [last])]
