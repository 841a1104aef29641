"""transformers' own `from_pretrained` on awq_rt, and everything put back afterwards."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import GROUP_SIZE, TOKENS, assert_agree, build, config_of, logits, packable
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AwqConfig,
    CompileConfig,
    modeling_flash_attention_utils,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import CompressedTensorsConfig

import awq_rt
from awq_rt.errors import CannotFuseModel, InvalidConfig, InvalidInput, MissingTensor, NotQuantized, UnsupportedDevice
from awq_rt.linear import AwqLinear
from awq_rt.models.experts import AwqExperts

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "bloom", "gpt_neox", "mixtral", "qwen3_moe", "deepseek_v2", "llava")
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def from_pretrained(folder: Path, **options: Any) -> Any:
    """The model, loaded by transformers, after a look at what it has to say of the load."""
    options.setdefault("dtype", torch.float32)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_quantization(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config=config["quantization_config"] | changes)


# --- what it is for --------------------------------------------------------------------------------------------------


def test_without_it_transformers_asks_for_another_package(llama: Path) -> None:
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is installed")
    with pytest.raises(ImportError, match="gptqmodel"):
        AutoModelForCausalLM.from_pretrained(llama)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_from_pretrained_computes_what_the_dense_model_does(family: str, tmp_path: Path) -> None:
    dense = build(tmp_path, config_of(family))
    auto = transformers.AutoModelForImageTextToText if family == "llava" else AutoModelForCausalLM
    model, report = auto.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert any(isinstance(module, AwqLinear) for module in model.modules())
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert_agree(model, dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers comments on some families' defaults
        assert torch.equal(model.generate(TOKENS, **GREEDY), dense.generate(TOKENS, **GREEDY))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("layout", ["gemm", "compressed-tensors"])
def test_experts_stay_in_4_bits(family: str, layout: str, tmp_path: Path) -> None:
    dense = build(tmp_path, config_of(family), layout=layout)
    model = from_pretrained(tmp_path)
    experts = [module for module in model.modules() if isinstance(module, AwqExperts)]
    assert len(experts) == model.config.num_hidden_layers
    assert_agree(model, dense)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "compressed-tensors"])
def test_every_layout_loads_and_is_saved_bit_for_bit(layout: str, tmp_path: Path) -> None:
    build(tmp_path / "model", config_of("llama"), layout=layout)
    edit_config(tmp_path / "model", dtype="float16")
    model = from_pretrained(tmp_path / "model", dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(from_pretrained(tmp_path / "model")))


@pytest.mark.usefixtures("registered")
def test_a_saved_mixture_has_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    build(tmp_path / "model", config_of("mixtral"))
    edit_config(tmp_path / "model", dtype="float16")
    from_pretrained(tmp_path / "model", dtype="auto").save_pretrained(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- AwqConfig -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("version", ["gemm", "GEMM", "exllama", "exllamav2", "ipex"])
def test_every_name_of_the_gemm_tensors_loads(version: str, tmp_path: Path) -> None:
    dense = build(tmp_path, config_of("llama"))
    edit_quantization(tmp_path, version=version)
    assert_agree(from_pretrained(tmp_path), dense)


@pytest.mark.usefixtures("registered")
def test_llm_awq_is_read_under_the_name_that_its_converter_gives(tmp_path: Path) -> None:
    dense = build(tmp_path, config_of("llama"), layout="gemv")
    edit_quantization(tmp_path, backend="llm-awq", version="gemv")
    assert_agree(from_pretrained(tmp_path), dense)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast", "llm-awq"])
def test_a_version_may_be_passed_beside_a_checkpoint(version: str, llama: Path) -> None:
    """As in transformers 4. What the tensors are is read from the tensors; the word chooses no kernel here."""
    with pytest.warns(UserWarning, match="You passed `quantization_config`"):
        model = from_pretrained(llama, quantization_config=AwqConfig(version=version))
    assert torch.equal(logits(model), logits(from_pretrained(llama)))


@pytest.mark.usefixtures("registered")
def test_exllama_is_a_wish_that_a_cpu_cannot_grant_and_says_so(llama: Path) -> None:
    config = AwqConfig(version="exllama", exllama_config={"version": 2, "max_input_len": 2048, "max_batch_size": 8})
    with pytest.warns() as caught:
        model = from_pretrained(llama, quantization_config=config)
    assert any("'exllama'" in str(warning.message) for warning in caught)
    assert torch.equal(logits(model), logits(from_pretrained(llama)))


@pytest.mark.usefixtures("registered")
def test_a_kernel_of_another_package_is_not_passed_over_in_silence(llama: Path) -> None:
    with pytest.warns() as caught:
        from_pretrained(llama, quantization_config=AwqConfig(backend="marlin"))
    assert any("'marlin', a kernel of GPTQModel" in str(warning.message) for warning in caught)


@pytest.mark.usefixtures("registered")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_fused_modules_are_honoured_again(llama: Path) -> None:
    plain = from_pretrained(llama, quantization_config=AwqConfig(do_fuse=False))
    assert plain.fusion.decoder is None
    fused = from_pretrained(llama, quantization_config=AwqConfig(do_fuse=True, fuse_max_seq_len=32))
    assert fused.fusion.decoder is not None
    assert torch.equal(fused.generate(TOKENS, **GREEDY), plain.generate(TOKENS, **GREEDY))
    with pytest.raises(InvalidInput, match="max_seq_len=32"):
        fused.generate(TOKENS, max_new_tokens=17, do_sample=False)
    named = {
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "mlp": ["gate_proj", "up_proj", "down_proj"],
        "layernorm": ["input_layernorm", "post_attention_layernorm", "norm"],
        "use_alibi": False,
    }
    mapped = from_pretrained(llama, quantization_config=AwqConfig(fuse_max_seq_len=32, modules_to_fuse=named))
    assert mapped.fusion.decoder is not None


@pytest.mark.usefixtures("registered")
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_what_cannot_be_fused_as_asked_is_an_error(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="fuse_max_seq_len"):
        from_pretrained(llama, quantization_config=AwqConfig(do_fuse=True))
    with pytest.raises(InvalidConfig, match="fuse_max_seq_len 'long'"):
        from_pretrained(llama, quantization_config=AwqConfig(fuse_max_seq_len="long"))
    build(tmp_path / "bloom", config_of("deepseek_v2"))
    with pytest.raises(CannotFuseModel):
        from_pretrained(tmp_path / "bloom", quantization_config=AwqConfig(do_fuse=True, fuse_max_seq_len=32))


@pytest.mark.usefixtures("registered")
def test_fusing_that_a_checkpoint_states_is_used(llama: Path) -> None:
    edit_quantization(llama, do_fuse=True, fuse_max_seq_len=24)
    model = from_pretrained(llama)
    with pytest.raises(InvalidInput, match="max_seq_len=24"):
        model.generate(TOKENS, max_new_tokens=9, do_sample=False)


def test_awq_config_keeps_its_meaning_where_transformers_has_one() -> None:
    awq_rt.register()
    try:
        assert AwqConfig(version="GEMV").format == "gemv"
        assert AwqConfig(bits=4, group_size=64).to_dict()["group_size"] == 64
        assert "do_fuse" not in AwqConfig().to_dict()
        assert AwqConfig(do_fuse=True, fuse_max_seq_len=8).to_dict()["fuse_max_seq_len"] == 8
        with pytest.raises(ValueError, match="Invalid format"):
            AwqConfig(version="tensor-rt")
    finally:
        awq_rt.unregister()
    with pytest.raises(ValueError, match="Invalid format"):
        AwqConfig(version="exllama")


# --- transformers' arguments -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_dtype_is_the_one_asked_for_in_every_tensor(family: str, dtype: Any, tmp_path: Path) -> None:
    build(tmp_path, config_of(family))
    edit_config(tmp_path, dtype="bfloat16")
    model = from_pretrained(tmp_path, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {expected}
    assert logits(model).dtype == model.dtype == expected


@pytest.mark.usefixtures("registered")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "device_map", [None, "cpu", "auto", "balanced", "sequential", {"": "cpu"}, torch.device("cpu")]
)
def test_device_maps_on_a_machine_without_a_gpu(llama: Path, device_map: Any) -> None:
    model = from_pretrained(llama, device_map=device_map)
    assert torch.equal(logits(model), logits(from_pretrained(llama)))


@pytest.mark.usefixtures("registered")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_a_sentence_before_anything_is_loaded(llama: Path) -> None:
    with pytest.raises(UnsupportedDevice, match="cuda"):
        from_pretrained(llama, device_map={"model": "cpu", "lm_head": 0})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(attention: str, llama: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and transformers comment on flex attention
        model = from_pretrained(llama, attn_implementation=attention)
        assert model.config._attn_implementation == attention
        assert torch.allclose(logits(model), logits(from_pretrained(llama)), atol=1e-5)


@pytest.mark.usefixtures("registered")
def test_an_attention_that_is_not_installed_is_transformers_own_error(llama: Path) -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed")
    with pytest.raises(ImportError, match="FlashAttention2"):
        from_pretrained(llama, attn_implementation="flash_attention_2")


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for the package flash-attn, which needs a GPU. How many positions each call of it was asked for."""
    asked: list[int] = []

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
        asked.append(q.shape[1])
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = seen if causal else None
        y: Tensor = scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale, enable_gqa=True)
        return y.transpose(1, 2)

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(package, name, flash_attn_func)
    padding.pad_input = padding.unpad_input = None  # type: ignore[attr-defined]
    for module in (package, padding):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    return asked


