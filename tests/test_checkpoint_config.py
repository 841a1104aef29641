"""Every spelling of a quantisation, and every statement that is refused."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import quantization_of, some_weights, write_json, write_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_rt.checkpoint import open_checkpoint
from awq_rt.checkpoint.config import VERSIONS, parse, read_config
from awq_rt.errors import InvalidConfig, UnsupportedFormat

# What transformers 5.17 writes for an AWQ model: AwqConfig inherits the fields of GPTQConfig.
SAVED_BY_TRANSFORMERS_5 = {
    "zero_point": True, "modules_to_not_convert": None, "quant_method": "awq", "bits": 4, "tokenizer": None,
    "dataset": None, "group_size": 64, "damp_percent": 0.1, "desc_act": False, "act_group_aware": True, "sym": True,
    "true_sequential": True, "format": "gemm", "meta": None, "backend": "auto", "model_seqlen": None,
    "block_name_to_quantize": None, "module_name_preceding_first_block": None, "batch_size": 1, "pad_token_id": None,
    "max_input_length": None, "cache_block_outputs": True, "modules_in_block_to_quantize": None, "version": "gemm",
}  # fmt: skip

SPELLINGS: Mapping[str, Mapping[str, Any]] = {
    "AutoAWQ 0.2": {
        "bits": 4, "group_size": 64, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    },
    "AutoAWQ 0.1": {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"},
    "transformers 4": {
        "quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm", "backend": "autoawq",
        "do_fuse": False, "fuse_max_seq_len": None, "modules_to_fuse": None, "exllama_config": None,
    },
    "transformers 5": SAVED_BY_TRANSFORMERS_5,
    "GPTQModel": {
        "bits": 4, "group_size": 64, "desc_act": False, "sym": False, "lm_head": False, "method": "awq",
        "quant_method": "awq", "format": "gemm", "checkpoint_format": "gemm", "pack_dtype": "int32", "dynamic": None,
        "meta": {"quantizer": ["gptqmodel:7.3.4"]},
    },
    "auto-round": {
        "bits": 4, "group_size": 64, "sym": True, "zero_point": False, "quant_method": "auto-round", "version": "gemm",
        "packing_format": "auto_round:auto_awq", "provider": "auto-round", "iters": 200, "autoround_version": "0.5.1",
    },
    "auto-round as awq": {
        "bits": 4, "group_size": 64, "sym": True, "zero_point": False, "quant_method": "awq", "version": "gemm",
        "provider": "auto-round", "modules_to_not_convert": ["lm_head"],
    },
    "in capitals": {"quant_method": "AWQ", "bits": 4, "group_size": 64, "zero_point": True, "version": "GEMM"},
    "hardly anything": {"quant_method": "awq"},
}  # fmt: skip


@pytest.mark.parametrize("stated", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_spelling_of_a_gemm_checkpoint_opens(tmp_path: Path, stated: Mapping[str, Any]) -> None:
    weights = some_weights()
    checkpoint = open_checkpoint(write_layout(tmp_path, weights, "gemm", quantization=stated))
    assert checkpoint.layout == "gemm"
    assert checkpoint.quantization.group_size in (64, None)
    assert all(checkpoint[name].equal(weight) for name, weight in weights.items())


def test_what_the_installed_transformers_saves_parses() -> None:
    from transformers import AwqConfig

    saved = AwqConfig(bits=4, group_size=64, modules_to_not_convert=["visual"]).to_json_string(use_diff=False)
    stated = parse(json.loads(saved), "config.json")
    assert (stated.method, stated.layouts, stated.group_size) == ("awq", ("gemm",), 64)
    assert stated.skipped == ("visual",)


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
@pytest.mark.parametrize("with_config", [True, False], ids=["beside config.json", "alone"])
def test_an_old_file_of_its_own_is_read(tmp_path: Path, name: str, with_config: bool) -> None:
    weights = some_weights()
    write_layout(tmp_path, weights, "gemv", quantization=None)
    write_json(tmp_path / name, {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMV"})
    if not with_config:
        (tmp_path / "config.json").unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantization.source.endswith(name)
    assert all(checkpoint[linear].equal(weight) for linear, weight in weights.items())


def test_config_json_goes_before_an_old_file(tmp_path: Path) -> None:
    write_layout(tmp_path, some_weights(), "gemm")
    write_json(tmp_path / "quant_config.json", {"w_bit": 3, "version": "GEMM"})
    assert open_checkpoint(tmp_path).quantization.group_size == 64


def test_the_text_model_of_a_larger_one_may_hold_the_configuration(tmp_path: Path) -> None:
    stated = {"text_config": {"hidden_size": 64, "quantization_config": quantization_of("gemv_fast", 64)}}
    write_layout(tmp_path, some_weights(), "gemv_fast", quantization=None, config=stated)
    assert open_checkpoint(tmp_path).quantization.layouts == ("gemv_fast",)


def test_a_folder_without_any_statement_parses_as_silence(tmp_path: Path) -> None:
    config, stated = read_config(tmp_path)
    assert config == {}
    assert (stated.layouts, stated.group_size, stated.zero_point, stated.skipped) == ((), None, None, ())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str.title], ids=["lower", "upper", "title"])
@pytest.mark.parametrize("key", ["version", "format", "checkpoint_format"])
def test_a_version_is_known_in_any_case(version: str, spell: Any, key: str) -> None:
    assert parse({"quant_method": "awq", key: spell(version)}, "here").layouts == VERSIONS[version]


def test_llm_awq_labels_every_generation_gemv() -> None:
    stated = parse({"quant_method": "awq", "backend": "llm-awq", "version": "gemv", "group_size": 128}, "here")
    assert set(stated.layouts) == {"gemm", "gemv", "llm-awq"}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"bits": 4, "w_bit": 8}, None),
        ({"group_size": 128, "q_group_size": 64}, 128),
        ({"q_group_size": -1}, -1),
        ({"group_size": None, "q_group_size": 32}, 32),
    ],
)
def test_the_newer_key_goes_before_the_older(stated: Mapping[str, Any], expected: int | None) -> None:
    assert parse(stated, "here").group_size == expected


def changed(*path: str, to: Any) -> dict[str, Any]:
    """llm-compressor's configuration with one value replaced."""
    stated: dict[str, Any] = copy.deepcopy(quantization_of("compressed-tensors", 128))
    place = stated
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return stated


