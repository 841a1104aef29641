"""AutoAWQ's programs on awq_rt: its two well-known ones word for word, and each argument of its calls."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import some_tokens, word_tokenizer, write_dense
from transformers import AutoModelForCausalLM

import awq_rt
from awq_rt.compat import AutoAWQForCausalLM
from awq_rt.errors import (
    DestinationExists,
    InvalidCalibration,
    InvalidConfig,
    InvalidInput,
    InvalidSetting,
    NoBackend,
    UnknownKernel,
    UnknownLayout,
)
from awq_rt.linear import AwqLinear
from awq_rt.quantization.calibration import calibration_samples

CONFIG = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
CALIBRATION: dict[str, Any] = {"max_calib_samples": 8, "max_calib_seq_len": 32}

QUANTIZE = """
from transformers import AutoTokenizer
from awq_rt.compat import AutoAWQForCausalLM

model_path = {model!r}
quant_path = {out!r}
quant_config = {{ "zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM" }}

# Load model
model = AutoAWQForCausalLM.from_pretrained(model_path)
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)

# Quantize
model.quantize(tokenizer, quant_config=quant_config, {local})

# Save quantized model
model.save_quantized(quant_path)
tokenizer.save_pretrained(quant_path)
"""

GENERATE = """
from transformers import AutoTokenizer, TextStreamer
from awq_rt.compat import AutoAWQForCausalLM
from awq_rt.compat import get_best_device

device = get_best_device()
quant_path = {out!r}

# Load model
model = AutoAWQForCausalLM.from_quantized(quant_path, fuse_layers=True)
tokenizer = AutoTokenizer.from_pretrained(quant_path, trust_remote_code=True)
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

# Convert prompt to tokens
tokens = tokenizer({prompt!r}, return_tensors='pt').input_ids.to(device)

# Generate output
generation_output = model.generate(
    tokens,
    streamer=streamer,
    {length}
)
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_dense(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    model = AutoAWQForCausalLM.from_pretrained(dense)
    model.quantize(None, CONFIG, some_tokens(), **CALIBRATION)
    model.save_quantized(folder)
    return folder


@pytest.mark.filterwarnings("ignore:The attention mask")
@pytest.mark.parametrize("length", ["max_new_tokens=8", "max_seq_len=12"])
def test_the_two_programs_run_unchanged_but_for_the_import(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], length: str
) -> None:
    """The calibration is local and short; the model is tiny. Otherwise the text of AutoAWQ's README."""
    local = f"calib_data={[' '.join(f'w{n}' for n in row) for row in some_tokens()]!r}, max_calib_seq_len=32"
    names: dict[str, Any] = {}
    exec(QUANTIZE.format(model=str(dense), out=str(tmp_path / "out"), local=local), names)
    exec(GENERATE.format(out=str(tmp_path / "out"), prompt="w5 w6 w7 w8", length=length), names)
    assert names["model"].fusion.decoder is not None
    expected = awq_rt.load(tmp_path / "out").generate(names["tokens"], max_new_tokens=8)
    assert torch.equal(names["generation_output"], expected)
    assert names["generation_output"].shape == (1, 12)
    told = names["tokenizer"].decode(expected[0, 4:], skip_special_tokens=True)
    assert told.split() == capsys.readouterr().out.split()


def test_the_search_is_awq_rts_own_with_autoawqs_grid(dense: Path, quantized: Path, tmp_path: Path) -> None:
    text = calibration_samples(some_tokens(), None, samples=8, length=32, seed=42).tokens.tolist()
    settings: dict[str, Any] = {"samples": 8, "length": 32, "group_size": 32, "grid": "autoawq", "seed": 42}
    awq_rt.quantize(dense, tmp_path / "own", calibration=text, **settings)
    own, compat = awq_rt.open_checkpoint(tmp_path / "own"), awq_rt.open_checkpoint(quantized)
    assert own.linears.keys() == compat.linears.keys()
    assert all(own[name].equal(compat[name]) for name in own)
    awq_rt.quantize(dense, tmp_path / "rtn", group_size=32, method="rtn", rounding="nearest")
    plain = awq_rt.open_checkpoint(tmp_path / "rtn")
    assert any(not plain[name].equal(compat[name]) for name in plain)


