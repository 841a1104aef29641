"""Errors that public functions document, where their callers' tests see them only through something else.

`tests/test_documented_errors.py` holds every such promise to a test; most are kept beside the rest of a module's tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import build, config_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import awq_rt
from awq_rt import devices, registry
from awq_rt.backend import LinearSpec
from awq_rt.checkpoint.files import locate
from awq_rt.devices import Refusal
from awq_rt.doctor import bundle, kernels
from awq_rt.errors import (
    BackendQuarantined,
    DestinationExists,
    InvalidConfig,
    InvalidInput,
    InvalidWeight,
    NoBackend,
    OutOfMemory,
    PeerLost,
    UnsupportedFormat,
    WriteError,
)
from awq_rt.fusion.discovery import CannotFuse, Finder
from awq_rt.fusion.verification import verified
from awq_rt.generation.sampler import Unsupported
from awq_rt.linear import AwqLinear
from awq_rt.models import offload, placement
from awq_rt.ops import Ops
from awq_rt.parallel.generation import ParallelGeneration
from awq_rt.parallel.group import Group
from awq_rt.quantization import quantize
from awq_rt.rtc import Builder, CompileFailed, KernelStore, Program
from awq_rt.rtc.program import source_closure
from awq_rt.testing import hurtful_weight

CPU = devices.cpu().devices[0]
SPEC = LinearSpec(64, 8, 32, torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build(folder, config_of("llama"))
    return folder


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("codes", lambda t: t[0], r"codes has shape \[8\]; a matrix is expected"),
        ("zeros", lambda t: t.int(), r"zeros is torch\.int32; torch\.uint8 is expected"),
        ("scales", lambda t: t.double(), r"scales is torch\.float64; one of "),
        ("scales", lambda t: t[:0], "0 groups do not divide in_features 64"),
        ("scales", lambda t: t[[0, 1, 1]], "3 groups do not divide in_features 64"),
        ("zeros", lambda t: t[:1], r"zeros has shape \[1, 8\]; \[2, 8\] is expected"),
        ("bias", lambda t: t[:7], r"bias has shape \[7\]; \[8\] is expected"),
        ("bias", lambda t: t.int(), r"bias is torch\.int32; a floating dtype is expected"),
    ],
)
def test_parts_of_a_weight_that_contradict_each_other(part: str, change: Callable[[Any], Any], words: str) -> None:
    weight = hurtful_weight("random", 64, 8, 32, bias=True)
    with pytest.raises(InvalidWeight, match=words):
        replace(weight, **{part: change(getattr(weight, part))})


@pytest.mark.parametrize(("part", "value"), [("codes", 16), ("zeros", 255), ("scales", float("nan"))])
def test_values_that_no_weight_has(part: str, value: float) -> None:
    weight = hurtful_weight("random", 64, 8, 32)
    weight.check_values()
    spoiled = getattr(weight, part).clone()
    spoiled[1, 7] = value
    with pytest.raises(InvalidWeight, match=f"{part} holds"):
        replace(weight, **{part: spoiled}).check_values()


# --- checkpoints and models ------------------------------------------------------------------------------------------


def test_a_folder_that_other_software_wrote_is_named(tmp_path: Path) -> None:
    (tmp_path / "quantized_weight.pt").write_bytes(b"")
    with pytest.raises(UnsupportedFormat, match=r"quantized_weight\.pt: it was saved by Intel Neural Compressor"):
        locate(tmp_path)


def test_experts_that_are_fused_in_an_unknown_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, config_of("mixtral"))
    monkeypatch.setattr(placement, "GATE_UP", "some_other_name")  # as of an architecture that is yet to come
    with pytest.raises(
        NotImplementedError, match=r"fuses .* into .*gate_up_proj; awq_rt knows fusions into some_other"
    ):
        awq_rt.load(tmp_path, device="cpu")


@pytest.mark.parametrize("take", ["piece", "take"])
def test_more_page_locked_memory_than_there_is(take: str) -> None:
    linear = AwqLinear(64, 8, 32)
    linear.bind(hurtful_weight("random", 64, 8, 32), torch.float32, torch.device("cpu"))
    homes = offload.Homes(nn.Sequential(linear), {"0": "cpu", "1": "cuda:0"})
    linear.bind(hurtful_weight("random", 64, 8, 32), torch.float32, torch.device("cpu"))
    assert homes.places == {linear: ("0", "cpu")}
    homes._locked = offload.PageLocked(1 << 60)
    homes._locked._block = 1 << 60
    with pytest.raises(OutOfMemory, match=f"the host has no {1 << 60} bytes of page-locked memory"):
        homes.take(linear, None) if take == "take" else homes._locked.piece(8)


def test_a_model_whose_blocks_have_no_linears_cannot_be_quantised(tmp_path: Path) -> None:
    """GPT-2's are transformers' Conv1D."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(NotImplementedError, match=r"has no list of blocks with nn\.Linear in them"):
        quantize(tmp_path / "gpt2", tmp_path / "out", calibration=[[1] * 32], length=32, samples=1, device="cpu")
    assert not (tmp_path / "out").exists()


# --- registry and doctor ---------------------------------------------------------------------------------------------


