"""How long `awq_rt.load` takes, beside reading the same files to the device."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch

import awq_rt

from ..checkpoint.files import locate
from .bandwidth import synchronize
from .report import LoadTime

CHUNK_BYTES = 64 << 20


def load_time(name: str, path: Path, device: torch.device, options: dict[str, Any]) -> LoadTime:
    """The second load of `name`, which is at `path`: the first fills the page cache and the compile cache."""
    for _ in range(2):
        gc.collect()
        synchronize(device)
        started = time.perf_counter()
        model = awq_rt.load(path, device=device, **options)
        synchronize(device)
        seconds = time.perf_counter() - started
        del model
    files = locate(path).weights
    started = time.perf_counter()
    for file in files:
        _read(file, device)
    synchronize(device)
    return LoadTime(name, seconds, time.perf_counter() - started, sum(file.stat().st_size for file in files))


def _read(file: Path, device: torch.device) -> None:
    """Every byte of `file` to `device`, through two buffers in turn: one is filled while the other is copied."""
    pinned = device.type != "cpu"
    buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    there = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    copied: list[torch.cuda.Event | None] = [None, None]
    with file.open("rb", buffering=0) as stream:
        turn = 0
        while True:
            if (event := copied[turn]) is not None:
                event.synchronize()
            count = stream.readinto(buffers[turn].numpy().data)
            if not count:
                return
            there[turn][:count].copy_(buffers[turn][:count], non_blocking=True)
            if pinned:
                event = copied[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            turn = 1 - turn
