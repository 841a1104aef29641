"""A checkpoint as a mapping: every layout reads back, and every contradiction is an error that names both sides."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import INFERRED, LAYOUTS, quantization_of, some_weights, stored, write_json, write_layout, write_shards
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq_rt.checkpoint import Checkpoint, open_checkpoint
from awq_rt.cli.inspect import inspect
from awq_rt.errors import (
    ConfigMismatch,
    InvalidTensor,
    MissingTensor,
    NonFiniteScales,
    NotQuantized,
    UnsupportedFormat,
)
from awq_rt.formats.gemm import write as gemm
from awq_rt.testing import hurtful_weight
from awq_rt.weights import AwqWeight

PADDED = ("gemv", "gemv_fast", "llm-awq")
UP, Q = "model.layers.2.mlp.up_proj", "model.layers.10.self_attn.q_proj"
SCALES = {layout: "weight_scale" if layout == "compressed-tensors" else "scales" for layout in LAYOUTS}


def kind_for(layout: str) -> str:
    return "symmetric" if layout == "marlin" else "random"


def same(checkpoint: Checkpoint, weights: Mapping[str, AwqWeight]) -> bool:
    return set(checkpoint) == set(weights) and all(checkpoint[name].equal(weight) for name, weight in weights.items())


def changed(folder: Path, changes: Mapping[str, Tensor | None]) -> Path:
    """The checkpoint with some of its tensors replaced, added or (None) left out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", ["one file", "three shards", "pickle"])
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "silent"])
def test_every_layout_reads_back_bit_for_bit(tmp_path: Path, layout: str, how: str, stated: bool) -> None:
    weights = some_weights(kind=kind_for(layout))
    dense = {"model.norm.weight": torch.ones(4), "model.layers.2.mlp.act.scales": torch.ones(8)}
    write_layout(
        tmp_path,
        weights,
        layout,
        dense=dense,
        shards=3 if how == "three shards" else 1,
        pickle=how == "pickle",
        quantization=INFERRED if stated else None,
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == layout
    assert list(checkpoint) == [UP, Q], "layer 10 comes after layer 2"
    assert same(checkpoint, weights)
    assert checkpoint.dense.keys() == dense.keys()
    assert torch.equal(checkpoint.view("model.norm.weight"), torch.ones(4))
    linear = checkpoint.linears[Q]
    assert (linear.in_features, linear.out_features, linear.group_size, linear.bias) == (256, 256, 64, True)
    assert linear.symmetric is (layout == "marlin")
    assert any("inferred from the tensors" in warning for warning in checkpoint.warnings) is not stated


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stated", [True, False], ids=["stated", "silent"])
def test_one_group_a_column_reads_back_whatever_the_columns_length(tmp_path: Path, layout: str, stated: bool) -> None:
    shapes = {"a": (64, 64, 64), "b": (256, 64, 256), "c": (192, 128, 192)}
    weights = some_weights(shapes, kind=kind_for(layout))
    write_layout(tmp_path, weights, layout, quantization=INFERRED if stated else None)
    assert same(open_checkpoint(tmp_path), weights)


@pytest.mark.parametrize("group_size", [64, -1])
def test_symmetric_compressed_tensors_have_no_zero_points(tmp_path: Path, group_size: int) -> None:
    shapes = {"a": (128, 64, 64), "b": (64, 40, 64)} if group_size == 64 else {"a": (128, 64, 128), "b": (64, 40, 64)}
    weights = some_weights(shapes, kind="symmetric", scale_dtype=torch.bfloat16)
    checkpoint = open_checkpoint(write_layout(tmp_path, weights, "compressed-tensors", symmetric=True))
    assert checkpoint.quantization.group_size == group_size
    assert checkpoint.linears["a"].symmetric
    assert same(checkpoint, weights)


def test_compressed_tensors_may_mix_group_sizes(tmp_path: Path) -> None:
    weights = some_weights({"a": (128, 64, 64), "b": (128, 64, 32)})
    stated = quantization_of("compressed-tensors", 64)
    stated["config_groups"]["group_1"] = quantization_of("compressed-tensors", 32)["config_groups"]["group_0"]
    checkpoint = open_checkpoint(write_layout(tmp_path, weights, "compressed-tensors", quantization=stated))
    assert same(checkpoint, weights)


def test_a_number_of_any_length_in_a_name_sorts_as_a_number(tmp_path: Path) -> None:
    long, longer = "9" * 5000, "1" + "0" * 5000
    names = ["layers.2.up", "layers.10.up", f"layers.{long}.up", f"layers.{longer}.up"]
    weights = some_weights(dict.fromkeys(reversed(names), (64, 8, 64)))
    assert list(open_checkpoint(write_layout(tmp_path, weights, "gemm"))) == names


def test_auto_rounds_symmetric_export_keeps_its_constant_zero_points(tmp_path: Path) -> None:
    weights = some_weights(kind="symmetric")
    stated = {**quantization_of("gemm", 64), "zero_point": False, "sym": True, "provider": "auto-round"}
    checkpoint = open_checkpoint(write_layout(tmp_path, weights, "gemm", quantization=stated))
    assert same(checkpoint, weights)
    assert checkpoint[UP].symmetric


@pytest.mark.parametrize("layout", ["gemm", "gemv", "llm-awq"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labelled gemv", "without a config"])
def test_three_generations_of_llm_awq_load(tmp_path: Path, layout: str, labelled: bool) -> None:
    weights = some_weights()
    write_layout(tmp_path, weights, layout, pickle=True, quantization=quantization_of("llm-awq", 64))
    if not labelled:
        (tmp_path / "config.json").unlink()
        (tmp_path / "pytorch_model.bin").rename(tmp_path / "llama-7b-w4-g64-awq-v2.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == layout
    assert same(checkpoint, weights)


def test_llm_awqs_bfloat16_keeps_its_dtype(tmp_path: Path) -> None:
    weights = some_weights(scale_dtype=torch.bfloat16)
    checkpoint = open_checkpoint(write_layout(tmp_path, weights, "llm-awq"))
    assert checkpoint[UP].scales.dtype == torch.bfloat16
    assert same(checkpoint, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_size_may_be_passed_where_nothing_states_it(tmp_path: Path, layout: str) -> None:
    weights = some_weights(kind=kind_for(layout))
    write_layout(tmp_path, weights, layout, quantization=None)
    assert same(open_checkpoint(tmp_path, group_size=64), weights)


def test_a_linear_that_the_configuration_excludes_is_read_and_warned_about(tmp_path: Path) -> None:
    stated = {**quantization_of("gemm", 64), "modules_to_not_convert": ["mlp.up_proj"]}
    checkpoint = open_checkpoint(write_layout(tmp_path, some_weights(), "gemm", quantization=stated))
    assert UP in checkpoint
    assert any(f"excludes {UP}" in warning for warning in checkpoint.warnings)


def test_tensor_names_that_look_like_numbers_do_not_confuse_the_order(tmp_path: Path) -> None:
    weights = some_weights({f"layers.{part}.up": (64, 8, 64) for part in ("²", "10", "9", "x", "٣")})
    assert open_checkpoint(write_layout(tmp_path, weights, "gemm")).linears.keys() == weights.keys()


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    ("name", "linears", "shape"),
    [("tiny-llama-awq", 14, (128, 128, 64)), ("smollm2-135m-awq-gemm-g64", 210, (576, 576, 64))],
)
def test_what_autoawq_wrote_opens(shared: Path, name: str, linears: int, shape: tuple[int, int, int]) -> None:
    checkpoint = open_checkpoint(shared / "checkpoints" / name)
    assert (checkpoint.layout, len(checkpoint)) == ("gemm", linears)
    weight = checkpoint["model.layers.1.self_attn.q_proj"]
    assert (weight.in_features, weight.out_features, weight.group_size) == shape
    weight.check_values()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("said", ["gemm", "gemv", "gemv_fast", "marlin", "compressed-tensors"])
def test_a_layout_other_than_the_tensors_is_a_mismatch_that_names_both(tmp_path: Path, layout: str, said: str) -> None:
    if layout == said:
        return
    write_layout(tmp_path, some_weights(kind=kind_for(layout)), layout, quantization=quantization_of(said, 64))
    message = rf"config\.json, quantization_config says {said}, but the tensors of .* are {layout}; correct"
    with pytest.raises(ConfigMismatch, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("said", [16, 32, 96, 128, 256, -1])
def test_a_group_size_other_than_the_tensors_is_a_mismatch_that_names_both(
    tmp_path: Path, layout: str, said: int
) -> None:
    write_layout(tmp_path, some_weights(kind=kind_for(layout)), layout, quantization=quantization_of(layout, said))
    with pytest.raises(ConfigMismatch, match=rf"model\.layers\.2.*config\.json, quantization_config says.*{said}"):
        open_checkpoint(tmp_path).read(UP)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_size_that_was_passed_and_does_not_fit_is_named_as_such(tmp_path: Path, layout: str) -> None:
    write_layout(tmp_path, some_weights(kind=kind_for(layout)), layout, quantization=None)
    with pytest.raises(ConfigMismatch, match=rf"{UP}: .*group_size=32"):
        open_checkpoint(tmp_path, group_size=32).read(UP)


def test_a_group_size_that_was_passed_against_the_configuration_is_a_mismatch(tmp_path: Path) -> None:
    write_layout(tmp_path, some_weights(), "gemv")
    with pytest.raises(ConfigMismatch, match=r"group_size=128 was passed, but .* says 64"):
        open_checkpoint(tmp_path, group_size=128)


@pytest.mark.parametrize("layout", ["marlin", "compressed-tensors"])
def test_zero_points_that_are_promised_and_absent_are_a_mismatch(tmp_path: Path, layout: str) -> None:
    stated = quantization_of(layout, 64)
    if layout == "marlin":
        stated["zero_point"] = True
    write_layout(tmp_path, some_weights(kind="symmetric"), layout, symmetric=True, quantization=stated)
    with pytest.raises(ConfigMismatch, match=f"{UP} stores no zero points, but .* says that there are some"):
        open_checkpoint(tmp_path)


WRONG: Mapping[str, tuple[str, str, Any]] = {
    "gemm, more scales": ("gemm", "scales", lambda t: torch.cat([t, t], 1)),
    "gemm, groups that do not divide": ("gemm", "scales", lambda t: t[:3]),
    "gemm, no groups": ("gemm", "scales", lambda t: t[:0]),
    "gemm, more zero points": ("gemm", "qzeros", lambda t: torch.cat([t, t])),
    "gemm, fewer words": ("gemm", "qweight", lambda t: t[:130]),
    "gemv, fewer scales": ("gemv", "scales", lambda t: t[:, :8]),
    "gemv, rows of scales": ("gemv", "scales", lambda t: t[:-8]),
    "gemv_fast, fewer scales": ("gemv_fast", "scales", lambda t: t[:8]),
    "gemv_fast, zeros of another width": ("gemv_fast", "qzeros", lambda t: t[:, :-8]),
    "gemv_fast, rows of no block": ("gemv_fast", "qweight", lambda t: t[:, :-32]),
    "llm-awq, fewer zeros": ("llm-awq", "scaled_zeros", lambda t: t[:-1]),
    "marlin, groups that do not divide": ("marlin", "scales", lambda t: t[:3]),
    "compressed-tensors, fewer scales": ("compressed-tensors", "weight_scale", lambda t: t[:-1]),
    "compressed-tensors, fewer zero points": ("compressed-tensors", "weight_zero_point", lambda t: t[:-1]),
    "compressed-tensors, unpacked zero points": ("compressed-tensors", "weight_zero_point", lambda t: t.to(torch.int8)),
    "compressed-tensors, wide zero points": ("compressed-tensors", "weight_zero_point", lambda t: t.long()),
    "compressed-tensors, another shape": ("compressed-tensors", "weight_shape", lambda t: t.flip(0)),
    "compressed-tensors, a shape of floats": ("compressed-tensors", "weight_shape", lambda t: t.float()),
    "compressed-tensors, a shape of three": ("compressed-tensors", "weight_shape", lambda t: torch.cat([t, t[:1]])),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "suffix", "change"), WRONG.values(), ids=WRONG.keys())
def test_a_shape_or_dtype_that_contradicts_the_others_is_invalid_when_opened(
    tmp_path: Path, layout: str, suffix: str, change: Any
) -> None:
    weights = some_weights(kind=kind_for(layout))
    tensor = stored(weights[UP], layout)[suffix]
    changed(write_layout(tmp_path, weights, layout), {f"{UP}.{suffix}": change(tensor).contiguous()})
    with pytest.raises(InvalidTensor, match=UP):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "bias",
    [torch.zeros(7), torch.zeros(256, 1), torch.zeros(256, dtype=torch.int32)],
    ids=["short", "matrix", "integers"],
)
def test_a_bias_that_does_not_fit_is_invalid_when_opened(tmp_path: Path, layout: str, bias: Tensor) -> None:
    changed(write_layout(tmp_path, some_weights(kind=kind_for(layout)), layout), {f"{Q}.bias": bias})
    with pytest.raises(InvalidTensor, match=rf"{Q}\.bias (float|int)32\[.*\[256\] is expected"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_scales_of_another_dtype_are_invalid_when_opened(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    weights = some_weights(kind=kind_for(layout))
    scales = f"{UP}.{SCALES[layout]}"
    tensor = stored(weights[UP], layout)[SCALES[layout]].to(dtype)
    changed(write_layout(tmp_path, weights, layout), {scales: tensor})
    with pytest.raises(InvalidTensor, match=f"{scales} is .*; float16, bfloat16 or float32 is expected"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, -1], ids=["first", "last"])
def test_scales_that_are_not_finite_are_refused_when_read(
    tmp_path: Path, layout: str, value: float, column: int
) -> None:
    weights = some_weights(kind=kind_for(layout))
    tensor = stored(weights[UP], layout)[SCALES[layout]].clone()
    tensor.view(-1)[column] = value
    changed(write_layout(tmp_path, weights, layout), {f"{UP}.{SCALES[layout]}": tensor})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint[Q].equal(weights[Q])
    with pytest.raises(NonFiniteScales, match=f"{UP}: "):
        checkpoint[UP]


@pytest.mark.parametrize(("layout", "zeros"), [("gemv_fast", "qzeros"), ("llm-awq", "scaled_zeros")])
@pytest.mark.parametrize("value", [1.0, -1e4, float("nan")])
def test_zeros_that_are_no_zero_points_are_invalid_and_no_mismatch(
    tmp_path: Path, layout: str, zeros: str, value: float
) -> None:
    tensor = stored(some_weights()[UP], layout)[zeros].clone()
    tensor[1, 5] = value
    changed(write_layout(tmp_path, some_weights(), layout), {f"{UP}.{zeros}": tensor})
    with pytest.raises(InvalidTensor, match=rf"{UP}: {zeros} is not -\(scales \* z\)"):
        open_checkpoint(tmp_path).read(UP)


EMPTY: Mapping[str, Mapping[str, Tensor]] = {
    "gemm": {"qweight": torch.zeros(0, 8, dtype=torch.int32), "qzeros": torch.zeros(1, 8, dtype=torch.int32),
             "scales": torch.zeros(1, 64, dtype=torch.float16)},
    "gemv": {"qweight": torch.zeros(64, 0, dtype=torch.int32), "qzeros": torch.zeros(64, 1, dtype=torch.int32),
             "scales": torch.zeros(64, 8, dtype=torch.float16)},
    "gemv_fast": {"qweight": torch.zeros(16, 0, dtype=torch.int16), "qzeros": torch.zeros(8, 64, dtype=torch.float16),
                  "scales": torch.zeros(8, 64, dtype=torch.float16)},
    "marlin": {"qweight": torch.zeros(0, 128, dtype=torch.int32), "scales": torch.zeros(1, 64, dtype=torch.float16)},
    "compressed-tensors": {"weight_packed": torch.zeros(64, 0, dtype=torch.int32),
                           "weight_scale": torch.zeros(64, 1, dtype=torch.float16)},
}  # fmt: skip


@pytest.mark.parametrize("layout", EMPTY)
@pytest.mark.parametrize("group_size", [None, 64, -1])
def test_a_linear_without_inputs_is_invalid(tmp_path: Path, layout: str, group_size: int | None) -> None:
    write_shards(tmp_path, {f"a.{suffix}": tensor for suffix, tensor in EMPTY[layout].items()})
    with pytest.raises(InvalidTensor, match=r"a\."):
        open_checkpoint(tmp_path, group_size=group_size)


OUTPUT_AXES = {
    "gemm": (1, 1), "marlin": (1, 1), "gemv": (0, 0), "compressed-tensors": (0, 0), "gemv_fast": (0, 1),
    "llm-awq": (0, 1),
}  # fmt: skip
"""Which axis of the words, and which of the scales and zeros, are the outputs."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["no outputs", "no inputs", "no groups"])
@pytest.mark.parametrize("group_size", [None, 64, -1])
def test_a_linear_of_no_size_is_invalid_in_every_layout(
    tmp_path: Path, layout: str, what: str, group_size: int | None
) -> None:
    whole = stored(hurtful_weight(kind_for(layout), 128, 64, 64), layout)
    for suffix, tensor in whole.items():
        words = suffix in ("qweight", "weight_packed")
        outputs = OUTPUT_AXES[layout][0 if words else 1]
        if suffix == "weight_shape":
            whole[suffix] = torch.tensor([0 if what == "no outputs" else 64, 0 if what == "no inputs" else 128])
        elif what == "no outputs" or words is (what == "no inputs"):
            axis = outputs if what == "no outputs" else 1 - outputs
            whole[suffix] = tensor.narrow(axis, 0, 0).contiguous()
    write_shards(tmp_path, {f"a.{suffix}": tensor for suffix, tensor in whole.items()})
    with pytest.raises(InvalidTensor, match=r"a\..* is empty; a linear has inputs, outputs and groups"):
        open_checkpoint(tmp_path, group_size=group_size)
    inspected = CliRunner().invoke(inspect, [str(tmp_path)])
    assert isinstance(inspected.exception, InvalidTensor), inspected.exception


@pytest.mark.parametrize("layout", PADDED)
def test_scales_of_zero_only_leave_no_group_size_to_infer(tmp_path: Path, layout: str) -> None:
    write_layout(tmp_path, some_weights(), layout, quantization=None)
    none = {f"{name}.scales": torch.zeros_like(stored(w, layout)["scales"]) for name, w in some_weights().items()}
    changed(tmp_path, none)
    with pytest.raises(InvalidTensor, match=r"scales .* holds 0 groups; pass group_size="):
        open_checkpoint(tmp_path)


def test_two_layouts_in_one_checkpoint_are_refused(tmp_path: Path) -> None:
    weights = some_weights()
    write_layout(tmp_path, {UP: weights[UP]}, "gemm")
    changed(tmp_path, {f"{Q}.{suffix}": tensor for suffix, tensor in stored(weights[Q], "gemv").items()})
    with pytest.raises(InvalidTensor, match=f"a checkpoint has one layout, but {UP} is gemm, {Q} is gemv"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_words_without_their_scales_miss_a_tensor(tmp_path: Path, layout: str) -> None:
    changed(write_layout(tmp_path, some_weights(kind=kind_for(layout)), layout), {f"{UP}.{SCALES[layout]}": None})
    with pytest.raises(MissingTensor, match=f"{UP} .*scale"):
        open_checkpoint(tmp_path)


def test_a_linear_that_is_not_there_is_a_key_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_layout(tmp_path, some_weights(), "gemm"))
    with pytest.raises(KeyError):
        checkpoint["model.layers.99.mlp.up_proj"]
    assert "model.layers.99.mlp.up_proj" not in checkpoint


def gptq(with_g_idx: bool) -> dict[str, Tensor]:
    tensors = {
        "qweight": torch.zeros(32, 64, dtype=torch.int32),
        "qzeros": torch.zeros(4, 8, dtype=torch.int32),
        "scales": torch.ones(4, 64, dtype=torch.float16),
    }
    return tensors | ({"g_idx": torch.zeros(256, dtype=torch.int32)} if with_g_idx else {})


FOREIGN: Mapping[str, tuple[Mapping[str, Tensor], str]] = {
    "GPTQ": (gptq(with_g_idx=True), "GPTQ"),
    "GPTQ without g_idx": (gptq(with_g_idx=False), "GPTQ"),
    "reordered groups in the gemm layout": (
        gemm(hurtful_weight("random", 256, 64, 64)) | {"g_idx": torch.arange(256)}, "GPTQ"),
    "bitsandbytes, 4 bits": (
        {"weight": torch.zeros(64, 1, dtype=torch.uint8), "weight.absmax": torch.zeros(2, dtype=torch.uint8),
         "weight.quant_map": torch.zeros(16)}, "bitsandbytes"),
    "bitsandbytes, 8 bits": ({"weight": torch.zeros(8, 8, dtype=torch.int8), "SCB": torch.zeros(8)}, "bitsandbytes"),
    "EXL2": ({"q_weight": torch.zeros(8, 8, dtype=torch.int32), "q_scale": torch.zeros(1, 1, dtype=torch.int32)},
             "EXL2"),
    "EXL3": ({"trellis": torch.zeros(1, 1, 16, dtype=torch.int16)}, "EXL3"),
    "HQQ": ({"W_q": torch.zeros(8, 8, dtype=torch.uint8), "scale": torch.zeros(8, 1)}, "HQQ"),
    "FP8 in blocks": (
        {"weight": torch.zeros(8, 8).to(torch.float8_e4m3fn), "weight_scale_inv": torch.zeros(1, 1)}, "FP8"),
    "compressed-tensors of 8 bits": (
        {"weight": torch.zeros(8, 8, dtype=torch.int8), "weight_scale": torch.zeros(8, 1)}, "not pack-quantized"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "name"), FOREIGN.values(), ids=FOREIGN.keys())
def test_other_formats_are_refused_by_name_from_their_tensors_alone(
    tmp_path: Path, tensors: Mapping[str, Tensor], name: str
) -> None:
    write_shards(tmp_path, {f"model.layers.0.mlp.up_proj.{suffix}": tensor for suffix, tensor in tensors.items()})
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UnsupportedFormat, match=name):
        open_checkpoint(tmp_path)


def test_reordered_compressed_tensors_are_refused(tmp_path: Path) -> None:
    write_layout(tmp_path, some_weights(), "compressed-tensors", quantization=None)
    changed(tmp_path, {f"{UP}.weight_g_idx": torch.arange(256, dtype=torch.int32).flip(0)})
    with pytest.raises(UnsupportedFormat, match=rf"{UP}.*weight_g_idx"):
        open_checkpoint(tmp_path)


def test_a_dense_checkpoint_is_not_quantized(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 8)})
    with pytest.raises(NotQuantized, match="holds 1 tensors, none of them packed in 4 bits; load it with transformers"):
        open_checkpoint(tmp_path)


def test_words_of_no_known_shape_are_refused_with_what_was_found(tmp_path: Path) -> None:
    tensors = {"a.qweight": torch.zeros(8, 8, dtype=torch.int64), "a.scales": torch.ones(1, 64)}
    write_shards(tmp_path, tensors)
    with pytest.raises(UnsupportedFormat, match=r"found a\.qweight int64\[8, 8\], a\.scales float32\[1, 64\]; known"):
        open_checkpoint(tmp_path)


MEASURE = """
import resource, sys
from awq_rt.checkpoint import open_checkpoint

def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

open_checkpoint(sys.argv[1])  # whatever the first one imports
before = peak()
checkpoint = open_checkpoint(sys.argv[2])
opened = peak()
checkpoint[next(iter(checkpoint))]
print(checkpoint.nbytes, opened - before, peak() - opened)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures the resident set as Linux counts it")
@pytest.mark.parametrize("pickle", [False, True], ids=["safetensors", "pickle"])
def test_opening_reads_headers_only_and_reading_one_linear_only(tmp_path: Path, pickle: bool) -> None:
    small = write_layout(tmp_path / "small", some_weights({"a": (64, 64, 64)}), "gemm", pickle=pickle)
    weight = gemm(hurtful_weight("symmetric", 1024, 1024, 128))
    tensors = {f"layers.{i}.{suffix}": tensor.clone() for i in range(180) for suffix, tensor in weight.items()}
    large = tmp_path / "large"
    large.mkdir()
    if pickle:
        torch.save(tensors, large / "pytorch_model.bin")
    else:
        save_file(tensors, large / "model.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True, timeout=60, check=True
    )
    size, opening, reading = map(int, run.stdout.split())
    assert size > 95e6
    assert opening < 8e6, f"opening {size} bytes took {opening}"
    assert reading < 16e6, f"reading one of 180 linears took {reading}"