def test_a_quarantined_backend_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Refusal("AWQ-BACKEND-013", "its self-test failed", "update it")
    plugin = registry.Plugin("broken", "awq-rt-broken", "1.0", None, refusal)
    monkeypatch.setattr(registry, "plugins", lambda: (plugin,))
    with pytest.raises(BackendQuarantined, match="'broken' is quarantined: its self-test failed"):
        registry.select(SPEC, CPU, "broken")


def test_a_backend_that_refuses_all_that_the_doctor_tries() -> None:
    refuses = SimpleNamespace(name="refuses", supports=lambda spec, device: Refusal("X-001", "no", "nothing"))
    with pytest.raises(NoBackend, match="'refuses' refuses every linear that is tried with kernel='auto'"):
        kernels.run(refuses, CPU, "auto", torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [bundle.check_free, lambda path: bundle.write(path, {"plugins": []}, "", str)])
def test_a_bundle_needs_a_free_name_in_a_folder(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(DestinationExists, match="there is there already"):
        write(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(WriteError, match="nowhere is not a folder"):
        write(tmp_path / "nowhere" / "report.zip")


# --- compiling -------------------------------------------------------------------------------------------------------


def test_a_program_that_does_not_compile(tmp_path: Path) -> None:
    class Refusing:
        version = "1"

        def compile(self, program: Program) -> bytes:
            raise CompileFailed("line 7: this is no kernel")

    with pytest.raises(CompileFailed, match="line 7"):
        Builder(Refusing(), KernelStore(tmp_path)).machine_code(Program((("main.cu", "kernel"),), (), "sm_90"))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".lock")]


def test_an_included_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "main.cu").write_text('#include "absent.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"absent\.cuh"):
        source_closure(tmp_path / "main.cu")


# --- fusing and generating -------------------------------------------------------------------------------------------


def test_a_model_without_layers_has_no_description() -> None:
    model = nn.Linear(4, 4)
    model.config = SimpleNamespace(get_text_config=lambda: None)  # type: ignore[assignment]
    with pytest.raises(CannotFuse, match="Linear: it has no decoder with a list of layers"):
        Finder(model, None).description()


def test_a_description_that_computes_something_else_is_not_trusted(llama: Path) -> None:
    model = awq_rt.load(llama, device="cpu", fuse=False)
    found = Finder(model, None).description()
    ops = Ops(registry.get("reference"))
    arguments = (model, ops, torch.device("cpu"), torch.float32, False)
    with torch.no_grad():
        assert verified(found, *arguments).embedding_scale == 1.0
        norm = replace(found.norm, weight=found.norm.weight.flip(0))
        with pytest.raises(CannotFuse, match="logits of a prompt differ from transformers' own by "):
            verified(replace(found, norm=norm), *arguments)


def test_a_model_in_training_has_no_decoder(llama: Path) -> None:
    model = awq_rt.load(llama, device="cpu")
    assert model.awq_rt_engine.decoder_of(model) is model.fusion.decoder
    model.train()
    with pytest.raises(Unsupported, match="in training"):
        model.awq_rt_engine.decoder_of(model)


# --- several processes -----------------------------------------------------------------------------------------------


def test_processes_that_are_asked_different_things() -> None:
    class Model(ParallelGeneration):
        generation_config = SimpleNamespace(max_time=None)
        awq_rt_group = SimpleNamespace(gather_numbers=lambda mine: [[*mine], [mine[0] + 1]])  # type: ignore[assignment]

    with pytest.raises(InvalidInput, match="other arguments in process 1 than in process 0"):
        Model().generate(torch.tensor([[1, 2]]), max_new_tokens=3)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_process_that_is_gone_is_named_by_whoever_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any, **keywords: Any) -> None:
        raise dist.DistBackendError("NCCL communicator was aborted on rank 1")

    group = Group(torch.device("cpu"))
    assert group.all_reduce(torch.ones(2)).tolist() == [1, 1]
    monkeypatch.setattr(dist, "all_reduce", lost)
    with pytest.raises(PeerLost, match=r"process 0 has lost another process of the model \(NCCL"):
        group.all_reduce(torch.ones(2))


# --- vLLM's plugin, in the place of which stand empty classes --------------------------------------------------------


class Anything(ModuleType):
    """A module that has whatever class it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib

    layers = ("linear", "quantization.base_config", "vocab_parallel_embedding")
    imported = (*(f"model_executor.layers.{name}" for name in layers), "model_executor.parameter",
                "transformers_utils.config")  # fmt: skip
    for name in imported:
        parts = f"vllm.{name}".split(".")
        for count in range(1, len(parts) + 1):
            whole = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, whole, Anything(whole))
    for name in ("awq_rt.vllm_plugin.config", "awq_rt.vllm_plugin.method"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("awq_rt.vllm_plugin.config").AwqRtConfig
    for name in ("awq_rt.vllm_plugin.config", "awq_rt.vllm_plugin.method"):
        sys.modules.pop(name, None)


def test_what_vllm_cannot_cut_is_refused(vllm_config: Any) -> None:
    stated = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
    assert vllm_config.from_config(stated | {"group_size": 128}).group_size == 128
    with pytest.raises(InvalidConfig, match="names no group size"):
        vllm_config.from_config(stated)
    with pytest.raises(UnsupportedFormat, match="in the layout gemv_fast; under vLLM awq_rt runs gemm"):
        vllm_config.from_config(stated | {"group_size": 128, "version": "gemv_fast"})
