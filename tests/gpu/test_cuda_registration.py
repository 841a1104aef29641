"""transformers' own `from_pretrained` on awq_rt, on a GPU: what `tests/test_registration.py` cannot see on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import build, config_of
from transformers import AutoModelForCausalLM, AwqConfig

import awq_rt
from awq_rt.linear import AwqLinear

TOKENS = torch.arange(3, 35).view(2, 16)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    awq_rt.register()
    yield
    awq_rt.unregister()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build(folder, config_of("llama"))
    return folder


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", "auto", {"": 0}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_device_map_places_the_packed_weights(llama: Path, device_map: object, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, device_map=device_map, dtype=dtype)
    served = {(m.backend_name, m.packed_0.device.type) for m in model.modules() if isinstance(m, AwqLinear)}
    assert served == {("cuda", "cuda")}
    assert model.fusion.decoder is not None
    tokens = TOKENS.to(model.device)
    expected = awq_rt.load(llama, device="cuda:0", dtype=dtype).generate(tokens, **GREEDY)
    assert torch.equal(model.generate(tokens, **GREEDY), expected)


def test_a_model_loaded_on_the_cpu_moves_to_the_gpu(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16).to("cuda")
    assert {m.backend_name for m in model.modules() if isinstance(m, AwqLinear)} == {"cuda"}
    there = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float16, device_map="cuda")
    tokens = TOKENS.cuda()
    assert torch.equal(model(tokens).logits, there(tokens).logits)


@pytest.mark.parametrize("config", [{"version": "exllama"}, {"backend": "exllama_v2"}])
def test_exllama_is_granted(llama: Path, config: dict[str, str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model = AutoModelForCausalLM.from_pretrained(
            llama, device_map="cuda", dtype=torch.float16, quantization_config=AwqConfig(**config)
        )
    assert {m.spec.kernel for m in model.modules() if isinstance(m, AwqLinear) and m.spec} == {"exllama"}


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_generate_compiles_a_static_cache_by_itself(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, device_map="cuda", dtype=torch.float16)
    tokens = TOKENS.cuda()
    compiled = model.generate(tokens, cache_implementation="static", **GREEDY)
    assert hasattr(model, "_compiled_call")
    eager = model.generate(tokens, cache_implementation="static", disable_compile=True, **GREEDY)
    assert compiled.shape == eager.shape
    assert (compiled == eager).float().mean() > 0.9  # a near tie of two random logits may fall the other way


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_is_spread_over_two_gpus(llama: Path) -> None:
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    model = AutoModelForCausalLM.from_pretrained(
        llama, device_map={**places, "model.norm": 1, "lm_head": 1}, dtype=torch.float16
    )
    assert {m.packed_0.device.index for m in model.modules() if isinstance(m, AwqLinear)} == {0, 1}
    one = AutoModelForCausalLM.from_pretrained(llama, device_map="cuda:0", dtype=torch.float16)
    tokens = TOKENS.cuda()
    assert torch.equal(model(tokens).logits.cpu(), one(tokens).logits.cpu())


def test_an_adapter_learns(llama: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(llama, device_map="cuda", dtype=torch.bfloat16)
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
