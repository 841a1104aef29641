"""Small checkpoints of every layout, on disk, as the tools that pack them leave them.

The packings that awq_rt only reads are written here, by the formulas of their sources.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from awq_rt.formats import WRITABLE
from awq_rt.formats.padding import padded_groups, zeros_width
from awq_rt.testing import hurtful_weight
from awq_rt.weights import AwqWeight

LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq", "marlin", "compressed-tensors")
INFERRED: Mapping[str, Any] = {"infer": "the quantization_config that the layout's own tool writes"}


def some_weights(
    shapes: Mapping[str, tuple[int, int, int]] | None = None, kind: str = "random", **options: Any
) -> dict[str, AwqWeight]:
    """Weights by name, `shapes` being name -> (K, N, G); the default fits every layout, one linear with a bias."""
    if shapes is not None:
        return {name: hurtful_weight(kind, *shape, seed=i, **options) for i, (name, shape) in enumerate(shapes.items())}
    block = "model.layers.{}"
    return {
        f"{block.format(2)}.mlp.up_proj": hurtful_weight(kind, 256, 64, 64, seed=1, **options),
        f"{block.format(10)}.self_attn.q_proj": hurtful_weight(kind, 256, 256, 64, bias=True, seed=2, **options),
    }


def write_layout(
    folder: Path,
    weights: Mapping[str, AwqWeight],
    layout: str,
    *,
    dense: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = INFERRED,
    symmetric: bool = False,
    shards: int = 1,
    pickle: bool = False,
) -> Path:
    """A checkpoint of `weights` in `layout`, one of `LAYOUTS`, with the other tensors `dense`. Returns `folder`.

    `config` is config.json without its `quantization_config`; that one is `quantization`, None for no statement at all.
    `symmetric` leaves compressed-tensors' zero points out. `pickle` writes pytorch_model.bin, which has one file.
    """
    tensors = dict(dense or {})
    for name, weight in weights.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored(weight, layout, symmetric).items()}
    if quantization is INFERRED:
        sizes = {weight.group_size for weight in weights.values()}
        quantization = quantization_of(layout, sizes.pop() if len(sizes) == 1 else -1, symmetric)
    folder.mkdir(parents=True, exist_ok=True)
    stated = {} if quantization is None else {"quantization_config": dict(quantization)}
    write_json(folder / "config.json", {"model_type": "llama", **(config or {}), **stated})
    if pickle:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        write_shards(folder, tensors, shards)
    return folder


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """`tensors` in one safetensors file, or dealt to several with an index."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file_name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        dealt = {name: tensors[name] for name in list(tensors)[number::shards]}
        save_file(dealt, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(dealt, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def quantization_of(layout: str, group_size: int, symmetric: bool = False) -> dict[str, Any]:
    """The `quantization_config` that AutoAWQ, llm-awq's converter or llm-compressor writes."""
    if layout == "compressed-tensors":
        scheme = {
            "num_bits": 4,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": scheme,
                    "input_activations": None,
                    "output_activations": None,
                    "format": "pack-quantized",
                }
            },
        }
    stated = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": layout != "marlin"}
    if layout == "llm-awq":
        return {**stated, "backend": "llm-awq", "version": "gemv"}
    return {**stated, "version": layout, "modules_to_not_convert": None}


def stored(weight: AwqWeight, layout: str, symmetric: bool = False) -> dict[str, Tensor]:
    """The weight as `layout` stores it, tensors by suffix, the bias among them."""
    if layout == "llm-awq":
        tensors = _llm_awq(weight)
    elif layout == "marlin":
        tensors = _marlin(weight)
    else:
        tensors = WRITABLE[layout].write(weight)
    if symmetric or layout == "marlin":
        assert weight.symmetric, f"{layout} without zero points cannot hold other zero points than 8"
        tensors.pop("weight_zero_point", None)
    return tensors if weight.bias is None else {**tensors, "bias": weight.bias}


def _llm_awq(weight: AwqWeight) -> dict[str, Tensor]:
    """llm-awq's third generation: awq/quantize/qmodule.py, `WQLinear.from_linear`."""
    width = 8 * zeros_width(weight.in_features, weight.group_size)
    ones = torch.ones_like(weight.scales, dtype=torch.float16)
    words = WRITABLE["gemv_fast"].write(AwqWeight(weight.codes, weight.zeros, ones))["qweight"]
    products = -(weight.scales.float() * weight.zeros).to(weight.scales.dtype)
    return {
        "qweight": words,
        "scales": padded_groups(weight.scales, width),
        "scaled_zeros": padded_groups(products, width),
    }


def _marlin(weight: AwqWeight) -> dict[str, Tensor]:
    """AutoAWQ 0.2.9, modules/linear/marlin.py: `_get_perms` and `WQLinear_Marlin.from_linear`."""
    permutation = []
    for thread in range(32):
        column = thread // 4
        block = [
            16 * row + column + 8 * half
            for half in (0, 1)
            for row in (2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1)
        ]
        permutation += [place + 256 * tile for tile in range(4) for place in block]
    interleaved = torch.tensor(permutation).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    rows, columns = weight.codes.shape
    tiles = weight.codes.view(rows // 16, 16, columns // 16, 16).transpose(1, 2).reshape(rows // 16, 16 * columns)
    permuted = tiles.view(-1, 1024)[:, interleaved].view(rows // 16, -1, 8).long()
    words = (permuted << torch.arange(0, 32, 4)).sum(-1)
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    order = grouped if len(weight.scales) > 1 else single
    return {
        "qweight": torch.where(words >= 2**31, words - 2**32, words).to(torch.int32),
        "scales": weight.scales.view(-1, len(order))[:, order].view(weight.scales.shape).contiguous(),
    }
