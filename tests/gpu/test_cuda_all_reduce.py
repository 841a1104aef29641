"""The sum between GPUs, tried on one: two processes' parts are two streams, each with an inbox of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from awq_rt.parallel.inbox import MOST_ROWS, Inbox
from awq_rt_cuda.fused import all_reduce_add_rms_norm

GPUS = 2
EPS = 1e-5


def groups_of(row_bytes: int) -> list[Any]:
    """What the operator asks of each process's `Group`."""
    memory = [torch.zeros(2 * GPUS * MOST_ROWS * 2 * row_bytes, dtype=torch.uint8, device="cuda") for _ in range(GPUS)]
    pointers = torch.tensor([part.data_ptr() for part in memory], device="cuda")
    inboxes = [Inbox(row_bytes, part, pointers) for part in memory]
    return [SimpleNamespace(rank=rank, size=GPUS, inbox=inbox) for rank, inbox in enumerate(inboxes)]


def summed(groups: list[Any], parts: list[Tensor], residual: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(norm, residual) of each process, all computed at the same time."""
    streams = [torch.cuda.Stream() for _ in groups]
    residuals = [residual.clone() for _ in groups]
    torch.cuda.synchronize()
    found = []
    for group, stream, part, own in zip(groups, streams, parts, residuals, strict=True):
        with torch.cuda.stream(stream):
            found.append((all_reduce_add_rms_norm(part.clone(), own, weight, EPS, group), own))
    torch.cuda.synchronize()
    return found


@pytest.mark.parametrize(("hidden", "dtype"), [(8192, torch.float16), (4096, torch.bfloat16), (1000, torch.float16)])
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS])
def test_every_process_gets_the_same_sum_and_its_norm(hidden: int, dtype: torch.dtype, rows: int) -> None:
    groups = groups_of(hidden * dtype.itemsize)
    unit = torch.finfo(dtype).eps / 2
    weight = torch.rand(hidden, device="cuda") + 0.5
    for _ in range(5):  # both halves of an inbox are used again
        parts = [torch.randn(rows, hidden, device="cuda").to(dtype) for _ in groups]
        residual = torch.randn(rows, hidden, device="cuda").to(dtype)
        exact = residual.double() + sum(part.double() for part in parts)
        (first, first_residual), (second, second_residual) = summed(groups, parts, residual, weight)
        assert torch.equal(first, second)
        assert torch.equal(first_residual, second_residual)
        # Two additions in float32 of numbers below 16, and one rounding to the dtype.
        assert bool(((first_residual.double() - exact).abs() <= unit * exact.abs() + 2 * 16 * 2**-24).all())
        wide = first_residual.double()
        norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()
        # One rounding to the dtype; the factor's own error in float32 is far below a hundredth of it.
        assert bool(((first.double() - norm).abs() <= 1.01 * unit * norm.abs() + 2**-24).all())


def test_a_part_that_is_missing_is_outside_the_bound() -> None:
    groups = groups_of(8192)
    parts = [torch.ones(1, 4096, dtype=torch.float16, device="cuda") for _ in groups]
    residual, weight = torch.zeros_like(parts[0]), torch.ones(4096, device="cuda")
    ((_, found), _) = summed(groups, parts, residual, weight)
    assert bool((found == GPUS).all())


def test_a_graph_holds_the_sum() -> None:
    groups = groups_of(8192)
    parts = [torch.full((1, 4096), 1.0 + rank, dtype=torch.float16, device="cuda") for rank in range(GPUS)]
    weight = torch.ones(4096, device="cuda")
    residuals = [torch.zeros_like(part) for part in parts]
    summed(groups, parts, residuals[0], weight)  # compiled and loaded
    graphs = []
    for group, part, own in zip(groups, parts, residuals, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_reduce_add_rms_norm(part, own, weight, EPS, group)
        graphs.append((graph, torch.cuda.Stream()))
    for _ in range(4):
        for graph, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(bool((own == 4 * 3.0).all()) for own in residuals)
