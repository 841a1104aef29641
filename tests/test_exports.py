"""What other exporters leave: the AWQ layout loads whoever wrote it, everything else is refused by its name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import GROUP_SIZE, build, config_of
from torch import Tensor

import awq_rt
from awq_rt.errors import UnsupportedFormat

LINEAR = "model.layers.0.mlp.up_proj"


def gptq_tensors(prefix: str = LINEAR) -> dict[str, Tensor]:
    """A linear 256 -> 64 as GPTQ packs it, which Neural Compressor does too, whatever the method was called."""
    return {
        f"{prefix}.qweight": torch.zeros(256 // 8, 64, dtype=torch.int32),
        f"{prefix}.qzeros": torch.zeros(256 // GROUP_SIZE, 64 // 8, dtype=torch.int32),
        f"{prefix}.scales": torch.ones(256 // GROUP_SIZE, 64, dtype=torch.float16),
    }


def write_config(folder: Path, **quantization: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))


@pytest.mark.parametrize(
    "stated",
    [
        # Neural Compressor's transformers interface and auto-round's exporter, both in AutoAWQ's layout
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "zero_point": True,
            "sym": False,
            "version": "gemm",
        },
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP_SIZE, "packing_format": "auto_round:auto_awq"},
        {
            "quant_method": "intel/auto-round",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "packing_format": "auto_round:awq",
            "autoround_version": "0.4",
        },
    ],
    ids=["neural compressor", "auto-round", "intel/auto-round"],
)
def test_an_export_in_the_awq_layout_loads(stated: dict[str, Any], tmp_path: Path) -> None:
    dense = build(tmp_path, config_of("llama"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    tokens = torch.arange(3, 19)[None]
    expected = dense(tokens).logits
    assert (awq_rt.load(tmp_path)(tokens).logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "sym": False}, "GPTQ layout"),
        ({"quant_method": "rtn", "bits": 4, "weight_dtype": "int4_clip"}, "'rtn'.*Intel Neural Compressor"),
        ({"quant_method": "teq", "bits": 4, "weight_dtype": "int4_clip"}, "'teq'.*Intel Neural Compressor"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}, "GPTQ layout"),
    ],
)
def test_neural_compressors_other_exports_are_refused_by_name(
    stated: dict[str, Any], named: str, tmp_path: Path
) -> None:
    save_file(gptq_tensors(), tmp_path / "model.safetensors")
    write_config(tmp_path, **stated)
    with pytest.raises(UnsupportedFormat, match=named):
        awq_rt.open_checkpoint(tmp_path)


@pytest.mark.parametrize("prefix", [LINEAR, f"{LINEAR}.linear"])
def test_neural_compressors_own_format_is_refused_by_name(prefix: str, tmp_path: Path) -> None:
    """`save(model)` leaves these two files; with AWQ the linear sits beside an input_scale."""
    torch.save({**gptq_tensors(prefix), f"{LINEAR}.input_scale": torch.ones(256)}, tmp_path / "quantized_weight.pt")
    (tmp_path / "qconfig.json").write_text(json.dumps({f"('{LINEAR}', 'Linear')": {"awq": {"bits": 4}}}))
    with pytest.raises(UnsupportedFormat, match=r"quantized_weight.pt: .*Intel Neural Compressor"):
        awq_rt.open_checkpoint(tmp_path)


@pytest.mark.parametrize("model", ["openvino_model", "openvino_language_model"])
def test_optimum_intels_openvino_exports_are_refused_by_name(model: str, tmp_path: Path) -> None:
    """Their openvino_config.json says quant_method "awq": the search was AWQ's, the file is not."""
    (tmp_path / f"{model}.xml").write_text("<net/>")
    (tmp_path / f"{model}.bin").write_bytes(os.urandom(64))
    stated = {"quantization_config": {"bits": 4, "group_size": 64, "quant_method": "awq"}, "dtype": "int4"}
    (tmp_path / "openvino_config.json").write_text(json.dumps(stated))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnsupportedFormat, match=rf"{model}.xml: .*OpenVINO by optimum-intel"):
        awq_rt.open_checkpoint(tmp_path)


def test_an_export_beside_an_awq_checkpoint_does_not_hide_it(tmp_path: Path) -> None:
    build(tmp_path, config_of("llama"))
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    (tmp_path / "openvino_model.bin").write_bytes(os.urandom(64))
    assert awq_rt.open_checkpoint(tmp_path).layout == "gemm"