def test_a_model_generates_before_and_after_it_is_quantised_and_saved(dense: Path, tmp_path: Path) -> None:
    tokens = torch.tensor(some_tokens())
    model = AutoAWQForCausalLM.from_pretrained(dense, torch_dtype=torch.float32)
    assert not model.is_quantized
    assert torch.equal(model(tokens).logits, AutoModelForCausalLM.from_pretrained(dense)(tokens).logits)
    model = AutoAWQForCausalLM.from_pretrained(dense)
    model.quantize(quant_config=CONFIG, calib_data=some_tokens(), **CALIBRATION)
    assert model.is_quantized
    assert model.model_type == model.config.model_type == "llama"
    assert model.quant_config["group_size"] == 32
    assert isinstance(model.model.model.layers[0].mlp.up_proj, AwqLinear)
    model.save_quantized(f"{tmp_path}/saved/", shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again = AutoAWQForCausalLM.from_quantized(str(tmp_path / "saved"), fuse_layers=False, torch_dtype=torch.float32)
    assert again.fusion.decoder is None
    assert torch.equal(again(tokens).logits, model.eval().to("cpu")(tokens).logits)


def test_what_was_quantised_goes_with_the_object(dense: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(dense)
    model.quantize(None, CONFIG, some_tokens(), **CALIBRATION)
    folder = model._checkpoint.root
    assert folder.is_dir()
    del model
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("version", ["GEMM", "GEMV", "GEMV_Fast"])
def test_the_version_is_the_layout(version: str, dense: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(dense)
    model.quantize(None, {**CONFIG, "version": version}, some_tokens(), **CALIBRATION)
    model.save_quantized(tmp_path / "out")
    assert awq_rt.open_checkpoint(tmp_path / "out").layout == version.lower()


def test_the_search_follows_its_arguments(dense: Path, quantized: Path, tmp_path: Path) -> None:
    kept = awq_rt.open_checkpoint(quantized)
    changes: list[dict[str, Any]] = [{"duo_scaling": False}, {"apply_clip": False}, {"max_calib_samples": 2}]
    for number, change in enumerate(changes):
        model = AutoAWQForCausalLM.from_pretrained(dense)
        model.quantize(None, CONFIG, some_tokens(), **{**CALIBRATION, **change})
        model.save_quantized(tmp_path / str(number))
        other = awq_rt.open_checkpoint(tmp_path / str(number))
        assert any(not other[name].equal(kept[name]) for name in kept), change
    skipping = AutoAWQForCausalLM.from_pretrained(dense)
    skipping.quantize(None, {**CONFIG, "modules_to_not_convert": ["up_proj"]}, some_tokens(), **CALIBRATION)
    assert not any("up_proj" in name for name in skipping._checkpoint.linears)
    symmetric = AutoAWQForCausalLM.from_pretrained(dense)
    symmetric.quantize(None, {**CONFIG, "zero_point": False}, some_tokens(), **CALIBRATION)
    assert all((weight.zeros == 8).all() for weight in symmetric._checkpoint.values())


def test_a_text_file_is_calibration_too(dense: Path, tmp_path: Path) -> None:
    text = "\n\n".join(" ".join(f"w{n}" for n in row) for row in some_tokens())
    (tmp_path / "text.txt").write_text(text)
    model = AutoAWQForCausalLM.from_pretrained(dense)
    model.quantize(word_tokenizer(), CONFIG, str(tmp_path / "text.txt"), **CALIBRATION)
    assert model.is_quantized


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"quant_config": {**CONFIG, "w_bit": 3}}, InvalidSetting, "w_bit 3"),
        ({"quant_config": {**CONFIG, "q_groupsize": 64}}, InvalidSetting, "q_groupsize"),
        ({"quant_config": {**CONFIG, "quant_method": "gptq"}}, InvalidSetting, "'gptq'"),
        ({"quant_config": {**CONFIG, "version": "marlin"}}, UnknownLayout, "'marlin' cannot be written"),
        ({"export_compatible": True}, NotImplementedError, "packed checkpoints only"),
        ({"quantizer_cls": object}, NotImplementedError, "the search is awq_rt's own"),
        ({"calib_data": "no-such-data-set"}, InvalidCalibration, "no-such-data-set"),
    ],
)
def test_what_quantising_cannot_do_is_a_sentence(
    dense: Path, change: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = AutoAWQForCausalLM.from_pretrained(dense)
    with pytest.raises(error, match=match):
        model.quantize(**{"quant_config": CONFIG, "calib_data": some_tokens(), **CALIBRATION, **change})
    assert not model.is_quantized


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"device_map": {"model": "cpu", "lm_head": 0}}, InvalidConfig, "one device"),
        ({"safetensors": False}, InvalidConfig, "holds safetensors"),
        ({"download_kwargs": {"cache_dir": "x"}}, InvalidConfig, "HF_HOME"),
        ({"max_position_embeddings": 64}, TypeError, "max_position_embeddings"),
    ],
)
def test_what_from_pretrained_cannot_honour_is_a_sentence(
    dense: Path, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        AutoAWQForCausalLM.from_pretrained(dense, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"use_exllama": True, "use_exllama_v2": True}, InvalidConfig, "both set"),
        ({"use_exllama_v2": True}, (NoBackend, UnknownKernel), "exllama"),
        ({"safetensors": False}, InvalidConfig, "holds safetensors"),
        ({"download_kwargs": {"ignore_patterns": "*.bin"}}, InvalidConfig, "ignore_patterns"),
        ({"rope_theta": 1e6}, TypeError, "rope_theta"),
        ({"device_map": {"": "disk"}}, InvalidConfig, "offload_folder="),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_from_quantized_cannot_honour_is_a_sentence(
    quantized: Path, options: dict[str, Any], error: Any, match: str
) -> None:
    with pytest.raises(error, match=match):
        AutoAWQForCausalLM.from_quantized(quantized, **options)


