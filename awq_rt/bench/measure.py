"""What a user of `model.generate` waits for, and how much of the device's time and memory it takes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..generation.sampler import Sampler
from .bandwidth import synchronize


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` prompts of `prefill` tokens, each answered with a token from the prompt and `decode` more, one a step."""

    batch: int
    prefill: int
    decode: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians: seconds from the call of `generate` to its first tokens, and seconds a step from there on."""

    first_s: float
    step_s: float
    gpu_step_s: float | None = None  # of captured steps that do not wait for the host
    engine_first_s: float | None = None  # to the first tokens, from where transformers hands the prompts over

    @property
    def idle_share(self) -> float | None:
        """The share of a step in which the GPU waits."""
        return None if self.gpu_step_s is None else max(0.0, 1 - self.gpu_step_s / self.step_s)


class Clock:
    """A streamer for `generate` that notes when tokens come: the prompt first, then one new token a row a call."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_came = False

    def put(self, tokens: Tensor) -> None:
        if self._prompt_came:
            self.times.append(time.perf_counter())
        self._prompt_came = True

    def end(self) -> None:
        """Nothing is left to print."""


def measured(model: Any, case: Case, repeats: int) -> Speed:
    """The speed of `case`, of which every repeat is one whole generation, after two that are not timed.

    In the first kernels are loaded, buffers are made and the step is captured; a short prompt is when its size comes a
    second time.
    """
    generation_s(model, case)
    generation_s(model, replace(case, decode=1))
    runs = [generation_s(model, case) for _ in range(repeats)]
    step_s = median(rest for _, rest in runs) / case.decode
    gpu_s = gpu_step_s(model, case)
    return Speed(median(first for first, _ in runs), step_s, gpu_s, engine_first_s(model, case, repeats))


def generation_s(model: Any, case: Case) -> tuple[float, float]:
    """(seconds to the first tokens, seconds of all steps after it) of one greedy generation."""
    ids = prompts(model, case)
    mask = torch.ones_like(ids)
    clock = Clock()
    synchronize(model.device)
    started = time.perf_counter()
    model.generate(ids, attention_mask=mask, max_new_tokens=case.decode + 1, streamer=clock)
    assert len(clock.times) == case.decode + 1, "nothing may end an answer early; see `never_ending`"
    return clock.times[0] - started, clock.times[-1] - clock.times[0]


def prompts(model: Any, case: Case) -> Tensor:
    """Random ids [batch, prefill] on the model's device, the same every time."""
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (case.batch, case.prefill), generator=random).to(model.device)


def never_ending(model: Any) -> None:
    """Let `generate` be greedy and end an answer at its length only."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)


@torch.no_grad()
def gpu_step_s(model: Any, case: Case) -> float | None:
    """The GPU's own time of a step: those of the generation before again, none of which waits for the host.

    None where steps are not captured by the device.
    """
    engine = getattr(model, "awq_rt_engine", None)
    session = None if engine is None else engine.session
    if session is None or not (session.graphs.on_device and session.graphs.capturing):
        return None
    session.positions[: case.batch] = case.prefill
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(case.decode):
        session.advance()
    end.record()
    end.synchronize()
    while session.outstanding:
        session.receive()
    return float(start.elapsed_time(end)) / 1e3 / case.decode


@torch.no_grad()
def engine_first_s(model: Any, case: Case, repeats: int) -> float | None:
    """Seconds from ids to first tokens on the host, without what transformers and the engine prepare before.

    The median of `repeats`; None where the model has no session of a generation before.
    """
    engine = getattr(model, "awq_rt_engine", None)
    session = None if engine is None else engine.session
    if session is None:
        return None
    ids, times = prompts(model, case), []
    for _ in range(repeats):
        synchronize(model.device)
        started = time.perf_counter()
        session.start(ids, [case.prefill] * case.batch, Sampler([], draw=False))
        session.receive()
        times.append(time.perf_counter() - started)
    return median(times)


class Memory:
    """Memory that was taken since this was made: of the device, whoever took it, or on a CPU of this process."""

    def __init__(self, device: torch.device):
        self.device = device
        self.release()
        self._before = self._taken()

    def taken(self) -> int:
        """Bytes, with what torch keeps for itself: it gives nothing back by itself, so this is the peak so far."""
        return self._taken() - self._before

    def release(self) -> None:
        """Give back what torch keeps, so that the next peak is its own."""
        if self.device.type != "cpu":
            torch.cuda.empty_cache()

    def _taken(self) -> int:
        if self.device.type == "cpu":
            return resident_bytes()
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free


def held_bytes(model: Any) -> int:
    """Bytes of the model's weights, and of the keys and values of the generation before; each once, however often it
    is seen."""
    tensors = [*model.parameters(), *model.buffers()]
    engine = getattr(model, "awq_rt_engine", None)
    if engine is not None and engine.session is not None:
        tensors += [*engine.session.cache.keys, *engine.session.cache.values]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_bytes() -> int:
    """Of this process; 0 where the system does not say (it is not Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
