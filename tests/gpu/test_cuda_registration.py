"""transformers' own `from_pretrained` on awq_rt, on a GPU: what `tests/test_registration.py` cannot see on a CPU."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, config_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AwqConfig

import awq_rt
from awq_rt.linear import AwqLinear

TOKENS = torch.arange(3, 35).view(2, 16)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


FIRST_HALF = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.norm": 0, "lm_head": 0}
"""Of a model with two layers."""

pytestmark = pytest.mark.usefixtures("registered")


def from_pretrained(folder: Path, device_map: Any = "cuda", **options: Any) -> Any:
    options.setdefault("dtype", torch.float16)
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **options)


def linears(model: Any) -> dict[str, AwqLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AwqLinear)}


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", "auto", {"": 0}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_device_map_places_the_packed_weights(llama: Path, device_map: object, dtype: torch.dtype) -> None:
    model = from_pretrained(llama, device_map, dtype=dtype)
    assert {(m.backend_name, m.packed_0.device.type) for m in linears(model).values()} == {("cuda", "cuda")}
    assert model.fusion.decoder is not None
    tokens = TOKENS.to(model.device)
    expected = awq_rt.load(llama, device="cuda:0", dtype=dtype).generate(tokens, **GREEDY)
    assert torch.equal(model.generate(tokens, **GREEDY), expected)


def test_a_model_loaded_on_the_cpu_moves_to_the_gpu(llama: Path) -> None:
    model = from_pretrained(llama, None).to("cuda")
    assert {m.backend_name for m in linears(model).values()} == {"cuda"}
    tokens = TOKENS.cuda()
    assert torch.equal(model(tokens).logits, from_pretrained(llama)(tokens).logits)


@pytest.mark.parametrize("config", [{"version": "exllama"}, {"backend": "exllama_v2"}])
def test_exllama_is_granted(llama: Path, config: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model = from_pretrained(llama, quantization_config=AwqConfig(**config))
    assert {m.spec.kernel for m in linears(model).values() if m.spec} == {"exllama"}


@pytest.mark.filterwarnings("ignore")  # torch and transformers comment on flex attention
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree(attention: str, llama: Path) -> None:
    model, expected = from_pretrained(llama, attn_implementation=attention), from_pretrained(llama)
    assert model.config._attn_implementation == attention
    tokens = TOKENS.cuda()
    with torch.no_grad():
        found, other = model(tokens).logits, expected(tokens).logits
    assert_close(found, other)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Two layers in float16, summed in another order: some thirty roundings of the largest logit."""
    bound = 30 * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert (found - expected).abs().max() < bound


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_generate_compiles_a_static_cache_by_itself(llama: Path) -> None:
    model = from_pretrained(llama)
    tokens = TOKENS.cuda()
    compiled = model.generate(tokens, cache_implementation="static", **GREEDY)
    assert hasattr(model, "_compiled_call")
    eager = model.generate(tokens, cache_implementation="static", disable_compile=True, **GREEDY)
    assert compiled.shape == eager.shape
    assert (compiled == eager).float().mean() > 0.9  # a near tie of two random logits may fall the other way


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_model_is_compiled_as_one_graph(llama: Path) -> None:
    model, tokens = from_pretrained(llama), TOKENS.cuda()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    gradients = []
    for run in (model, compiled):
        embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
        run(inputs_embeds=embeddings, use_cache=False).logits.float().square().mean().backward()
        gradients.append(embeddings.grad)
    assert_close(gradients[1], gradients[0])


# --- more than one place ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_a_layer_rests_elsewhere_and_computes_the_same(home: str, llama: Path, tmp_path: Path) -> None:
    places = {**FIRST_HALF, "model.layers.1": home}
    gc.collect()
    before = torch.cuda.memory_allocated()
    whole = awq_rt.load(llama, device="cuda:0", dtype=torch.float16, fuse=False)
    taken = torch.cuda.memory_allocated() - before
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = from_pretrained(llama, places, offload_folder=tmp_path / "offload")
    away = {path: linear for path, linear in linears(model).items() if linear.execution_device is not None}
    assert away.keys() == {path for path in linears(model) if path.startswith("model.layers.1.")}
    for linear in away.values():
        assert linear.backend_name == "cuda"
        assert linear.execution_device == torch.device("cuda:0")
        assert {(t.device.type, t.is_pinned()) for t in linear.packed.tensors} == {("cpu", home == "cpu")}
    packed = sum(tensor.nbytes for linear in away.values() for tensor in linear.packed.tensors)
    assert torch.cuda.memory_allocated() - before <= taken - packed
    tokens = TOKENS.cuda()
    with torch.no_grad():
        for count in (1, 16):  # a vector and a matrix: other kernels
            assert torch.equal(model(tokens[:, :count]).logits, whole(tokens[:, :count]).logits)
    assert model.fusion.decoder is None
    assert "offloaded" in str(model.fusion)
    assert torch.equal(model.generate(tokens, **GREEDY), whole.generate(tokens, **GREEDY))
    assert (
        away["model.layers.1.mlp.down_proj"]
        .weight_canonical()
        .equal(linears(whole)["model.layers.1.mlp.down_proj"].weight_canonical())
    )


def test_a_map_that_is_worked_out_offloads_what_has_no_room(tmp_path: Path) -> None:
    config = config_of("llama")
    config.num_hidden_layers = 6
    build(tmp_path, config)
    whole = awq_rt.load(tmp_path, device="cuda:0", dtype=torch.float16, fuse=False)
    layer = sum(t.nbytes for path, m in linears(whole).items() if ".layers.0." in path for t in m.packed.tensors)
    dense = sum(parameter.nbytes for parameter in whole.parameters())
    room = {0: dense + 4 * layer, "cpu": 10**9}
    for load in (from_pretrained, awq_rt.load):
        model = load(tmp_path, device_map="auto", max_memory=dict(room), dtype=torch.float16)
        places = {str(place) for place in model.hf_device_map.values()}
        assert places == {"0", "cpu"}
        tokens = TOKENS.cuda()
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, whole(tokens).logits)


@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_experts_at_home_are_copied_when_they_are_chosen(home: str, tmp_path: Path) -> None:
    build(tmp_path / "model", config_of("qwen3_moe"))
    places = {**FIRST_HALF, "model.layers.1": home}
    model = from_pretrained(tmp_path / "model", places, offload_folder=tmp_path / "offload")
    assert any(linear.execution_device is not None for path, linear in linears(model).items() if ".experts." in path)
    whole = awq_rt.load(tmp_path / "model", device="cuda:0", dtype=torch.float16, fuse=False)
    tokens = TOKENS.cuda()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, whole(tokens).logits)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_is_spread_over_two_gpus(llama: Path) -> None:
    model = from_pretrained(llama, {**FIRST_HALF, "model.layers.1": 1, "model.norm": 1, "lm_head": 1})
    assert {linear.packed_0.device.index for linear in linears(model).values()} == {0, 1}
    tokens = TOKENS.cuda()
    assert torch.equal(model(tokens).logits.cpu(), from_pretrained(llama, "cuda:0")(tokens).logits.cpu())


def test_an_adapter_learns(llama: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = from_pretrained(llama, dtype=torch.bfloat16)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(TOKENS.cuda(), labels=TOKENS.cuda()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