def test_what_has_no_effect_is_said(dense: Path, quantized: Path) -> None:
    with pytest.warns(UserWarning, match="use_ipex=True has no effect: awq_rt has CPU kernels"):
        AutoAWQForCausalLM.from_quantized(quantized, use_ipex=True)
    with pytest.warns(UserWarning, match="batch_size=4 has no effect"):
        AutoAWQForCausalLM.from_quantized(quantized, batch_size=4)
    with pytest.warns(UserWarning, match="low_cpu_mem_usage=False has no effect"):
        model = AutoAWQForCausalLM.from_pretrained(dense, low_cpu_mem_usage=False)
    with pytest.warns(UserWarning, match="n_parallel_calib_samples=4 has no effect"):
        model.quantize(None, CONFIG, some_tokens(), n_parallel_calib_samples=4, **CALIBRATION)


def test_the_length_is_a_limit_under_each_of_its_names(quantized: Path) -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    for name in ("max_seq_len", "max_new_tokens"):
        model = AutoAWQForCausalLM.from_quantized(quantized, **{name: 16})
        with pytest.raises(InvalidInput, match="max_seq_len=16"):
            model.generate(tokens, max_new_tokens=13, do_sample=False)


def test_one_file_of_a_folder_may_be_named(quantized: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoAWQForCausalLM.from_quantized(quantized, "model.safetensors", device_map="auto", max_memory=None)
    assert torch.equal(
        model(torch.tensor([[5, 6]])).logits,
        AutoAWQForCausalLM.from_quantized(quantized)(torch.tensor([[5, 6]])).logits,
    )


def test_the_order_of_the_calls_is_checked(dense: Path, quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="from_pretrained or"):
        AutoAWQForCausalLM()
    with pytest.raises(InvalidConfig, match="not quantised yet"):
        AutoAWQForCausalLM.from_pretrained(dense).save_quantized(tmp_path / "out")
    model = AutoAWQForCausalLM.from_quantized(quantized)
    with pytest.raises(InvalidConfig, match="loaded by from_quantized"):
        model.quantize(None, CONFIG)
    with pytest.raises(NotImplementedError, match="pickles"):
        model.save_quantized(tmp_path / "out", safetensors=False)
    with pytest.raises(InvalidConfig, match="shard_size is 'big'"):
        model.save_quantized(tmp_path / "out", shard_size="big")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(DestinationExists, match="not empty"):
        model.save_quantized(tmp_path / "out")
    (tmp_path / "out" / "mine.txt").unlink()
    model.save_quantized(tmp_path / "out")
    assert len(awq_rt.open_checkpoint(tmp_path / "out")) == len(awq_rt.open_checkpoint(quantized))
