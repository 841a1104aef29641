"""From every layout to every other and back, and a word on whatever is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import LAYOUTS, quantization_of, some_weights, stored, write_json, write_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from awq_rt.checkpoint import open_checkpoint, write_checkpoint
from awq_rt.conversion import convert, describe, stored_tensors
from awq_rt.errors import DestinationExists, InvalidTensor, LayoutCannotHold, NonFiniteScales, UnknownLayout
from awq_rt.formats import LAYOUTS as READABLE
from awq_rt.formats import WRITABLE, TensorInfo
from awq_rt.testing import hurtful_weight
from awq_rt.weights import AwqWeight

REAL = ["tiny-llama-awq", "smollm2-135m-awq-gemm-g64"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Packing is bound by memory; threads that wait for each other on busy cores made it ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def read_back(tensors: Mapping[str, torch.Tensor], layout: str, group_size: int) -> AwqWeight:
    infos = {
        suffix: TensorInfo(suffix, tuple(t.shape), t.dtype, tuple(t.tolist()) if suffix == "weight_shape" else None)
        for suffix, t in tensors.items()
    }
    return READABLE[layout].read(tensors, READABLE[layout].shape(infos, group_size))


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", WRITABLE)
def test_any_layout_converts_to_any_other_bit_for_bit(tmp_path: Path, source: str, target: str) -> None:
    weights = some_weights(kind="symmetric" if source == "marlin" else "extreme zeros")
    dense = {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.rand(6, 4)}
    write_layout(tmp_path / "source", weights, source, dense=dense, config={"hidden_size": 256})
    report = convert(tmp_path / "source", tmp_path / "target", target)
    assert (report.layout, report.linears, report.losses) == (target, 2, ())
    converted = open_checkpoint(tmp_path / "target")
    assert converted.layout == target
    assert converted.quantization.group_size == 64
    assert all(converted[name].equal(weight) for name, weight in weights.items())
    assert {name: converted.view(name).tolist() for name in converted.dense} == {
        name: tensor.tolist() for name, tensor in dense.items()
    }
    assert config_of(tmp_path / "target")["hidden_size"] == 256


@pytest.mark.checkpoint
@pytest.mark.parametrize("name", REAL)
def test_what_autoawq_wrote_goes_through_every_layout_and_back(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "checkpoints" / name
    here = tmp_path / "model"
    for place, target in ((source, "gemv"), (here, "gemv_fast"), (here, "compressed-tensors"), (here, "gemm")):
        assert convert(place, here, target, force=True).losses == ()
        assert open_checkpoint(here).layout == target
    before, after = (load_file(folder / "model.safetensors") for folder in (source, here))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.view(torch.uint8), after[k].view(torch.uint8)) for k, tensor in before.items())
    assert config_of(here) == config_of(source)


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    groups=st.integers(1, 9),
    group_size=st.sampled_from([16, 32, 64, 128]),
    out_features=st.integers(1, 5).map(lambda count: 8 * count),
    kind=st.sampled_from(["random", "extreme zeros", "symmetric", "subnormal scales", "wide scales"]),
    path=st.lists(st.sampled_from([*WRITABLE, "llm-awq"]), min_size=1, max_size=4),
    bias=st.booleans(),
)
def test_any_weight_survives_any_path_of_layouts_that_hold_it(
    groups: int, group_size: int, out_features: int, kind: str, path: list[str], bias: bool
) -> None:
    weight = hurtful_weight(kind, groups * group_size, out_features, group_size, bias=bias)
    current = weight
    for layout in path:
        try:
            tensors = stored(current, layout)
        except LayoutCannotHold:
            continue
        current = read_back(tensors, layout, group_size)
    assert current.equal(weight)


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(in_features=st.integers(1, 40), out_features=st.integers(1, 40), bits=st.randoms(use_true_random=False))
def test_compressed_tensors_hold_any_size(in_features: int, out_features: int, bits: Any) -> None:
    divisors = [size for size in range(1, in_features + 1) if in_features % size == 0]
    group_size = bits.choice(divisors)
    weight = hurtful_weight("random", in_features, out_features, group_size, seed=bits.randrange(1000))
    assert read_back(stored_tensors(weight, "compressed-tensors"), "compressed-tensors", group_size).equal(weight)


@pytest.mark.checkpoint
@pytest.mark.parametrize("name", REAL)
def test_compressed_tensors_own_library_reads_what_we_write(shared: Path, tmp_path: Path, name: str) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    source = open_checkpoint(shared / "checkpoints" / name)
    convert(source.root, tmp_path / "ct", "compressed-tensors")
    config = QuantizationConfig.model_validate(config_of(tmp_path / "ct")["quantization_config"])
    (scheme,) = config.config_groups.values()
    assert scheme.weights.symmetric is False
    tensors = load_file(tmp_path / "ct" / "model.safetensors")
    names = PackedQuantizationCompressor.compression_param_names(scheme)
    for linear in list(source)[:: 1 if len(source) < 20 else 30]:
        state = {suffix: tensors[f"{linear}.{suffix}"] for suffix in names}
        dense = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        # The library multiplies in the dtype of the scales; a float32 product rounded once is the same.
        assert torch.equal(dense, source[linear].dequantize().half().T), linear
    assert "lm_head" in config.ignore
    assert not set(config.ignore) & set(source)


@pytest.mark.checkpoint
@pytest.mark.filterwarnings("ignore")  # transformers' and compressed-tensors' own
def test_transformers_loads_what_we_write_as_compressed_tensors(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = open_checkpoint(shared / "checkpoints" / "tiny-llama-awq")
    convert(source.root, tmp_path / "ct", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", dtype=torch.float16, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    for name, module in model.named_modules():
        if name in source:
            assert torch.equal(module.weight, source[name].dequantize().half().T), name
    tokens = torch.arange(12)[None]
    assert torch.isfinite(model(tokens).logits).all()


@pytest.mark.parametrize("target", ["gemm", "gemv", "gemv_fast"])
def test_an_awq_configuration_is_what_autoawq_writes(tmp_path: Path, target: str) -> None:
    source = {**quantization_of("gemm", 64), "modules_to_not_convert": ["visual", "lm_head"]}
    write_layout(tmp_path / "source", some_weights(), "gemm", quantization=source)
    convert(tmp_path / "source", tmp_path / "target", target)
    assert config_of(tmp_path / "target")["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": target,
        "modules_to_not_convert": ["visual"],
    }  # fmt: skip


def test_compressed_tensors_ignore_every_matrix_that_is_not_packed(tmp_path: Path) -> None:
    dense = {"model.gate.weight": torch.ones(8, 8), "model.norm.weight": torch.ones(8)}
    write_layout(tmp_path / "source", some_weights(), "gemm", dense=dense)
    convert(tmp_path / "source", tmp_path / "target", "compressed-tensors")
    stated = config_of(tmp_path / "target")["quantization_config"]
    assert stated["ignore"] == ["lm_head", "model.gate"]
    assert stated["config_groups"]["group_0"]["weights"]["group_size"] == 64


def converted_config(source: Path, *layouts: str) -> dict[str, Any]:
    """The `quantization_config` after `source` was converted to each of `layouts` in turn."""
    for layout in layouts:
        target = source.with_name(f"{source.name} {layout}")
        convert(source, target, layout)
        source = target
    stated: dict[str, Any] = config_of(source)["quantization_config"]
    return stated


def matrices(*names: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.rand(8, 16) for name in names}


MIXTURE = ["model.layers.0.mlp.experts.0.gate_proj", "model.layers.1.mlp.experts.0.up_proj"]
VISION = ["model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0"]


@pytest.mark.parametrize(
    ("packed", "dense", "skipped", "expected"),
    [
        (MIXTURE, ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], [],
         ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]),
        (["model.layers.0.block_sparse_moe.experts.0.w1"], ["model.layers.0.block_sparse_moe.gate"], ["gate"],
         ["gate"]),
        (MIXTURE, ["model.layers.0.mlp.gate"], ["gate"], ["model.layers.0.mlp.gate"]),
        (MIXTURE, VISION, ["visual", "lm_head"], ["visual"]),
        (MIXTURE, VISION, [], VISION),
        (MIXTURE, ["model.embed_tokens", "lm_head", "transformer.wte", "gpt_neox.embed_in", "embed_out"], [], None),
        (MIXTURE, ["model.vision_embed_tokens.img_projection.0"], ["vision_embed_tokens"], ["vision_embed_tokens"]),
        (["model.layers.10.mlp.up_proj"], ["model.layers.1.mlp.up_proj"], ["model.layers.1"],
         ["model.layers.1.mlp.up_proj"]),
        (MIXTURE, ["model.layers.0.mlp.gate"], [""], ["model.layers.0.mlp.gate"]),
    ],
    ids=["routers", "AutoAWQ's own for Mixtral", "the same that would hit a packed linear", "a part of a name",
         "a vision tower", "embeddings and outputs", "a module that is called embedding", "layers 1 and 10", "nothing"],
)  # fmt: skip
def test_an_awq_configuration_skips_what_is_dense_and_nothing_packed(
    tmp_path: Path, packed: list[str], dense: list[str], skipped: list[str], expected: list[str] | None
) -> None:
    source = {**quantization_of("gemm", 64), "modules_to_not_convert": skipped}
    weights = some_weights(dict.fromkeys(packed, (64, 64, 64)))
    write_layout(tmp_path / "source", weights, "gemm", dense=matrices(*dense), quantization=source)
    assert converted_config(tmp_path / "source", "gemv")["modules_to_not_convert"] == expected
    assert convert(tmp_path / "source", tmp_path / "again", "gemm").losses == ()
    direct = config_of(tmp_path / "again")["quantization_config"]
    assert converted_config(tmp_path / "source", "compressed-tensors", "gemm") == direct
    ignored = config_of(tmp_path / "source compressed-tensors")["quantization_config"]["ignore"]
    assert set(dense) <= set(ignored)
    assert not any(name in ignored for name in packed)


def test_a_router_whose_name_begins_a_packed_linears_is_reported(tmp_path: Path) -> None:
    packed = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.0.gate_proj"]
    routers = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    weights = some_weights(dict.fromkeys(packed, (64, 64, 64)))
    write_layout(tmp_path / "source", weights, "gemm", dense=matrices(*routers))
    (loss,) = convert(tmp_path / "source", tmp_path / "gemv", "gemv").losses
    assert loss.startswith("modules_to_not_convert cannot name model.layers.0.mlp.gate, which is not packed")
    stated = config_of(tmp_path / "gemv")["quantization_config"]["modules_to_not_convert"]
    assert stated == ["model.layers.1.mlp.gate"]
    assert convert(tmp_path / "source", tmp_path / "ct", "compressed-tensors").losses == ()


def test_patterns_of_compressed_tensors_become_the_names_that_they_mean(tmp_path: Path) -> None:
    stated = {**quantization_of("compressed-tensors", 64), "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*visual.*"]}
    dense = matrices("model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.visual.blocks.0.attn.qkv", "lm_head")
    weights = some_weights(dict.fromkeys(MIXTURE, (64, 64, 64)))
    write_layout(tmp_path / "source", weights, "compressed-tensors", dense=dense, quantization=stated)
    assert converted_config(tmp_path / "source", "gemm")["modules_to_not_convert"] == [
        "model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.visual.blocks.0.attn.qkv",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["lm_head", "language_model.lm_head"])
def test_a_packed_output_is_said_to_be_packed(tmp_path: Path, name: str) -> None:
    weights = some_weights({"model.layers.0.mlp.up_proj": (64, 64, 64), name: (64, 64, 64)})
    write_layout(tmp_path / "source", weights, "gemm")
    assert converted_config(tmp_path / "source", "compressed-tensors")["ignore"] == []
    assert converted_config(tmp_path / "source compressed-tensors", "gemm")["lm_head"] is True
    assert converted_config(tmp_path / "source", "gemv")["lm_head"] is True


def test_several_group_sizes_become_several_groups_of_compressed_tensors(tmp_path: Path) -> None:
    weights = some_weights({"a": (128, 64, 64), "b": (128, 64, 32), "c": (64, 64, 64)})
    write_layout(tmp_path / "source", weights, "gemm", quantization={"quant_method": "awq", "version": "gemm"})
    groups = converted_config(tmp_path / "source", "compressed-tensors")["config_groups"]
    found = [(group["targets"], group["weights"]["group_size"]) for group in groups.values()]
    assert found == [(["b"], 32), (["a", "c"], 64)]
    converted = open_checkpoint(tmp_path / "source compressed-tensors")
    assert all(converted[name].equal(weight) for name, weight in weights.items())
    assert converted_config(tmp_path / "source compressed-tensors", "compressed-tensors")["config_groups"] == groups


def test_beside_a_single_file_only_the_models_own_files_come_along(tmp_path: Path) -> None:
    downloads = write_layout(tmp_path / "Downloads", some_weights(), "gemm", pickle=True)
    for name in ("tokenizer.json", "passwords.txt", "diary.json"):
        (downloads / name).write_text("{}")
    convert(downloads / "pytorch_model.bin", tmp_path / "target", "gemv")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("linked", [False, True], ids=["a file", "a link, as in the hub's cache"])
def test_not_even_force_replaces_the_folder_of_a_single_file(tmp_path: Path, linked: bool) -> None:
    source = write_layout(tmp_path / "Downloads", some_weights(), "gemm") / "model.safetensors"
    if linked:
        source.rename(tmp_path / "blob")
        source.symlink_to(tmp_path / "blob")
    with pytest.raises(DestinationExists, match="holds the source"):
        convert(source, source.parent, "gemv", force=True)
    assert len(open_checkpoint(source)) == 2


def test_one_group_a_column_is_stated_as_such(tmp_path: Path) -> None:
    weights = some_weights({"a": (64, 64, 64), "b": (128, 64, 128)})
    write_layout(tmp_path / "source", weights, "gemm")
    convert(tmp_path / "source", tmp_path / "gemv", "gemv")
    convert(tmp_path / "source", tmp_path / "ct", "compressed-tensors")
    assert config_of(tmp_path / "gemv")["quantization_config"]["group_size"] == -1
    scheme = config_of(tmp_path / "ct")["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (scheme["strategy"], scheme["group_size"]) == ("channel", None)
    for folder in ("gemv", "ct"):
        converted = open_checkpoint(tmp_path / folder)
        assert all(converted[name].equal(weight) for name, weight in weights.items())


def test_a_statement_within_the_text_model_does_not_survive_beside_the_new_one(tmp_path: Path) -> None:
    nested = {"text_config": {"hidden_size": 64, "quantization_config": quantization_of("gemm", 64)}}
    write_layout(tmp_path / "source", some_weights(), "gemm", quantization=None, config=nested)
    convert(tmp_path / "source", tmp_path / "target", "gemv")
    config = config_of(tmp_path / "target")
    assert config["text_config"] == {"hidden_size": 64}
    assert config["quantization_config"]["version"] == "gemv"


@pytest.mark.parametrize("layout", WRITABLE)
def test_a_description_needs_no_checkpoint(tmp_path: Path, layout: str) -> None:
    weights = some_weights()
    tensors = {f"{n}.{suffix}": t for n, w in weights.items() for suffix, t in stored_tensors(w, layout).items()}
    config = {"quantization_config": describe(layout, 64, dense=[])}
    write_checkpoint(tmp_path / "new", tensors.items(), config)
    checkpoint = open_checkpoint(tmp_path / "new")
    assert all(checkpoint[name].equal(weight) for name, weight in weights.items())


def test_small_files_come_along_and_the_old_configuration_does_not(tmp_path: Path) -> None:
    source = write_layout(tmp_path / "source", some_weights(), "gemm", quantization=None)
    write_json(source / "quant_config.json", {"w_bit": 4, "q_group_size": 64, "version": "GEMM"})
    write_json(source / "tokenizer.json", {"tokens": 1})
    convert(source, tmp_path / "target", "gemv")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_shards_are_cut_to_size(tmp_path: Path) -> None:
    write_layout(tmp_path / "source", some_weights(), "gemm")
    convert(tmp_path / "source", tmp_path / "target", "gemv", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    converted = open_checkpoint(tmp_path / "target")
    assert all(converted[name].equal(weight) for name, weight in some_weights().items())


def test_progress_counts_every_linear(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    write_layout(tmp_path / "source", some_weights(), "gemm")
    convert(tmp_path / "source", tmp_path / "target", "gemv", progress=lambda *call: calls.append(call))
    assert calls == [*((i, 2, name) for i, name in enumerate(some_weights())), (2, 2, "")]


def test_a_pickle_with_tied_weights_converts(tmp_path: Path) -> None:
    embedding = torch.rand(8, 4)
    dense = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    write_layout(tmp_path / "source", some_weights(), "llm-awq", dense=dense, pickle=True)
    convert(tmp_path / "source", tmp_path / "target", "gemm")
    converted = open_checkpoint(tmp_path / "target")
    assert torch.equal(converted.view("lm_head.weight"), embedding)
    assert torch.equal(converted.view("model.embed_tokens.weight"), embedding)


def test_a_checkpoint_can_be_converted_in_its_place(tmp_path: Path) -> None:
    weights = some_weights()
    folder = write_layout(tmp_path / "model", weights, "gemm", shards=2)
    with pytest.raises(DestinationExists):
        convert(folder, folder, "gemv")
    convert(folder, folder, "gemv", force=True)
    converted = open_checkpoint(folder)
    assert converted.layout == "gemv"
    assert all(converted[name].equal(weight) for name, weight in weights.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_that_float16_cannot_hold_exactly_are_reported(tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    shapes = {"a": (64, 64, 64), "b": (128, 64, 64), "c": (64, 8, 64)}
    weights = some_weights(shapes, scale_dtype=dtype)
    # Powers of two are exact in both.
    exact = torch.full_like(weights["c"].scales, 2.0**-7)
    weights["c"] = AwqWeight(weights["c"].codes, weights["c"].zeros, exact)
    for each in ("a", "b"):
        scales = weights[each].scales.clone()
        scales[0, 0] = 1.5e-6  # a subnormal of float16, which has fewer bits
        weights[each] = AwqWeight(weights[each].codes, weights[each].zeros, scales)
    write_layout(tmp_path / "source", weights, "gemm")
    assert convert(tmp_path / "source", tmp_path / "ct", "compressed-tensors").losses == ()
    losses = convert(tmp_path / "source", tmp_path / "fast", "gemv_fast").losses
    assert set(losses) == {
        f"scales were rounded from {name} to float16 (2 of 3 linears)",
        f"scales changed their dtype from {name} to float16, keeping every value (1 of 3 linears)",
    }
    converted = open_checkpoint(tmp_path / "fast")
    for linear, weight in weights.items():
        assert torch.equal(converted[linear].codes, weight.codes)
        assert torch.equal(converted[linear].zeros, weight.zeros)
        assert torch.equal(converted[linear].scales, weight.scales.half())


def test_an_unknown_layout_lists_those_that_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match="'marlin' cannot be written; choose one of gemm, gemv, gemv_fast, comp"):
        convert(tmp_path / "never read", tmp_path / "target", "marlin")


def test_every_linear_that_does_not_fit_is_counted_and_the_first_are_named(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.up": (64, 8, 16) for i in range(7)} | {
        "layers.7.up": (64, 8, 16),
        "layers.8.up": (64, 16, 16),
    }
    write_layout(tmp_path / "source", some_weights(shapes), "gemm")
    with pytest.raises(LayoutCannotHold) as refusal:
        convert(tmp_path / "source", tmp_path / "target", "gemv")
    message = refusal.value.args[0]
    assert message.startswith("9 linears do not fit gemv:")
    assert all(f"layers.{i}.up: " in message for i in range(5))
    assert message.endswith("and 4 more")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_only_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    weights = some_weights({"fits": (64, 64, 64), "narrow": (64, 12, 64), "odd": (64, 9, 64)})
    write_layout(tmp_path / "source", weights, "compressed-tensors")
    with pytest.raises(LayoutCannotHold) as refusal:
        convert(tmp_path / "source", tmp_path / "target", "gemm")
    assert "2 linears do not fit gemm" in refusal.value.args[0]
    assert "narrow: " in refusal.value.args[0]
    assert "odd: " in refusal.value.args[0]
    assert "fits" not in refusal.value.args[0]


def test_two_group_sizes_do_not_fit_a_layout_that_states_one(tmp_path: Path) -> None:
    stated = quantization_of("compressed-tensors", 64)
    stated["config_groups"]["group_1"] = quantization_of("compressed-tensors", 32)["config_groups"]["group_0"]
    weights = some_weights({"a": (128, 64, 64), "b": (128, 64, 32)})
    write_layout(tmp_path / "source", weights, "compressed-tensors", quantization=stated)
    with pytest.raises(LayoutCannotHold, match=r"states one group size; this one has \[32, 64\]"):
        convert(tmp_path / "source", tmp_path / "target", "gemm")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("target", "value", "message"),
    [
        ("gemv_fast", 1e5, "exceed its range"),
        ("gemv_fast", 1e-12, "scales that are 0"),
        ("gemv_fast", 0.0, "scales that are 0"),
    ],
)
def test_a_value_that_does_not_fit_names_its_linear_and_leaves_nothing(
    tmp_path: Path, target: str, value: float, message: str
) -> None:
    weights = some_weights(scale_dtype=torch.bfloat16)
    last = list(weights)[-1]
    scales = weights[last].scales.clone()
    scales[1, 2] = value
    weights[last] = AwqWeight(weights[last].codes, weights[last].zeros, scales, weights[last].bias)
    write_layout(tmp_path / "source", weights, "gemm")
    with pytest.raises(LayoutCannotHold, match=f"{last}: .*{message}"):
        convert(tmp_path / "source", tmp_path / "target", target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("target", ["gemv", "gemv_fast"])
def test_a_group_without_any_scale_does_not_fit_where_padding_looks_the_same(tmp_path: Path, target: str) -> None:
    weights = some_weights()
    name = next(iter(weights))
    weights[name].scales[2] = 0
    write_layout(tmp_path / "source", weights, "gemm")
    with pytest.raises(LayoutCannotHold, match=f"{name}: .*scale"):
        convert(tmp_path / "source", tmp_path / "target", target)
    assert not (tmp_path / "target").exists()
    assert convert(tmp_path / "source", tmp_path / "ct", "compressed-tensors").losses == ()


def test_a_source_that_turns_out_bad_midway_leaves_nothing(tmp_path: Path) -> None:
    weights = some_weights()
    list(weights.values())[-1].scales[0, 0] = float("nan")
    write_layout(tmp_path / "source", weights, "gemm")
    with pytest.raises(NonFiniteScales):
        convert(tmp_path / "source", tmp_path / "target", "gemv", max_shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_bad_source_is_found_before_the_destination_is_touched(tmp_path: Path) -> None:
    write_layout(tmp_path / "source", {"a": some_weights()["model.layers.2.mlp.up_proj"]}, "gemv", quantization=None)
    destination = write_layout(tmp_path / "target", some_weights(), "gemm")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["a.scales"] = tensors["a.scales"][:, :-1].contiguous()
    write_checkpoint(tmp_path / "bad", tensors.items(), {})
    with pytest.raises(InvalidTensor):
        convert(tmp_path / "bad", destination, "gemm", force=True)
    assert len(open_checkpoint(destination)) == 2
