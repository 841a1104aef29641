"""What `awq-rt bench` sees of a GPU: captured steps, the device's memory, its read bandwidth."""

from __future__ import annotations

import pytest
import torch

import awq_rt
from awq_rt.bench import bandwidth
from awq_rt.bench.bandwidth import read_bandwidth
from awq_rt.bench.measure import Case, Memory, generation_s, gpu_step_s, never_ending
from awq_rt.bench.synthetic import SyntheticCheckpoint

DEVICE = torch.device("cuda", 0)


def test_a_made_up_model_is_made_on_the_gpu_and_its_memory_is_seen() -> None:
    memory = Memory(DEVICE)
    checkpoint = SyntheticCheckpoint("qwen2.5-0.5b", DEVICE)
    assert checkpoint.view("model.embed_tokens.weight").device == DEVICE
    model = awq_rt.load(checkpoint, device=DEVICE)
    assert {parameter.device for parameter in model.parameters()} == {DEVICE}
    # torch takes memory in blocks of 2 MB and more, so that at least what is held was taken.
    assert memory.taken() >= torch.cuda.memory_allocated(DEVICE) >= checkpoint.nbytes * 0.99


def test_the_captured_step_is_replayed_at_the_same_positions() -> None:
    model = awq_rt.load(SyntheticCheckpoint("tiny", DEVICE), device=DEVICE)
    never_ending(model)
    case = Case(3, 20, 8)
    assert gpu_step_s(model, case) is None  # nothing is captured before the first generation
    generation_s(model, case)
    found = gpu_step_s(model, case)
    assert found is not None
    assert found > 0
    assert model.awq_rt_engine.session.positions.tolist()[:3] == [28, 28, 28]
    before = model.generate(torch.arange(40, device=DEVICE).view(2, 20), max_new_tokens=8)
    gpu_step_s(model, case)
    assert torch.equal(model.generate(torch.arange(40, device=DEVICE).view(2, 20), max_new_tokens=8), before)


def test_an_unfused_model_has_no_captured_step() -> None:
    model = awq_rt.load(SyntheticCheckpoint("tiny", DEVICE), device=DEVICE, fuse=False)
    assert gpu_step_s(model, Case(1, 4, 2)) is None


def test_bandwidth_takes_no_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 20, 80 << 30))
    monkeypatch.setattr(bandwidth, "GPU_BYTES", 1 << 40)
    assert read_bandwidth(DEVICE) > 0
