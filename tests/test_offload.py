"""Packed weights that rest in files, and are used from there. What rests beside a GPU is also in `tests/gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TOKENS, assert_agree, build, config_of, logits, packable
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import awq_rt
from awq_rt.errors import CannotFuseModel, InvalidConfig, WriteError
from awq_rt.linear import AwqLinear
from awq_rt.models.offload import ALIGNMENT, Homes
from awq_rt.testing import hurtful_weight

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PARTLY = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}

pytestmark = pytest.mark.usefixtures("registered")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def from_pretrained(folder: Path, device_map: Any = None, **options: Any) -> Any:
    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **options)


def linears(model: nn.Module) -> dict[str, AwqLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AwqLinear)}


def resting(model: nn.Module) -> set[str]:
    """Paths of the packed linears that are offloaded."""
    return {path for path, linear in linears(model).items() if linear.execution_device is not None}


@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom", "mixtral"])
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # its embedding is on the disk
def test_a_model_on_the_disk_computes_what_the_dense_model_does(family: str, tmp_path: Path) -> None:
    dense = build(tmp_path / "model", config_of(family))
    model = from_pretrained(tmp_path / "model", {"": "disk"}, offload_folder=tmp_path / "offload")
    assert resting(model) == linears(model).keys()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_agree(model, dense)
    assert torch.equal(model.generate(TOKENS, **GREEDY), dense.generate(TOKENS, **GREEDY))


@on_a_cpu
@pytest.mark.parametrize("road", ["from_pretrained", "load"])
def test_only_what_the_map_says_rests_elsewhere(road: str, llama: Path, tmp_path: Path) -> None:
    load = from_pretrained if road == "from_pretrained" else awq_rt.load
    model = load(llama, device_map=PARTLY, offload_folder=str(tmp_path / "offload"))
    assert resting(model) == {path for path in linears(model) if path.startswith("model.layers.0.")}
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(awq_rt.load(llama, fuse=False)))


@on_a_cpu
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_beside_another_device_the_cpu_only_keeps_weights(family: str, tmp_path: Path) -> None:
    """accelerate takes the object for a device of its own, which is what makes "cpu" a home: a GPU's stand-in."""
    dense = build(tmp_path / "model", config_of(family))
    places = {name: torch.device("cpu") if place == "cpu" else "cpu" for name, place in PARTLY.items()}
    model = from_pretrained(tmp_path / "model", places)
    assert resting(model) == {path for path in linears(model) if path.startswith("model.layers.0.")}
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == {
        name for name, _ in model.named_parameters() if name.startswith("model.layers.0.")
    }
    assert_agree(model, dense)
    assert torch.equal(model.generate(TOKENS, **GREEDY), dense.generate(TOKENS, **GREEDY))


