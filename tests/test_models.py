"""Every family of decoder, loaded from 4-bit checkpoints, against the dense model with the same weights."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ALL_FAMILIES, TOKENS, assert_agree, build, config_of, logits, packable
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import awq_rt
from awq_rt.errors import (
    InvalidConfig,
    InvalidTensor,
    MissingTensor,
    ModelMismatch,
    RemoteCodeRefused,
    UnknownBackend,
    UnknownKernel,
    UnsupportedDevice,
)
from awq_rt.linear import AwqLinear
from awq_rt.models.activation import ScaledActivation
from awq_rt.models.experts import AwqExperts


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a 4-bit checkpoint of the family, the dense model it must agree with)."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, build(folder, config_of(request.param))


def test_the_model_computes_what_the_dense_one_does(family: tuple[Path, Any]) -> None:
    folder, dense = family
    model = awq_rt.load(folder)
    checkpoint = awq_rt.open_checkpoint(folder)
    packed = sum(len(m.gate_up) + len(m.down) for m in model.modules() if isinstance(m, AwqExperts))
    packed += sum(isinstance(m, AwqLinear) for name, m in model.named_modules() if ".experts." not in name)
    fused = sum(".experts." in name and name.endswith(("up_proj", "w3")) for name in checkpoint.linears)
    assert packed + fused == len(checkpoint)  # gate and up of an expert are one linear here
    assert_agree(model, dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_tensor_has_the_dtype_that_transformers_gives_it(family: tuple[Path, Any], dtype: torch.dtype) -> None:
    folder, dense = family
    twin = type(dense).from_pretrained(None, config=dense.config, state_dict=dense.state_dict(), dtype=dtype)
    expected = {name: tensor.dtype for name, tensor in twin.state_dict().items()}
    model = awq_rt.load(folder, dtype=dtype)
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert found.items() <= expected.items()
    assert logits(model).dtype == logits(twin).dtype


def test_greedy_generation_uses_the_cache_and_gives_the_same_tokens(family: tuple[Path, Any]) -> None:
    folder, dense = family
    model = awq_rt.load(folder)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers comments on some families' defaults
        assert torch.equal(model.generate(TOKENS, **options), dense.generate(TOKENS, **options))


def test_saving_and_loading_again_changes_nothing(family: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = family
    model = awq_rt.load(folder)
    model.save_pretrained(tmp_path / "saved")
    before, after = awq_rt.open_checkpoint(folder), awq_rt.open_checkpoint(tmp_path / "saved")
    assert before.layout == after.layout
    assert before.linears.keys() == after.linears.keys()
    assert all(after[name].equal(before[name]) for name in before)
    assert torch.equal(logits(awq_rt.load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast", "compressed-tensors"])
def test_every_layout_loads_to_the_same_model(layout: str, tmp_path: Path) -> None:
    dense = build(tmp_path / "model", config_of("llama"), layout=layout)
    model = awq_rt.load(tmp_path / "model")
    assert_agree(model, dense)
    model.save_pretrained(tmp_path / "saved")
    assert awq_rt.open_checkpoint(tmp_path / "saved").layout == layout


def test_a_packed_head_is_not_tied_to_the_embedding(tmp_path: Path) -> None:
    """A tied config.json beside a packed lm_head: the head is a matrix of its own."""

    def head_too(name: str, tensor: Tensor) -> bool:
        return packable(name, tensor) or name == "lm_head.weight"

    config = config_of("qwen2")
    config.tie_word_embeddings = False
    dense = build(tmp_path, config, choose=head_too)
    edit_config(tmp_path, tie_word_embeddings=True)
    model = awq_rt.load(tmp_path)
    assert isinstance(model.lm_head, AwqLinear)
    assert_agree(model, dense)


def test_a_packed_router_is_dequantised(tmp_path: Path) -> None:
    def router_too(name: str, tensor: Tensor) -> bool:
        return packable(name, tensor) or name.endswith("mlp.gate.weight")

    config = config_of("qwen3_moe")
    config.num_experts = 8
    dense = build(tmp_path, config, choose=router_too)
    assert "model.layers.0.mlp.gate" in awq_rt.open_checkpoint(tmp_path)
    assert_agree(awq_rt.load(tmp_path), dense)
    assert awq_rt.load(tmp_path, dtype="bfloat16").model.layers[0].mlp.gate.weight.dtype == torch.bfloat16


def test_two_experts_swapped_would_be_noticed(tmp_path: Path) -> None:
    """The counter-test: the comparison above is sharp enough."""
    dense = build(tmp_path, config_of("mixtral"))
    stored = load_file(tmp_path / "model.safetensors")
    first, second = (f"model.layers.1.block_sparse_moe.experts.{e}.w2.qweight" for e in (0, 1))
    stored[first], stored[second] = stored[second], stored[first]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError):
        assert_agree(awq_rt.load(tmp_path), dense)


@pytest.mark.parametrize(
    ("family_name", "path"),
    [
        ("mpt", "transformer.blocks.{}.ffn.act"),
        ("bloom", "transformer.h.{}.mlp.gelu_impl"),
        ("gptj", "transformer.h.{}.mlp.act"),
        ("gpt_neox", "gpt_neox.layers.{}.mlp.act"),
        ("gpt_bigcode", "transformer.h.{}.mlp.act"),
        ("starcoder2", "model.layers.{}.mlp.act"),
        ("falcon", "transformer.h.{}.mlp.act"),
    ],
)
def test_activations_are_divided_by_their_scales(family_name: str, path: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    config = config_of(family_name)
    width = next(  # the activation's width is the input of the block's last projection
        tensor.shape[1]
        for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        if name.endswith(("ffn.down_proj.weight", "4h_to_h.weight", "fc_out.weight", "mlp.c_proj.weight"))
    )
    scales = {f"{path.format(layer)}.scales": torch.rand(width, generator=generator) + 0.5 for layer in (0, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = build(tmp_path, config, extra=scales)
    for layer in (0, 1):
        parent, _, name = path.format(layer).rpartition(".")
        scaled = ScaledActivation(dense.get_submodule(parent).get_submodule(name), width)
        scaled.scales = nn.Parameter(scales[f"{path.format(layer)}.scales"])
        setattr(dense.get_submodule(parent), name, scaled)
    model = awq_rt.load(tmp_path)
    assert sum(isinstance(m, ScaledActivation) for m in model.modules()) == 2
    assert_agree(model, dense)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_the_default_on_a_cpu_is_float32_and_other_dtypes_are_honoured(llama: Path) -> None:
    assert awq_rt.load(llama).dtype == torch.float32
    expected = logits(awq_rt.load(llama))
    for dtype, unit in (("bfloat16", 2**-8), (torch.float16, 2**-11)):
        model = awq_rt.load(llama, dtype=dtype)
        found = logits(model)
        assert found.dtype == model.dtype == getattr(torch, str(dtype).removeprefix("torch."))
        # Every layer rounds its activations a few times: tens of roundings of half a unit, in random directions.
        assert (found.float() - expected).abs().max() < 16 * unit * expected.abs().max()


def test_use_cache_false_left_by_autoawq_is_undone(llama: Path) -> None:
    edit_config(llama, use_cache=False)
    model = awq_rt.load(llama)
    assert model.config.use_cache
    assert model.generation_config.use_cache


def test_gradients_reach_the_input_of_a_model(llama: Path) -> None:
    model = awq_rt.load(llama)
    embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device_map", ["cpu", "auto", "balanced", {"": "cpu"}])
def test_device_maps_on_a_machine_without_a_gpu(llama: Path, device_map: Any) -> None:
    model = awq_rt.load(llama, device_map=device_map)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(awq_rt.load(llama)))


def test_autocast_works_as_with_dense_linears(llama: Path) -> None:
    model = awq_rt.load(llama)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    assert (found.float() - logits(model)).abs().max() < 16 * 2**-8 * logits(model).abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path, name: str) -> None:
    build(tmp_path, config_of(name))
    gradients = []
    for checkpointing in (False, True):
        model = awq_rt.load(tmp_path).train()
        if checkpointing:
            renamed = getattr(model, "activation_checkpointing_enable", None)  # in transformers 5.23
            (renamed or model.gradient_checkpointing_enable)()
        embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        model(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
        gradients.append(embeddings.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_attention_implementations_agree(llama: Path) -> None:
    eager = awq_rt.load(llama, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    assert torch.allclose(logits(eager), logits(awq_rt.load(llama, attn_implementation="sdpa")), atol=1e-5)


def test_what_cannot_be_asked_for_is_refused(llama: Path) -> None:
    with pytest.raises(UnknownBackend, match=r"installed: .*reference"):
        awq_rt.load(llama, backend="tpu")
    with pytest.raises(UnknownKernel, match="torch"):
        awq_rt.load(llama, kernel="warp")
    with pytest.raises(UnsupportedDevice, match="both given"):
        awq_rt.load(llama, device="cpu", device_map="auto")
    with pytest.raises(InvalidConfig, match="on the disk; pass offload_folder="):
        awq_rt.load(llama, device_map={"": "disk"})
    with pytest.raises(TypeError, match="state_dict"):
        awq_rt.load(llama, state_dict={})
    with pytest.raises(TypeError, match="HF_HUB_OFFLINE"):
        awq_rt.load(llama, local_files_only=True)
    with pytest.raises(UnsupportedDevice, match="not a torch device"):
        awq_rt.load(llama, device="gpu")
    with pytest.raises(InvalidConfig, match="attn_implementation 'fast'"):
        awq_rt.load(llama, attn_implementation="fast")
    with pytest.raises(InvalidConfig, match="float8"):
        awq_rt.load(llama, dtype="float8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_torch_does_not_reach_is_refused(llama: Path) -> None:
    with pytest.raises(UnsupportedDevice, match="install the build of torch"):
        awq_rt.load(llama, device="cuda")


def test_a_config_of_another_model_is_refused(llama: Path, tmp_path: Path) -> None:
    for changes, expected in (
        ({"num_hidden_layers": 1}, "has no model.layers.1"),
        ({"intermediate_size": 256}, "down_proj is 128 -> 64, but config.json makes"),
        ({"model_type": "no-such-model"}, "no-such-model"),
    ):
        folder = tmp_path / expected[:8]
        shutil.copytree(llama, folder)
        edit_config(folder, **changes)
        with pytest.raises(ModelMismatch, match=expected):
            awq_rt.load(folder)
    shutil.copytree(llama, tmp_path / "deeper")
    edit_config(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(MissingTensor, match=r"model.layers.2"):
        awq_rt.load(tmp_path / "deeper")


def test_a_dense_tensor_of_another_size_is_refused_before_anything_is_allocated(llama: Path) -> None:
    edit_config(llama, vocab_size=8_000_000)  # 2 GB of embeddings, were they made
    with pytest.raises(ModelMismatch, match=r"lm_head.weight has shape \[128, 64\]; config.json makes"):
        awq_rt.load(llama)


def test_an_absent_dense_tensor_is_named(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensor, match=r"lm_head\.weight"):
        awq_rt.load(llama)


def test_torch_dtype_is_understood(llama: Path) -> None:
    assert awq_rt.load(llama, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_broken_tokenizer_is_a_warning_and_the_model_loads(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match="tokenizer cannot be used"):
        assert awq_rt.load(llama).tokenizer is None


def test_a_broken_generation_config_is_named(llama: Path) -> None:
    (llama / "generation_config.json").write_text("[")
    with pytest.raises(InvalidConfig, match=r"generation_config.json"):
        awq_rt.load(llama)


@pytest.mark.parametrize("scales", [torch.zeros(128), torch.full((128,), torch.nan)], ids=["zero", "nan"])
def test_activation_scales_that_cannot_be_divided_by_are_refused(tmp_path: Path, scales: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(tmp_path, config_of("gpt_neox"), extra={"gpt_neox.layers.0.mlp.act.scales": scales})
    with pytest.raises(InvalidTensor, match=r"layers.0.mlp.act.scales"):
        awq_rt.load(tmp_path)


def test_a_lost_bias_is_an_error(llama: Path) -> None:
    edit_config(llama, attention_bias=True)
    with pytest.raises(MissingTensor, match=r"k_proj\.bias is not in"):
        awq_rt.load(llama)


def test_code_in_a_checkpoint_runs_only_when_asked_for(llama: Path) -> None:
    ran = llama / "ran"
    code = (
        f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class CustomConfig(LlamaConfig): model_type = 'custom-llama'\n"  # its own: transformers marks the class
        "class Custom(LlamaForCausalLM): config_class = CustomConfig\n"
    )
    (llama / "custom.py").write_text(code)
    edit_config(
        llama,
        model_type="custom-llama",
        auto_map={"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.Custom"},
    )
    with pytest.raises(RemoteCodeRefused, match="trust_remote_code=True"):
        awq_rt.load(llama)
    assert not ran.exists()
    assert awq_rt.load(llama, trust_remote_code=True).dtype == torch.float32
    assert ran.exists()


def test_no_config_is_an_error_that_says_what_to_put_there(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(InvalidConfig, match=r"config.json"):
        awq_rt.load(llama)


def test_the_checkpoint_is_closed_after_loading(llama: Path) -> None:
    model = awq_rt.load(llama)
    assert model.hf_quantizer.quantization_config.checkpoint is None


@pytest.mark.checkpoint
def test_a_real_checkpoint_knows_the_capital_of_france(shared: Path) -> None:
    model = awq_rt.load(shared / "checkpoints" / "smollm2-135m-awq-gemm-g64")
    tokens = model.tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)
    assert "Paris" in model.tokenizer.decode(answer[0])


@pytest.mark.checkpoint
@pytest.mark.parametrize("layout", ["gemv", "gemv_fast", "compressed-tensors"])
def test_a_real_checkpoint_says_the_same_in_every_layout(shared: Path, tmp_path: Path, layout: str) -> None:
    source = shared / "checkpoints" / "smollm2-135m-awq-gemm-g64"
    report = awq_rt.convert(source, tmp_path / layout, layout)
    assert report.losses == ()
    answers = []
    for path in (source, tmp_path / layout):
        model = awq_rt.load(path)
        tokens = model.tokenizer("The capital of France is", return_tensors="pt")
        answers.append(model.generate(**tokens, max_new_tokens=24, do_sample=False))
    assert torch.equal(answers[0], answers[1])
