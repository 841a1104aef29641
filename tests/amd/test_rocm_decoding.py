"""A model decoded by the backend: fused, captured, on simulated GPUs, against the reference backend.

Compiled and simulated, not run on hardware.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from amdsim.toolchain import Clang
from click.testing import CliRunner
from tiny import build
from transformers import AutoConfig

pytest.importorskip("awq_rt_rocm", reason="awq-rt-rocm is not installed")
pytest.importorskip("ziglang", reason="ziglang is not installed, which builds the fake HIP runtime")
import fake_graphs
import fake_hip
import simulated
from simulated import ARCHITECTURES, Machine, SimulatedBackend

import awq_rt
from awq_rt import registry
from awq_rt.bench import bandwidth
from awq_rt.cli import cli

PROMPT = torch.tensor([[5, 40, 17, 3]])
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of every part that decoding has."""
    found = tmp_path_factory.mktemp("tiny")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    build(found, AutoConfig.for_model("llama", **sizes, **heads, **special))
    return found


@pytest.fixture(scope="module")
def machine(clang: Clang, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with simulated.machine(clang, tmp_path_factory.mktemp("rocm")) as here:
        yield here


@pytest.fixture
def installed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The simulated backend in the place of the real one, and graphs over the fake runtime."""
    here = registry.Plugin("rocm", "awq-rt-rocm", "0", SimulatedBackend(machine), None)
    others = tuple(plugin for plugin in registry.plugins() if plugin.name == "reference")
    monkeypatch.setattr(registry, "plugins", lambda: (here, *others))
    registry.device_for.cache_clear()
    with fake_graphs.capturing(monkeypatch, machine.hip):
        yield machine
    registry.device_for.cache_clear()


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file is not aligned as a GPU's memory is: the output matrix, which no backend packs, is copied."""
    load = awq_rt.load

    def loaded(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        model.lm_head.weight.data = model.lm_head.weight.clone()
        return model

    monkeypatch.setattr(awq_rt, "load", loaded)


def generated(model: Any) -> list[int]:
    arguments: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return list(model.generate(PROMPT, **arguments)[0, PROMPT.shape[1] :].tolist())


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    return generated(awq_rt.load(folder, backend="reference", device="cpu", fuse=False))


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_a_fused_captured_model_gives_the_tokens_of_the_reference(
    installed: Machine, aligned: None, folder: Path, expected: list[int], arch: str
) -> None:
    installed.index = ARCHITECTURES.index(arch)
    hip = installed.hip
    with fake_hip.watched(hip):
        model = awq_rt.load(folder, backend="rocm", device="cpu", dtype=torch.float16, fuse=True)
        assert model.fusion.decoder is not None
        hip.calls.clear()
        hip.launched.clear()
        assert generated(model) == expected
    # The prompt and one step as they are, one step captured; the others, and that one, are replays.
    assert hip.calls.count("hipStreamBeginCapture") == hip.calls.count("hipGraphInstantiateWithFlags") == 1
    assert hip.calls.count("hipGraphLaunch") == NEW_TOKENS - 2
    last_step = [name for name, _, _ in hip.launched[-len(hip.graphs[max(hip.graphs)]) :]]
    used = {"fused_norm", "fused_attention", "fused_gated", "fused_logits", "fused_argmax"}
    assert used <= set(last_step)
    assert {"fused_rope"} <= {name for name, _, _ in hip.launched}
    after_capture = hip.calls[hip.calls.index("hipStreamEndCapture") :]
    assert "hipModuleLaunchKernel" not in after_capture
    assert "hipModuleLoadData" not in after_capture


def test_bench_measures_captured_steps(
    installed: Machine, aligned: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command; what it measures here is the simulator, so figures need only be there."""
    monkeypatch.setattr(bandwidth, "CPU_BYTES", 4 << 20)
    installed.index = ARCHITECTURES.index("gfx1201")
    hip, figures, decode = installed.hip, tmp_path / "bench.json", 2
    options = ["--backend", "rocm", "--device", "cpu", "--dtype", "float16", "--json", str(figures)]
    case = ["--batch", "1", "--prefill", "4", "--decode", str(decode), "--repeats", "1"]
    hip.calls.clear()
    with fake_hip.watched(hip):
        done = CliRunner().invoke(cli, ["bench", str(folder), *case, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(figures.read_text())["rows"]
    assert row["fused"]
    assert row["failure"] is None
    assert min(row["prefill_tps"], row["engine_prefill_tps"], row["decode_tps"]) > 0
    assert row["gpu_idle_share"] is not None  # only a captured step is timed without its host
    # The step is captured when it comes a second time, the prompt in the second generation, of one step; the third is
    # timed, then steps alone and prompts alone.
    assert hip.calls.count("hipStreamBeginCapture") == 2
    prompts, steps = 1 + 1 + 1, (decode - 1) + 1 + decode + decode
    assert hip.calls.count("hipGraphLaunch") == prompts + steps
