"""Where `device_map="auto"` would put the layers of a model, worked out without any GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import compute_module_sizes
from tiny import build, config_of
from transformers import AutoModelForCausalLM

import awq_rt
from awq_rt.checkpoint import open_checkpoint
from awq_rt.linear import AwqLinear
from awq_rt.models.dense import DenseTensor
from awq_rt.models.quantizer import AwqRtConfig, AwqRtQuantizer

LAYERS = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = config_of("llama")
    config.num_hidden_layers = LAYERS
    build(tmp_path / "model", config)
    return tmp_path / "model"


def placed(folder: Path, device_map: Any = "auto") -> Any:
    """The model as transformers has it when it works out a device map: packed modules in place, nothing loaded."""
    checkpoint = open_checkpoint(folder)
    dense = {name: DenseTensor(checkpoint, name) for name in checkpoint.dense}
    config = config_of("llama")
    config.num_hidden_layers = LAYERS
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    quantizer = AwqRtQuantizer(AwqRtConfig(checkpoint, dense))
    quantizer.update_dtype(torch.float16)
    quantizer._process_model_before_weight_loading(model, device_map=device_map)
    return model


def of_layers(model: Any, device_map: dict[str, Any]) -> list[int]:
    """How many layers each of two devices has."""
    places = [device_map[f"model.layers.{index}"] for index in range(len(model.model.layers))]
    assert places == sorted(places)
    return [places.count(device) for device in (0, 1)]


def test_a_packed_layer_counts_with_the_bytes_that_it_will_have(folder: Path) -> None:
    model = placed(folder)
    sizes = compute_module_sizes(model)
    layer = model.model.layers[0]
    norms = sum(parameter.nbytes for parameter in layer.parameters())
    packed = sum(module.packed_0.nbytes for module in layer.modules() if isinstance(module, AwqLinear))
    assert sizes["model.layers.0"] == norms + packed
    dense = sum(
        2 * module.in_features * module.out_features for module in layer.modules() if isinstance(module, AwqLinear)
    )
    assert packed < dense / 2


def test_layers_are_spread_whole_over_two_devices_and_none_is_left_over(folder: Path) -> None:
    model = placed(folder)
    sizes = compute_module_sizes(model)
    rest = sizes[""] - LAYERS * sizes["model.layers.0"]
    room = {0: rest + 2 * sizes["model.layers.0"] + sizes["model.layers.0"] // 2, 1: sizes[""]}
    found = infer_auto_device_map(model, max_memory=room, no_split_module_classes=model._no_split_modules)
    first, second = of_layers(model, found)
    assert first + second == LAYERS
    assert 1 <= first <= 2
    assert set(map(str, found.values())) == {"0", "1"}


@pytest.mark.parametrize("device_map", ["auto", "balanced", None])
def test_a_placement_that_is_not_worked_out_yet_is_no_obstacle(folder: Path, device_map: Any) -> None:
    assert isinstance(placed(folder, device_map).model.layers[0].mlp.down_proj, AwqLinear)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_map_of_many_modules_on_one_device_is_that_device(folder: Path) -> None:
    modules = ["model.embed_tokens", *(f"model.layers.{index}" for index in range(LAYERS)), "model.norm", "lm_head"]
    device_map = dict.fromkeys([*modules, "model.rotary_emb"], "cpu")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        found = awq_rt.load(folder, device_map=device_map, fuse=False)(ids).logits
        expected = awq_rt.load(folder, fuse=False)(ids).logits
    assert torch.equal(found, expected)
