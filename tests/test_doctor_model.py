"""What the doctor says of a model from its headers, beside what loading it then takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import awq_rt
from awq_rt import open_checkpoint, registry
from awq_rt.devices import Device
from awq_rt.doctor import facts, model
from awq_rt.doctor.facts import Request
from awq_rt.linear import AwqLinear

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads, 2 of keys and values, of 16 features; the intermediate size is 4 groups."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.build(folder, tiny.config_of("llama"))
    return folder


def changed(checkpoint: Path, folder: Path, **config: Any) -> Path:
    """A copy with other values in config.json."""
    folder.mkdir(exist_ok=True)
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def examined(path: Path) -> Any:
    """As the worker answers, by way of JSON."""
    return facts.model_from(json.loads(json.dumps(model.examined(open_checkpoint(path)))))


def test_a_model_is_described_from_its_headers(checkpoint: Path) -> None:
    found = examined(checkpoint)
    assert (found.architecture, found.layout, found.group_sizes) == ("LlamaForCausalLM", "gemm", (32,))
    assert found.linears == 14
    assert sum(count for _, count in found.served) == 14
    assert (found.unsupported, found.remote_code, found.needs_remote_code, found.pickles) == ((), (), False, ())
    assert found.tensor_parallel == (1, 2)
    assert found.tensor_parallel_limit.startswith("model.layers.0.self_attn can be cut into 2 parts at most")
    assert found.memory.device == "cpu"
    assert found.memory.available > 0


def test_predicted_weights_are_those_that_loading_makes(checkpoint: Path) -> None:
    loaded = awq_rt.load(checkpoint, device="cpu", backend="reference", fuse=False)
    dense = sum(parameter.nbytes for parameter in loaded.parameters())
    linears = [module for module in loaded.modules() if isinstance(module, AwqLinear)]
    packed = sum(tensor.nbytes for linear in linears for tensor in linear.packed.tensors)
    predicted = model.memory(open_checkpoint(checkpoint), CPU, torch.float32)["weights"]
    beside = 4 * sum(linear.in_features for linear in linears)  # in the rows of the reference: below a thousandth
    assert predicted + beside == dense + packed


def test_the_predicted_cache_is_what_transformers_allocates(checkpoint: Path) -> None:
    loaded = awq_rt.load(checkpoint, device="cpu", backend="reference", fuse=False)
    with torch.no_grad():
        cache = loaded(torch.zeros(1, 7, dtype=torch.int64), use_cache=True).past_key_values
    allocated = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    predicted = model.memory(open_checkpoint(checkpoint), CPU, torch.float32)
    assert predicted["cache"] / predicted["positions"] * 7 == allocated


def test_half_the_precision_is_half_of_what_is_dense(checkpoint: Path) -> None:
    opened = open_checkpoint(checkpoint)
    full, half = (model.memory(opened, CPU, dtype) for dtype in (torch.float32, torch.float16))
    dense = sum(info.nbytes for info in opened.dense.values())  # in float16 on disk
    assert full["weights"] - half["weights"] == dense
    assert full["cache"] == 2 * half["cache"]


@pytest.mark.checkpoint
def test_the_predicted_peak_is_not_below_what_a_process_takes(shared: Path) -> None:
    folder = shared / "checkpoints" / "smollm2-135m-awq-gemm-g64"
    code = f"""
import torch, awq_rt
model = awq_rt.load({str(folder)!r}, device="cpu")
ids = torch.randint(100, 1000, (1, 256), generator=torch.Generator().manual_seed(0))
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)  # getrusage's would be the highest of the process that started it, too
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1])
    predicted = examined(folder).memory
    assert peak <= predicted.peak <= 3 * peak


def test_pickles_are_named(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert examined(folder).pickles == ("pytorch_model.bin",)


BOOBY_TRAP = "raise SystemExit('code of the checkpoint was run')\n"


def test_code_that_is_needed_is_named_and_not_run(checkpoint: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    folder = changed(checkpoint, tmp_path / "own", model_type="nonesuch", auto_map=code)
    (folder / "trap.py").write_text(BOOBY_TRAP)
    found = examined(folder)
    assert found.needs_remote_code
    assert found.remote_code == ("trap.Config", "trap.Model")
    assert found.tensor_parallel == (1,)


def test_code_beside_an_architecture_that_is_known_is_not_needed(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "both", auto_map={"AutoModelForCausalLM": "trap.Model"})
    (folder / "trap.py").write_text(BOOBY_TRAP)
    found = examined(folder)
    assert (found.needs_remote_code, found.remote_code) == (False, ("trap.Model",))


def test_linears_that_the_gpus_backend_refuses_are_named_with_the_reason(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Device("cuda", 0, "Some GPU", "some", "gen1", 2**34)
    monkeypatch.setattr(registry, "default_device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(registry, "device_for", lambda target: gpu)
    monkeypatch.setattr(model, "available", lambda target: 2**33)
    found = examined(checkpoint)
    assert found.served == (("reference", 14),)
    assert len(found.unsupported) == 14
    assert "Some GPU" in found.unsupported[0][1]
    assert (found.memory.device, found.memory.available) == ("cuda:0", 2**33)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 32, "num_attention_heads": 32}, 2 * 32 * 4096 * 2),
        ({"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}, 2 * 32 * 1024 * 2),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 256}, 2 * 2 * 1024 * 2),
        ({"num_hidden_layers": 2, "num_attention_heads": 0, "head_dim": "x"}, 2 * 2 * 4096 * 2),
        ({}, 0),
    ],
)
def test_bytes_of_a_position(config: dict[str, Any], expected: int) -> None:
    assert model._position_bytes(config, 4096, torch.float16) == expected


def asked(path: Path | str, **opening: Any) -> Any:
    """Through the worker."""
    return facts._model(Request(model=str(path), opening=tuple(opening.items())))


def test_the_worker_answers_a_model_or_a_code(checkpoint: Path, tmp_path: Path) -> None:
    found, error = asked(checkpoint)
    assert error is None
    assert found.source == str(checkpoint)
    damaged = changed(checkpoint, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    assert asked(damaged)[1][0] == "AWQ-CKPT-004"
    assert "is empty" in asked(damaged)[1][1]
    assert asked(checkpoint, group_size=64)[1][0] == "AWQ-CKPT-009"


def test_a_model_of_other_sizes_than_config_says_is_found(checkpoint: Path, tmp_path: Path) -> None:
    config = LlamaConfig(**{**tiny.FAMILIES["llama"], "intermediate_size": 256}).to_dict()
    assert asked(changed(checkpoint, tmp_path / "wide", **config))[1][0] == "AWQ-CKPT-013"


def test_a_fault_that_is_none_of_ours_is_a_row_too(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "odd", num_hidden_layers="many")
    code, reason = asked(folder)[1]
    assert code in ("AWQ-MODEL-004", "AWQ-CKPT-013")
    assert reason