@pytest.mark.usefixtures("registered")
def test_flash_attention_reads_prompts_in_both_loops(llama: Path, flash_attn: list[int]) -> None:
    model, expected = from_pretrained(llama, attn_implementation="flash_attention_2"), from_pretrained(llama)
    layers = model.config.num_hidden_layers
    flash_attn.clear()
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)  # transformers' own forward pass
    assert flash_attn == [16] * layers
    assert model.fusion.decoder is not None
    flash_attn.clear()
    assert torch.equal(model.generate(TOKENS, **GREEDY), expected.generate(TOKENS, **GREEDY))
    assert flash_attn == [16] * layers  # the fused decoder's prompt; its steps have an operator of their own


@pytest.mark.usefixtures("registered")
def test_a_static_cache_gives_the_same_tokens(llama: Path) -> None:
    model = from_pretrained(llama)
    static = model.generate(TOKENS, cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(static, model.generate(TOKENS, **GREEDY))


@pytest.mark.usefixtures("registered")
def test_generate_compiles_its_step_without_a_graph_break(llama: Path) -> None:
    """What transformers does by itself on a GPU with a static cache; `fullgraph` makes a break an error."""
    model = from_pretrained(llama)
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(sum("awq_rt" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    tokens = model.generate(TOKENS, cache_implementation="static", compile_config=config, **GREEDY)
    assert torch.equal(tokens, model.generate(TOKENS, **GREEDY))
    assert max(compiled) == 7 * model.config.num_hidden_layers


@pytest.mark.usefixtures("registered")
def test_use_cache_false_left_by_autoawq_is_undone(llama: Path) -> None:
    edit_config(llama, use_cache=False)
    model = from_pretrained(llama)
    assert model.config.use_cache
    assert model.generation_config.use_cache


@pytest.mark.usefixtures("registered")
def test_use_cache_false_of_the_caller_stays(llama: Path) -> None:
    assert not from_pretrained(llama, use_cache=False).config.use_cache


# --- odd checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registered")
def test_a_packed_head_is_not_tied_to_the_embedding(tmp_path: Path) -> None:
    def head_too(name: str, tensor: Tensor) -> bool:
        return packable(name, tensor) or name == "lm_head.weight"

    config = config_of("qwen2")
    config.tie_word_embeddings = False
    dense = build(tmp_path, config, choose=head_too)
    edit_config(tmp_path, tie_word_embeddings=True)
    model = from_pretrained(tmp_path)
    assert isinstance(model.lm_head, AwqLinear)
    assert not model.config.tie_word_embeddings
    assert_agree(model, dense)


@pytest.mark.usefixtures("registered")
def test_a_packed_router_is_dequantised(tmp_path: Path) -> None:
    def router_too(name: str, tensor: Tensor) -> bool:
        return packable(name, tensor) or name.endswith("mlp.gate.weight")

    config = config_of("qwen3_moe")
    config.num_experts = 8
    dense = build(tmp_path, config, choose=router_too)
    assert_agree(from_pretrained(tmp_path), dense)


@pytest.mark.usefixtures("registered")
def test_a_dense_tensor_that_belongs_nowhere_is_still_reported(llama: Path) -> None:
    """The counter-test to the empty reports above."""
    stored = load_file(llama / "model.safetensors")
    stored["model.layers.0.self_attn.surplus.weight"] = torch.zeros(8)
    stored["model.layers.0.mlp.surplus.bias"] = torch.zeros(8)
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    _, report = AutoModelForCausalLM.from_pretrained(llama, output_loading_info=True)
    assert report["unexpected_keys"] == {
        "model.layers.0.self_attn.surplus.weight",
        "model.layers.0.mlp.surplus.bias",
    }


@pytest.mark.usefixtures("registered")
def test_a_missing_tensor_is_an_error_and_not_made_up(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    del stored["model.layers.1.input_layernorm.weight"]
    save_file(stored, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensor, match=r"layers\.1\.input_layernorm"):
        AutoModelForCausalLM.from_pretrained(llama)


@pytest.mark.usefixtures("registered")
def test_a_classifier_gets_a_new_head(llama: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3, dtype=torch.float32)
    assert isinstance(model.model.layers[0].mlp.up_proj, AwqLinear)
    assert model.score.weight.shape == (3, 64)
    hidden = model.model(TOKENS).last_hidden_state
    assert torch.equal(hidden, from_pretrained(llama).model(TOKENS).last_hidden_state)


@pytest.mark.usefixtures("registered")
def test_the_files_that_transformers_chose_are_read(llama: Path) -> None:
    """A subfolder, and weights in a pickle although a safetensors file lies beside it."""
    model = from_pretrained(llama.parent, subfolder=llama.name)
    stored = load_file(llama / "model.safetensors")
    stored["model.norm.weight"] *= 2
    torch.save(stored, llama / "pytorch_model.bin")
    other = from_pretrained(llama, use_safetensors=False)
    assert torch.equal(other.model.norm.weight, 2 * model.model.norm.weight)
    assert torch.equal(
        other.model.layers[0].mlp.up_proj(torch.eye(64)), model.model.layers[0].mlp.up_proj(torch.eye(64))
    )


@pytest.mark.usefixtures("registered")
def test_a_dense_checkpoint_cannot_be_made_4_bit_while_it_loads(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config_of("llama")).save_pretrained(tmp_path)
    with pytest.raises(NotQuantized, match=r"awq_rt\.quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=AwqConfig())


@pytest.mark.usefixtures("registered")
def test_compressed_tensors_that_are_not_packed_in_4_bits_go_to_their_own_loader(tmp_path: Path) -> None:
    build(tmp_path, config_of("llama"), layout="compressed-tensors")
    config = json.loads((tmp_path / "config.json").read_text())
    ours = CompressedTensorsConfig.from_dict(config["quantization_config"])
    assert type(AUTO_QUANTIZER_MAPPING["compressed-tensors"](ours)).__module__.startswith("awq_rt")
    dense = CompressedTensorsConfig.from_dict(config["quantization_config"] | {"dequantize": True})
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    eight = CompressedTensorsConfig.from_dict(config["quantization_config"])
    for theirs in (dense, eight):
        assert type(AUTO_QUANTIZER_MAPPING["compressed-tensors"](theirs)).__name__ == "CompressedTensorsHfQuantizer"


@pytest.mark.usefixtures("registered")
def test_auto_rounds_export_in_the_awq_layout_loads(tmp_path: Path) -> None:
    dense = build(tmp_path, config_of("llama"))
    exported = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "sym": False}
    edit_config(tmp_path, quantization_config=exported | {"group_size": GROUP_SIZE})
    assert_agree(from_pretrained(tmp_path), dense)


def test_compressed_tensors_need_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = build(tmp_path, config_of("llama"), layout="compressed-tensors")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: find(name, *a) if "compressed" not in name else None
    )
    awq_rt.register()
    try:
        monkeypatch.setattr(transformers.utils.quantization_config, "is_compressed_tensors_available", lambda: False)
        assert_agree(from_pretrained(tmp_path), dense)
    finally:
        awq_rt.unregister()


# --- and back --------------------------------------------------------------------------------------------------------


def everything() -> list[Any]:
    """All that `register` may touch."""
    touched: list[Any] = [dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(vars(AwqConfig))]
    if importlib.util.find_spec("peft") is not None:
        from peft.tuners import tuners_utils
        from peft.tuners.lora import model

        touched += [dict(vars(model)), dict(vars(tuners_utils))]
    return touched


def test_unregister_puts_everything_back_however_often_register_was_called(llama: Path) -> None:
    awq_rt.load(llama)  # registers its own quantisation method, once and for all
    before = everything()
    awq_rt.register()
    first = everything()
    assert first != before
    awq_rt.register()
    assert everything() == first
    model = from_pretrained(llama)
    awq_rt.unregister()
    assert everything() == before
    awq_rt.unregister()
    assert everything() == before
    assert torch.equal(logits(model), logits(awq_rt.load(llama)))


@pytest.mark.checkpoint
@pytest.mark.usefixtures("registered")
def test_a_real_checkpoint_says_what_awq_rt_load_makes_it_say(shared: Path) -> None:
    source = shared / "checkpoints" / "smollm2-135m-awq-gemm-g64"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    answer = from_pretrained(source).generate(**tokens, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    assert torch.equal(answer, awq_rt.load(source).generate(**tokens, max_new_tokens=12, do_sample=False))
