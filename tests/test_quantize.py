"""From a dense checkpoint to one that loads, and back to work after whatever stopped it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import LENGTH, some_tokens, word_tokenizer, write_dense
from safetensors.torch import load_file, save_file

import awq_rt
from awq_rt import quantize
from awq_rt.errors import (
    AlreadyQuantized,
    CalibrationTooShort,
    CannotPack,
    DestinationExists,
    InvalidSetting,
    MissingTensor,
    NonFiniteActivations,
    NonFiniteWeights,
    TokenizerMismatch,
    UnfinishedRunDiffers,
    UnknownLayout,
    UnsupportedDevice,
    WriteError,
)
from awq_rt.quantization import store
from awq_rt.quantization.report import JSON_NAME, PLOT_NAME, BlockReport
from awq_rt.quantization.source import DenseSource
from awq_rt.quantization.streaming import StreamedModel

TOKENS = some_tokens()
SETTINGS: dict[str, Any] = {
    "group_size": 32, "calibration": TOKENS, "length": LENGTH, "samples": len(TOKENS), "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(dense: Path) -> Path:
    """The same in 4 bits; not to be written to."""
    out = dense.parent / "quantized"
    quantize(dense, out, **SETTINGS)
    return out


def copy_of(dense: Path, to: Path, **changes: torch.Tensor) -> Path:
    """The dense model with other tensors in some places."""
    shutil.copytree(dense, to)
    tensors = load_file(to / "model.safetensors")
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def error_on(dense: Path, quantized: Path) -> float:
    """How far the quantised model's logits are from the dense one's, on text that the search has not seen."""
    ids = torch.tensor(some_tokens(seed=99))
    with torch.no_grad():
        expected = awq_dense(dense)(input_ids=ids).logits
        found = awq_rt.load(quantized, device="cpu")(input_ids=ids).logits
    return float((found - expected).norm() / expected.norm())


def awq_dense(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "starcoder2", "phi3"])
def test_the_result_loads_and_is_closer_than_plain_rounding(family: str, tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", family)
    searched = quantize(tmp_path / "dense", tmp_path / "awq", **SETTINGS)
    quantize(tmp_path / "dense", tmp_path / "rtn", method="rtn", group_size=32, device="cpu")
    assert error_on(tmp_path / "dense", tmp_path / "awq") < error_on(tmp_path / "dense", tmp_path / "rtn")
    for group in (group for block in searched.blocks for group in block.groups):
        assert group.loss_after <= group.loss_before
    for linear in (linear for block in searched.blocks for linear in block.linears):
        assert linear.loss_before is not None
        assert linear.loss_after is not None
        assert 0 < linear.loss_after < 0.2


def test_a_model_in_memory_gives_what_its_folder_gives(dense: Path, quantized: Path, tmp_path: Path) -> None:
    quantize(awq_dense(dense), tmp_path / "out", tokenizer=word_tokenizer(), **SETTINGS)
    found, expected = tensors_of(tmp_path / "out"), tensors_of(quantized)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_model_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="model is a Linear; a folder"):
        quantize(torch.nn.Linear(8, 8), tmp_path / "out", **SETTINGS)
    with pytest.raises(InvalidSetting, match="is read from beside it"):
        quantize(dense, tmp_path / "out", tokenizer=word_tokenizer(), **SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast", "compressed-tensors"])
def test_every_layout_holds_the_same_weights(layout: str, dense: Path, quantized: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "out", **{**SETTINGS, "layout": layout})
    expected, found = awq_rt.open_checkpoint(quantized), awq_rt.open_checkpoint(tmp_path / "out")
    assert found.layout == layout
    assert found.linears.keys() == expected.linears.keys()
    for name in expected:
        one, other = expected[name], found[name]
        assert torch.equal(one.codes, other.codes), name
        assert torch.equal(one.zeros, other.zeros), name
        assert torch.equal(one.scales, other.scales), name


def test_what_is_written_beside_the_weights(dense: Path, quantized: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    assert config["dtype"] == "float16"
    assert (quantized / "generation_config.json").read_text() == (dense / "generation_config.json").read_text()
    stored = tensors_of(quantized)
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    assert not list(quantized.parent.glob(".quantized*"))  # nothing is left behind


def test_the_report_says_what_was_done(dense: Path, quantized: Path) -> None:
    report = json.loads((quantized / JSON_NAME).read_text())
    assert report["tokens"] == len(TOKENS) * LENGTH
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    block = report["blocks"][0]
    assert json.loads(json.dumps(BlockReport.from_json(block).to_json())) == block
    assert {linear["name"].rpartition(".")[2] for linear in block["linears"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(0 <= linear["clipped"] <= 1 for linear in block["linears"])
    assert len(block["groups"]) == 4
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert not (quantized / PLOT_NAME).exists()
    else:
        assert (quantized / PLOT_NAME).read_bytes().startswith(b"\x89PNG")


def test_a_run_is_deterministic(dense: Path, quantized: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "again", **SETTINGS)
    first, second = tensors_of(quantized), tensors_of(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)
    quantize(dense, tmp_path / "other", **{**SETTINGS, "calibration": some_tokens(seed=5)})
    other = tensors_of(tmp_path / "other")
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_symmetric_weights_have_every_zero_point_at_8(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "out", **SETTINGS, zero_point=False)
    checkpoint = awq_rt.open_checkpoint(tmp_path / "out")
    assert all(checkpoint[name].symmetric for name in checkpoint)
    assert error_on(dense, tmp_path / "out") < 0.5


def test_one_group_a_row(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "out", **{**SETTINGS, "group_size": -1})
    checkpoint = awq_rt.open_checkpoint(tmp_path / "out")
    assert {linear.group_size == linear.in_features for linear in checkpoint.linears.values()} == {True}


def test_only_one_block_has_weights_at_a_time(dense: Path) -> None:
    streamed = StreamedModel(DenseSource(dense), torch.device("cpu"))

    def resident() -> set[str]:
        return {name for name, p in streamed.model.named_parameters() if p.device.type != "meta"}

    assert resident() == set()
    hidden, calls = streamed.embed(torch.tensor(TOKENS))
    assert resident() == set()
    for number, block in enumerate(streamed.blocks):
        with streamed.loaded(block):
            assert {name.rpartition(f".{number}.")[0] for name in resident()} == {"model.layers"}
            with torch.no_grad():
                hidden = torch.cat([calls[number](block.module, sample[None]) for sample in hidden])
    assert resident() == set()
    model = awq_dense(dense)
    with torch.no_grad():
        expected = model.model(input_ids=torch.tensor(TOKENS), use_cache=False).last_hidden_state
        # One sample at a time instead of all at once: sums in another order, each within 2^-24 of its terms.
        assert torch.allclose(model.model.norm(hidden), expected, rtol=1e-4, atol=1e-4)


class Stop(Exception):
    """What interrupts a run in these tests."""


def stopped_at(number: int, kind: type[BaseException]) -> Any:
    def progress(what: str, done: int, total: int) -> None:
        if done == number:
            raise kind

    return progress


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop])
def test_an_interrupted_run_goes_on_where_it_stopped(
    kind: type[BaseException], dense: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(kind):
        quantize(dense, out, **SETTINGS, progress=stopped_at(1, kind))
    assert not out.exists()
    assert (tmp_path / ".out.unfinished" / "00000.safetensors").is_file()
    report = quantize(dense, out, **SETTINGS)
    assert report.resumed_blocks == 1
    assert (out / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()
    assert not (tmp_path / ".out.unfinished").exists()


def test_a_finished_layer_that_was_damaged_is_done_again(dense: Path, quantized: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        quantize(dense, out, **SETTINGS, progress=stopped_at(1, Stop))
    path = tmp_path / ".out.unfinished" / "00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert quantize(dense, out, **SETTINGS).resumed_blocks == 0
    assert (out / "model.safetensors").read_bytes() == (quantized / "model.safetensors").read_bytes()


@pytest.mark.parametrize("change", [{"group_size": 64}, {"calibration": some_tokens(seed=3)}, {"clip": False}])
def test_an_unfinished_run_with_other_settings_is_not_taken_up(
    change: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        quantize(dense, out, **SETTINGS, progress=stopped_at(1, Stop))
    with pytest.raises(UnfinishedRunDiffers, match=next(iter(change))):
        quantize(dense, out, **{**SETTINGS, **change})
    assert quantize(dense, out, **{**SETTINGS, **change}, restart=True).resumed_blocks == 0


def test_a_full_disk_keeps_what_is_finished(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, save, calls = tmp_path / "out", store.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(WriteError, match=r"1 finished layers are kept in .*run the same command again"):
        quantize(dense, out, **SETTINGS)
    assert quantize(dense, out, **SETTINGS).resumed_blocks == 1


def test_the_destination_is_not_overwritten(dense: Path, quantized: Path) -> None:
    with pytest.raises(DestinationExists):
        quantize(dense, quantized, **SETTINGS)


def test_quantised_input_is_refused(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(AlreadyQuantized, match="awq-rt convert"):
        quantize(quantized, tmp_path / "out", **SETTINGS)


def test_a_configuration_that_names_a_quantisation_is_refused(dense: Path, tmp_path: Path) -> None:
    copy = copy_of(dense, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(AlreadyQuantized, match="fp8"):
        quantize(copy, tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, dense: Path, tmp_path: Path) -> None:
    bad = torch.randn(128, 64)
    bad[3, 5] = value
    copy = copy_of(dense, tmp_path / "copy", model__layers__1__mlp__up_proj__weight=bad)
    with pytest.raises(NonFiniteWeights, match=r"model.layers.1.mlp.up_proj.weight"):
        quantize(copy, tmp_path / "out", **SETTINGS)


def test_weights_too_large_for_the_dtype_are_named(dense: Path, tmp_path: Path) -> None:
    copy = copy_of(dense, tmp_path / "copy", lm_head__weight=torch.full((128, 64), 1e5))
    with pytest.raises(NonFiniteWeights, match=r"lm_head.weight holds 100000.*bfloat16"):
        quantize(copy, tmp_path / "out", **SETTINGS)
    quantize(copy, tmp_path / "out", **SETTINGS, dtype="bfloat16")


def test_activations_that_overflow_name_the_layer(dense: Path, tmp_path: Path) -> None:
    copy = copy_of(dense, tmp_path / "copy", model__layers__0__post_attention_layernorm__weight=torch.full((64,), 1e30))
    with pytest.raises(NonFiniteActivations, match=r"model.layers.0.mlp"):
        quantize(copy, tmp_path / "out", **SETTINGS)


def test_text_that_is_too_short_says_how_much_is_needed(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationTooShort, match="at least 32 are needed"):
        quantize(dense, tmp_path / "out", **{**SETTINGS, "calibration": [[1, 2, 3]]})


def test_a_tokenizer_of_another_model_is_noticed(dense: Path, tmp_path: Path) -> None:
    copy = copy_of(dense, tmp_path / "copy")
    word_tokenizer(500).save_pretrained(copy)
    with pytest.raises(TokenizerMismatch, match=r"embeds 0..127"):
        quantize(copy, tmp_path / "out", **{**SETTINGS, "calibration": ["w499 " * 64]})


def test_the_tokenizer_goes_with_the_model(dense: Path, tmp_path: Path) -> None:
    copy = copy_of(dense, tmp_path / "copy")
    word_tokenizer().save_pretrained(copy)
    quantize(copy, tmp_path / "out", **{**SETTINGS, "calibration": ["w1 w2 w3 w4 " * 100]})
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()


def test_linears_that_cannot_be_packed_are_left_and_listed(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", "qwen2_moe")  # its shared expert's gate has one output
    report = quantize(tmp_path / "dense", tmp_path / "out", **SETTINGS)
    gates = {f"model.layers.{number}.mlp.shared_expert_gate" for number in range(2)}
    assert report.dense.keys() == gates
    assert gates.isdisjoint(awq_rt.open_checkpoint(tmp_path / "out").linears)
    assert any("floating point" in note for note in report.notes)
    with pytest.raises(CannotPack, match=r"2 linears cannot be packed, and strict was asked for"):
        quantize(tmp_path / "dense", tmp_path / "strict", **SETTINGS, strict=True)


def test_what_is_to_be_skipped_stays_dense(dense: Path, tmp_path: Path) -> None:
    report = quantize(dense, tmp_path / "out", **SETTINGS, skip=("layers.1.", "v_proj"), strict=True)
    packed = awq_rt.open_checkpoint(tmp_path / "out").linears
    assert packed
    assert not any("layers.1." in name or "v_proj" in name for name in packed)
    assert len(report.dense) == 8
    assert error_on(dense, tmp_path / "out") < 0.5


def test_a_model_of_which_nothing_can_be_packed_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotPack, match="groups of 48 do not divide its 64 inputs"):
        quantize(dense, tmp_path / "out", **{**SETTINGS, "group_size": 48})


def test_experts_that_saw_too_little_are_reported_and_stay_close(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "dense", "mixtral")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    for name in tensors:
        if name.endswith("gate.weight"):  # a router that never chooses the last expert
            tensors[name][3] = 0
            tensors[name][:3] *= 1e-3
            tensors[name][3] -= 1e-9
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    few = [tokens[:4] for tokens in TOKENS[:2]]
    report = quantize(tmp_path / "dense", tmp_path / "out", **{**SETTINGS, "calibration": few, "length": 4})
    notes = [note for note in report.notes if "too few to search with" in note]
    assert any(".down." in note for note in notes)
    checkpoint = awq_rt.open_checkpoint(tmp_path / "out")
    assert len(checkpoint) == 2 * (4 + 4 * 3)
    assert model.config.num_local_experts == 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_fused_on_disk_become_what_separate_ones_do(family: str, tmp_path: Path) -> None:
    model = write_dense(tmp_path / "separate", family)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = tensors_of(tmp_path / "fused")
    assert any(tensor.dim() == 3 for tensor in fused.values())
    reports = [quantize(tmp_path / name, tmp_path / f"{name}-4bit", **SETTINGS) for name in ("separate", "fused")]
    expected, found = tensors_of(tmp_path / "separate-4bit"), tensors_of(tmp_path / "fused-4bit")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert reports[0].linears == reports[1].linears
    assert not reports[1].dense


def test_fused_experts_that_are_to_be_skipped_are_named_one_by_one(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "separate", "mixtral")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    quantize(tmp_path / "fused", tmp_path / "out", **SETTINGS, skip=("experts",))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "experts" in str(config["quantization_config"]["modules_to_not_convert"])
    assert error_on(tmp_path / "separate", tmp_path / "out") < 0.2


def test_fused_experts_without_names_of_their_own_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dense(tmp_path / "separate", "mixtral").save_pretrained(tmp_path / "fused", save_original_format=False)
    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", lambda model, state: state)
    report = quantize(tmp_path / "fused", tmp_path / "out", **SETTINGS)
    assert report.linears == 2 * 4
    assert {name.rpartition(".")[2] for name in report.dense} == {"gate_up_proj", "down_proj"}
    with pytest.raises(CannotPack, match="holds all experts"):
        quantize(tmp_path / "fused", tmp_path / "strict", **SETTINGS, strict=True)


def test_a_missing_tensor_is_named(dense: Path, tmp_path: Path) -> None:
    copy = copy_of(dense, tmp_path / "copy")
    tensors = tensors_of(copy)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensor, match=r"model.layers.1.mlp.up_proj.weight"):
        quantize(copy, tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"method": "gptq"}, InvalidSetting),
        ({"grid": "none"}, InvalidSetting),
        ({"dtype": "float32"}, InvalidSetting),
        ({"group_size": 0}, InvalidSetting),
        ({"samples": 0}, InvalidSetting),
        ({"damping": -1.0}, InvalidSetting),
        ({"layout": "marlin"}, UnknownLayout),
        ({"device": "cuda:77"}, UnsupportedDevice),
        ({"unheard_of": 1}, TypeError),
    ],
)
def test_settings_are_checked_before_anything_is_read(
    setting: dict[str, Any], error: type[Exception], dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        quantize(dense, tmp_path / "out", **{**SETTINGS, **setting})
    assert list(tmp_path.iterdir()) == []
