"""Runs kernels beside the reference, in a process that may hang or die, and answers after each one.

Small shapes that hurt are compared in every element. The large one, which is timed, is compared in a few columns over
its whole depth: float64 for all of it would take seconds on a small machine. The reference is computed on the host.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..backend import Backend, LinearSpec, Packed
from ..bench.bandwidth import read_bandwidth, synchronize
from ..devices import Device
from ..errors import NoBackend
from ..examination import answer
from ..selftest import random_weight, worst_excess
from ..testing.cases import hurtful_weight
from ..testing.conformance import ROWS, SELF_TEST_SHAPES
from ..weights import AwqWeight

HOST = torch.device("cpu")
KINDS = ("random", "extreme zeros", "symmetric")
TIMED_SHAPES = {"cpu": (2048, 2048, 128), "cuda": (4096, 22016, 128)}
"""(K, N, G) by device type. On a GPU gate and up of Llama 2 7B: the launch counts for little."""

COLD_BYTES = 128 << 20
"""So many bytes of weights are gone through in turn, that no cache holds them, where a round is over in `TIMED_S`."""

TIMED_S = 0.05
"""For as long a kernel is repeated; the fastest round counts."""


def main() -> None:
    """Answers `{"starts": n}` before, and `{"index": n, ...facts}` after each job of the list on standard input."""
    for job in json.load(sys.stdin):
        answer({"starts": job["index"]})
        device = Device(**job["device"])
        try:
            found = run(registry.get(job["backend"]), device, job["kernel"], getattr(torch, job["dtype"]))
        except Exception as error:  # a plugin may raise anything; here that is its result
            answer({"index": job["index"], "status": "raised", "reason": _told(error)})
            if device.type != "cpu":
                return  # a context that saw an illegal access fails whatever comes after; the rest gets a new one
        else:
            answer({"index": job["index"], **found})


def _told(error: Exception) -> str:
    """The first line of what was raised, and where: a GPU's own message fills a page."""
    said = (str(error).splitlines() or [""])[0]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {said} (in {last.name}, {Path(last.filename).name}:{last.lineno})"


def run(backend: Backend, device: Device, kernel: str, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of a `KernelRun`: how far off, how fast. Raises whatever the backend does, `NoBackend` where it
    refuses everything that is tried.
    """
    target = torch.device(device.type) if device.type == "cpu" else torch.device(device.type, device.index)
    scale_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    worst, tried = 0.0, 0
    for shape in SELF_TEST_SHAPES if device.type == "cpu" else SELF_TEST_SHAPES[1:]:  # each may have to be compiled
        for kind in KINDS:
            weight = hurtful_weight(kind, *shape, scale_dtype=scale_dtype, bias=kind != "symmetric")
            if (packed := _packed(backend, weight, dtype, kernel, device, target)) is not None:
                worst, tried = max(worst, worst_excess(backend, packed, weight, dtype, ROWS, HOST)), tried + 1
    shape = TIMED_SHAPES.get(device.type, TIMED_SHAPES["cuda"])
    timed = random_weight(LinearSpec(*shape, dtype, scale_dtype=scale_dtype), target)
    packed = _packed(backend, timed, dtype, kernel, device, target)
    facts: dict[str, Any] = {}
    if packed is not None:
        worst, tried = max(worst, worst_excess(backend, packed, timed, dtype, ROWS, HOST)), tried + 1
        latency_s = _latency_s(backend, packed, dtype, timed.in_features, target)
        nbytes = sum(tensor.nbytes for tensor in packed.tensors)
        facts = {
            "latency_us": round(1e6 * latency_s, 2),
            "bandwidth_share": round(nbytes / latency_s / _bandwidth(target), 4),
            "shape": [timed.in_features, timed.out_features],
        }
    if not tried:
        raise NoBackend(f"backend {backend.name!r} refuses every linear that is tried with kernel={kernel!r}, {dtype}")
    if not math.isfinite(worst):
        return {"status": "not finite", "reason": "its result holds NaN or infinity", **facts}
    reason = "" if worst <= 1 else f"its largest error is {worst:.3g} times the bound"
    return {"status": "wrong" if reason else "right", "reason": reason, "excess": round(worst, 4), **facts}


def _packed(
    backend: Backend, weight: AwqWeight, dtype: torch.dtype, kernel: str, device: Device, target: torch.device
) -> Packed | None:
    spec = LinearSpec.of(weight, dtype, kernel)
    return None if backend.supports(spec, device) else backend.pack(weight, spec, target)


def _latency_s(backend: Backend, packed: Packed, dtype: torch.dtype, k: int, target: torch.device) -> float:
    """Seconds of one product of a vector with a weight that no cache holds."""
    x = torch.randn(1, k, device=target).to(dtype)
    # Of three: what the first call prepares would count, the weights be too few, and a cache hold them.
    once_s = min(_seconds(lambda: backend.linear(x, packed), target) for _ in range(3))
    nbytes = sum(tensor.nbytes for tensor in packed.tensors)
    copies = int(min(COLD_BYTES / nbytes, max(2.0, TIMED_S / once_s)))
    weights = [packed, *(Packed(packed.layout, tuple(t.clone() for t in packed.tensors)) for _ in range(copies - 1))]

    def round_of_all() -> None:
        for weight in weights:
            backend.linear(x, weight)

    go = round_of_all if target.type == "cpu" else _captured(round_of_all, target)
    best, until = _seconds(go, target), time.perf_counter() + TIMED_S
    while time.perf_counter() < until:
        best = min(best, _seconds(go, target))
    return best / len(weights)


def _seconds(work: Callable[[], object], target: torch.device) -> float:
    synchronize(target)
    started = time.perf_counter()
    work()
    synchronize(target)
    return time.perf_counter() - started


def _captured(work: Callable[[], None], target: torch.device) -> Callable[[], None]:
    """`work` as a graph, so that the host's part is not timed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(target):
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            work()
    return graph.replay


@functools.cache
def _bandwidth(target: torch.device) -> float:
    return read_bandwidth(target, repeats=3)