GROUP = ("config_groups", "group_0")
SCHEME = (*GROUP, "weights")


def test_llm_compressors_configuration_parses() -> None:
    stated = parse(changed("ignore", to=["lm_head", "re:.*mlp.gate$"]), "here")
    assert (stated.method, stated.layouts, stated.group_size) == ("compressed-tensors", ("compressed-tensors",), 128)
    assert stated.zero_point is True
    assert stated.skipped == ("lm_head", "re:.*mlp.gate$")


def test_one_group_a_channel_is_a_group_size_of_minus_one() -> None:
    assert parse(quantization_of("compressed-tensors", -1), "here").group_size == -1
    assert parse(quantization_of("compressed-tensors", -1, symmetric=True), "here").zero_point is False


def test_optional_keys_of_compressed_tensors_may_be_absent() -> None:
    weights = {"num_bits": 4, "group_size": 64}
    stated = parse({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}, "here")
    assert (stated.group_size, stated.zero_point) == (64, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("transform_config", {}), ("transform_config", None), ("transform_config", {"config_groups": {}}),
     ("sparsity_config", {}), ("sparsity_config", None),
     ("sparsity_config", {"format": "dense", "global_sparsity": 0.13, "sparsity_structure": "unstructured"})],
)  # fmt: skip
def test_a_statement_that_nothing_was_rotated_or_sparse_parses(key: str, value: Any) -> None:
    assert parse(changed(key, to=value), "here").group_size == 128


@pytest.mark.parametrize("scheme", [None, {"num_bits": 8, "type": "float"}], ids=["none", "FP8"])
def test_a_quantised_cache_is_warned_of(tmp_path: Path, scheme: Any) -> None:
    stated = quantization_of("compressed-tensors", 64) | {"kv_cache_scheme": scheme}
    checkpoint = open_checkpoint(write_layout(tmp_path, some_weights(), "compressed-tensors", quantization=stated))
    assert any("kv_cache_scheme" in warning for warning in checkpoint.warnings) is (scheme is not None)


def test_groups_of_different_sizes_leave_the_size_to_the_tensors() -> None:
    stated = changed(
        "config_groups", "group_1", to=quantization_of("compressed-tensors", 64)["config_groups"]["group_0"]
    )
    assert parse(stated, "here").group_sizes == {64, 128}
    assert parse(stated, "here").group_size is None


