"""One run: the models that were asked for, one after another, each through all cases."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import awq_rt

from ..checkpoint import Checkpoint
from ..errors import OutOfMemory
from .dense import dense_model
from .limit import position_bytes, prefill_flops, step_bytes
from .measure import Case, Memory, Speed, held_bytes, measured, never_ending
from .report import Result, Row

FP16_STEPS = 16
"""Steps that the float16 model is timed for at most: it runs eagerly, one step as long as the next."""

Progress = Callable[[str], None]
"""Told what is done next, `Plan.steps` times a model."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. `fused` holds True, False or both; `options` go to `awq_rt.load`."""

    cases: tuple[Case, ...]
    fused: tuple[bool, ...]
    fp16: bool
    repeats: int
    options: dict[str, Any]

    @property
    def steps(self) -> int:
        """How often `Progress` is told something of one model."""
        return (len(self.fused) + self.fp16) * (1 + len(self.cases))


def run(
    name: str, plan: Plan, checkpoint: Checkpoint, device: torch.device, result: Result, progress: Progress
) -> None:
    """Measure all of `plan` on the model `name` and append the rows to `result`.

    What does not fit into memory is a row that says so.
    """
    memory = Memory(device)
    dense: dict[Case, Speed] = {}
    if plan.fp16:
        dense = _dense_speeds(name, plan, checkpoint, device, memory, result, progress)
    for fused in plan.fused:
        progress(f"loading {name}, {'fused' if fused else 'unfused'}")
        model = awq_rt.load(checkpoint, device=device, fuse="auto" if fused else False, **plan.options)
        never_ending(model)
        if fused and model.fusion.decoder is None:
            result.notes.append(f"{name} is {model.fusion}; its rows are unfused")
        for case in plan.cases:
            progress(f"batch {case.batch}, prefill {case.prefill}, {'fused' if fused else 'unfused'}")
            row = Row(name, case.batch, case.prefill, case.decode, model.fusion.decoder is not None)
            memory.release()
            try:
                speed = measured(model, case, plan.repeats)
            except (torch.OutOfMemoryError, OutOfMemory) as error:
                result.rows.append(replace(row, failure=_what_fits(error, model, device, case)))
            else:
                result.rows.append(_filled(row, case, speed, dense.get(case), model, result, memory))
        del model
        _collect(memory)


def _filled(row: Row, case: Case, speed: Speed, dense: Speed | None, model: Any, result: Result, memory: Memory) -> Row:
    least_bytes = step_bytes(model, case.batch, case.prefill, case.decode)
    tokens, taken = case.batch * case.prefill, memory.taken()
    operations = None if result.matmul_tflops is None else prefill_flops(model, case.batch, case.prefill)
    return replace(
        row,
        prefill_tps=tokens / speed.first_s,
        decode_tps=case.batch / speed.step_s,
        memory_gb=taken / 1e9,
        beside_gb=(taken - held_bytes(model)) / 1e9 if memory.device.type != "cpu" else None,
        share_of_limit=None if least_bytes is None else least_bytes / (result.read_tbps * 1e12) / speed.step_s,
        gpu_idle_share=speed.idle_share,
        engine_prefill_tps=None if speed.engine_first_s is None else tokens / speed.engine_first_s,
        share_of_matmul=_share(operations, result.matmul_tflops, speed.first_s),
        fp16_prefill_tps=None if dense is None else tokens / dense.first_s,
        fp16_decode_tps=None if dense is None else case.batch / dense.step_s,
    )


def _share(operations: float | None, tflops: float | None, seconds: float) -> float | None:
    return None if operations is None or tflops is None else operations / seconds / (tflops * 1e12)


def _dense_speeds(
    name: str,
    plan: Plan,
    checkpoint: Checkpoint,
    device: torch.device,
    memory: Memory,
    result: Result,
    progress: Progress,
) -> dict[Case, Speed]:
    """Of the float16 model; cases that do not fit are missing, with a note."""
    speeds: dict[Case, Speed] = {}
    progress(f"making {name} in float16")
    try:
        model = dense_model(checkpoint, device, plan.options.get("trust_remote_code", False))
    except torch.OutOfMemoryError:
        result.notes.append(f"{name} in float16 does not fit into the memory of {device}")
        return speeds
    never_ending(model)
    for case in plan.cases:
        progress(f"batch {case.batch}, prefill {case.prefill}, float16")
        memory.release()
        try:
            speeds[case] = measured(model, replace(case, decode=min(case.decode, FP16_STEPS)), plan.repeats)
        except torch.OutOfMemoryError:
            result.notes.append(f"{name}, batch {case.batch}, prefill {case.prefill} does not fit in float16")
    del model
    _collect(memory)
    return speeds


def _what_fits(error: Exception, model: Any, device: torch.device, case: Case) -> str:
    """Why there was too little memory, and how much would suffice."""
    if isinstance(error, OutOfMemory):
        return str(error)
    engine = getattr(model, "awq_rt_engine", None)
    if engine is not None:
        del engine.session
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    positions = free // position_bytes(model)
    return (
        f"out of memory; beside the weights {free / 1e9:.1f} GB are free, for activations and for keys and values of "
        f"fewer than {positions} positions in all; this case has {case.batch * (case.prefill + case.decode)}"
    )


def _collect(memory: Memory) -> None:
    gc.collect()
    memory.release()