@on_a_cpu
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_an_offloaded_model_is_saved_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    model = from_pretrained(llama, PARTLY, offload_folder=tmp_path / "offload", dtype=torch.float16)
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(path / "model.safetensors") for path in (llama, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@on_a_cpu
def test_it_is_not_fused_and_says_so(llama: Path, tmp_path: Path) -> None:
    options = {"device_map": PARTLY, "offload_folder": str(tmp_path / "offload")}
    fusion = awq_rt.load(llama, **options).fusion
    assert fusion.decoder is None
    assert "offloaded" in str(fusion)
    with pytest.raises(CannotFuseModel, match="offloaded"):
        awq_rt.load(llama, fuse=True, **options)


@on_a_cpu
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers by that name
def test_an_adapter_learns_beside_offloaded_weights(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    losses = []
    for device_map in (PARTLY, None):
        torch.manual_seed(0)
        model = from_pretrained(llama, device_map, offload_folder=tmp_path / "offload")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        optimizer = torch.optim.Adam((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(3):
            loss = adapted(TOKENS, labels=TOKENS).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert losses[:3] == losses[3:]


@on_a_cpu
def test_a_packed_router_may_be_offloaded_where_awq_rt_reads_it(tmp_path: Path) -> None:
    def router_too(name: str, tensor: Tensor) -> bool:
        return packable(name, tensor) or name.endswith("mlp.gate.weight")

    config = config_of("qwen3_moe")
    config.num_experts = 8
    dense = build(tmp_path / "model", config, choose=router_too)
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offload")}
    assert_agree(awq_rt.load(tmp_path / "model", **options), dense)
    with pytest.raises(NotImplementedError, match=r"mlp\.gate\.weight is packed .* and dense in the model"):
        from_pretrained(tmp_path / "model", **options)


def test_without_a_folder_the_error_asks_for_one(llama: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"model\.layers\.0\.\S+ on the disk.* offload_folder="):
        from_pretrained(llama, {"": "disk"})


def test_the_files_have_no_names_and_nothing_stays_behind(llama: Path, tmp_path: Path) -> None:
    model = from_pretrained(llama, {"": "disk"}, offload_folder=tmp_path / "offload")
    assert resting(model)
    assert not list((tmp_path / "offload").iterdir())  # dense tensors are read from the checkpoint itself


# --- one linear ------------------------------------------------------------------------------------------------------


def at_home(place: str, other: str, folder: Path) -> tuple[AwqLinear, AwqLinear]:
    """A linear that rests at `place` while something else is on `other`, and the same linear that is not offloaded."""
    weight = hurtful_weight("random", 64, 120, 32, bias=True, seed=3)
    model = nn.ModuleDict({"up": AwqLinear(64, 120, 32), "down": AwqLinear(64, 120, 32)})
    homes = Homes(model, {"up": place, "down": other})
    linear, plain = model["up"], AwqLinear(64, 120, 32)
    assert isinstance(linear, AwqLinear)
    assert linear.packed_0.nbytes == 0  # takes no room on the device while the model is loaded
    for each in (linear, plain):
        each.bind(weight, torch.float32, "cpu")
    homes.take(linear, str(folder))
    return linear, plain


@pytest.mark.parametrize(("place", "other"), [("cpu", "cuda:0"), ("disk", "cuda:0"), ("disk", "cpu")])
def test_a_linear_at_home_is_the_linear_that_it_was(place: str, other: str, tmp_path: Path) -> None:
    linear, plain = at_home(place, other, tmp_path)
    assert linear.execution_device == torch.device("cpu")
    for moved, tensor in zip(linear.packed.tensors, plain.packed.tensors, strict=True):
        assert moved.dtype == tensor.dtype
        assert torch.equal(moved, tensor)
        assert moved.data_ptr() != tensor.data_ptr()
        assert moved.data_ptr() % ALIGNMENT == 0
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(linear(x), plain(x))
    assert torch.equal(*(torch.autograd.grad(each(x).square().sum(), x)[0] for each in (linear, plain)))
    assert linear.weight_canonical().equal(plain.weight_canonical())


def test_binding_again_ends_it(tmp_path: Path) -> None:
    linear, _ = at_home("disk", "cpu", tmp_path)
    linear.to(torch.bfloat16)
    assert linear.execution_device is None
    assert linear(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ({"": "cpu"}, {}),  # the CPU is the device
        ({"": torch.device("cpu"), "a": "disk"}, {"a.1": "disk", "a.10": "disk"}),
        ({"a": "cpu", "b": "disk"}, {"b.1": "disk"}),
        ({"a": "cpu", "a.1": 0, "b": "disk"}, {"a.10": "cpu", "b.1": "disk"}),  # "a.1" is no beginning of "a.10"
        ({"": 0, "b": "cpu"}, {"b.1": "cpu"}),
        ({"": 0}, {}),
    ],
)
def test_a_device_map_is_read_as_accelerate_does(device_map: dict[str, Any], expected: dict[str, str]) -> None:
    a = nn.ModuleDict({"1": AwqLinear(32, 8, 32), "10": AwqLinear(32, 8, 32)})
    model = nn.ModuleDict({"a": a, "b": nn.ModuleDict({"1": AwqLinear(32, 8, 32)})})
    assert dict(Homes(model, device_map).places.values()) == expected


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="up cannot be offloaded to "):
        at_home("disk", "cpu", tmp_path / "file")