FOREIGN: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "'gptq'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
    "EXL2": ({"quant_method": "exl2", "bits": 4.65}, "'exl2'"),
    "HQQ": ({"quant_method": "hqq", "quant_config": {}}, "'hqq'"),
    "FP8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
    "3 bits": ({"quant_method": "awq", "bits": 3}, "says 3 bits; awq_rt runs 4-bit weights"),
    "8 bits, old key": ({"w_bit": 8, "version": "GEMM"}, "says 8 bits"),
    "an unknown version": ({"quant_method": "awq", "version": "gemv_turbo"}, "version 'gemv_turbo'; known are gemm, "),
    "a version of GPTQ": ({"quant_method": "awq", "checkpoint_format": "gptq_v2"}, "checkpoint_format 'gptq_v2'"),
    "auto-round's GPTQ": (
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        "'auto_round:auto_gptq', the GPTQ layout; export it from auto-round as 'auto_awq'",
    ),
    "integers of 8 bits": (changed(*SCHEME, "num_bits", to=8), "group_0 is pack-quantized, 8 bits"),
    "int8, activations too": (changed(*GROUP, "format", to="int-quantized"), "group_0 is int-quantized"),
    "compressed FP8": (changed(*GROUP, "format", to="float-quantized"), "group_0 is float-quantized"),
    "NVFP4": (changed(*GROUP, "format", to="nvfp4-pack-quantized"), "group_0 is nvfp4-pack-quantized"),
    "4-bit floats": (changed(*SCHEME, "type", to="float"), "type 'float'"),
    "quantised activations": (changed(*GROUP, "input_activations", to={"num_bits": 8}), "quantises activations too"),
    "a reordered weight": (changed(*SCHEME, "actorder", to="group"), "actorder 'group'"),
    "rotations": (
        changed("transform_config", to={"config_groups": {"R1": {"type": "hadamard", "apply": []}}}),
        "has a transform_config (rotations"),
    "rotations in words": (changed("transform_config", to="spinquant"), "has a transform_config"),
    "sparse words": (changed("sparsity_config", to={"format": "sparse-24-bitmask"}), "has a sparsity_config"),
    "sparsity of no format": (changed("sparsity_config", to={"sparsity_structure": "2:4"}), "has a sparsity_config"),
    "a scale a tensor": (changed(*SCHEME, "strategy", to="tensor"), "strategy 'tensor'"),
}  # fmt: skip


@pytest.mark.parametrize(("stated", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_what_is_not_4_bit_awq_is_refused_by_name(tmp_path: Path, stated: Mapping[str, Any], message: str) -> None:
    write_layout(tmp_path, some_weights(), "gemm", quantization=stated)
    with pytest.raises(UnsupportedFormat) as refusal:
        open_checkpoint(tmp_path)
    assert message in str(refusal.value)
    assert str(tmp_path / "config.json") in str(refusal.value)


INVALID: Mapping[str, tuple[Any, str]] = {
    "no object": (["awq"], "is a list; an object is expected"),
    "bits in words": ({"bits": "4"}, "bits '4'; an integer is expected"),
    "bits as a truth": ({"bits": True}, "bits True; an integer is expected"),
    "a fraction of a group": ({"group_size": 0.5}, "group_size 0.5; an integer is expected"),
    "a group in words": ({"q_group_size": "128"}, "q_group_size '128'; an integer is expected"),
    "a group of nothing": ({"group_size": 0}, "group size 0; a positive number, or -1, is expected"),
    "a negative group": ({"group_size": -2}, "group size -2; a positive number, or -1, is expected"),
    "zero points in words": ({"zero_point": "yes"}, "zero_point 'yes'; true or false is expected"),
    "exceptions as a name": ({"modules_to_not_convert": "lm_head"}, "'lm_head'; a list is expected"),
    "no groups": (changed("config_groups", to=None), "has no config_groups"),
    "a list of groups": (changed("config_groups", to=[1]), "has no config_groups"),
    "a group without weights": (changed(*GROUP, "weights", to=None), "group_0 has no weights"),
    "a channel of groups": (changed(*SCHEME, "group_size", to="128"), "group_size '128'; an integer is expected"),
    "ignored names as one": (changed("ignore", to="lm_head"), "'lm_head'; a list is expected"),
}


@pytest.mark.parametrize(("stated", "message"), INVALID.values(), ids=INVALID.keys())
def test_a_value_of_the_wrong_kind_is_named(stated: Any, message: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        parse(stated, "config.json")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b'{"a":' * 100_000], ids=["empty", "cut", "list", "not UTF-8", "nested"]
)
@pytest.mark.parametrize("name", ["config.json", "quant_config.json"])
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    write_layout(tmp_path, some_weights(), "gemm", quantization=None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidConfig, match=name):
        open_checkpoint(tmp_path)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "awq", "gemm", "group", "int"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(stated: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of a configuration, as a path."""
    found = []
    for key, value in stated.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += places(value, (*path, key))
    return found


COMPRESSED = quantization_of("compressed-tensors", 128)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(places(COMPRESSED)), values)
def test_nothing_in_place_of_a_value_of_compressed_tensors_raises_another_error(
    path: tuple[str, ...], value: Any
) -> None:
    with contextlib.suppress(InvalidConfig, UnsupportedFormat):
        parse(changed(*path, to=value), "config.json")


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.sampled_from([*SPELLINGS["GPTQModel"], *SPELLINGS["auto-round"], *SPELLINGS["AutoAWQ 0.1"]]), values)
def test_nothing_in_place_of_any_value_raises_another_error(key: str, value: Any) -> None:
    for stated in SPELLINGS.values():
        with contextlib.suppress(InvalidConfig, UnsupportedFormat):
            parse({**stated, key: value}, "config.json")
