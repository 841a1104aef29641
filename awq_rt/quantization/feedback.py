"""Rounding with error feedback: each column's rounding error is compensated by the columns not yet rounded.

The grid of every group is given, so the result is an AWQ weight like any other; only the codes differ from the
nearest ones. With H = E[x x^T] and U the upper Cholesky factor of its inverse, rounding column k with error e_k moves
column j > k by -(e_k / U_kk) U_kj, which is the least-squares answer. Source: Frantar et al., "GPTQ", 2022, section
3.3; Frantar and Alistarh, "Optimal Brain Compression", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grid import Grid, grouped

BLOCK = 64
"""Columns whose errors are carried on at once by a matrix product."""


def round_with_feedback(weight: Tensor, moments: Tensor, chosen: Grid, *, damping: float) -> Tensor:
    """Codes float32 [N, K/G, G] of `weight` [N, K] for `moments` [K, K] and the grid `chosen` [N, K/G, 1].

    Columns go from the largest second moment to the smallest: those that matter most are rounded while many are left
    to compensate. `damping` enlarges the diagonal of `moments` by this share, which shrinks all correlations by
    1 / (1 + damping): part of what a text shows of them is chance.
    """
    size = weight.shape[1] // chosen.scales.shape[1]
    order = moments.diagonal().argsort(descending=True, stable=True)
    shares = _compensation(moments, order, damping)
    columns = weight.T[order]  # [K, N]: a column of the weight is contiguous
    scales, zeros = (field.squeeze(-1).T for field in (chosen.scales, chosen.zeros))
    grids = torch.stack([scales, -zeros, 15 - zeros])  # [3, K/G, N]
    group = order // size
    on_gpu = weight.device.type == "cuda" and len(columns) >= BLOCK
    captured = _Captured(columns[:BLOCK]) if on_gpu else None
    steps = torch.empty_like(columns)  # codes less zeros
    for start in range(0, len(columns), BLOCK):
        here = slice(start, min(start + BLOCK, len(columns)))
        block, local = columns[here], shares[here, here]
        if captured is not None and len(block) == BLOCK:
            done, errors = captured(block, grids, group[here], local)
            steps[here] = done
        else:
            errors = torch.empty_like(block)
            own = [grids[:, number] for number in group[here].tolist()]
            _round_columns(block, own, local, steps[here], errors)
        columns[here.stop :].addmm_(shares[here, here.stop :].T, errors, alpha=-1)
    placed = torch.empty_like(steps)
    placed[order] = steps
    return grouped(placed.T.contiguous(), size) + chosen.zeros


def _round_columns(columns: Tensor, grids: Sequence[Tensor], local: Tensor, steps: Tensor, errors: Tensor) -> None:
    """Round `columns` [B, N] in turn, each error made up for by those after it, with the shares `local` [B, B].

    `grids` are, for each column, its scales and the lowest and highest steps [3, N]. Fills `steps` and `errors` [B, N];
    `columns` is used up.
    """
    read = zip(columns.unbind(), grids, steps.unbind(), errors.unbind(), strict=True)
    for k, (column, grid, step, error) in enumerate(read):
        scale, low, high = grid.unbind()
        torch.div(column, scale, out=step).round_().clamp_(low, high)
        torch.addcmul(column, step, scale, value=-1, out=error)
        columns[k + 1 :].addr_(local[k, k + 1 :], error, alpha=-1)


class _Captured:
    """`_round_columns` for blocks of one shape as a CUDA graph: its kernels take less time than launching each."""

    def __init__(self, columns: Tensor):
        self._columns, self._steps, self._errors = (torch.ones_like(columns) for _ in range(3))
        self._grids = columns.new_ones(3, *columns.shape)
        self._local = columns.new_zeros(len(columns), len(columns))
        self._graph = torch.cuda.CUDAGraph()
        self._run()  # what a kernel sets up when it first runs cannot be captured
        current = torch.cuda.current_stream(columns.device)
        stream = torch.cuda.Stream(columns.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._graph.capture_begin()
            self._run()
            self._graph.capture_end()
        current.wait_stream(stream)

    def __call__(self, columns: Tensor, grids: Tensor, group: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """(steps, errors) [B, N], until the next call. `grids` [3, K/G, N], `group` int64 [B] each column's in them."""
        self._columns.copy_(columns)
        self._local.copy_(local)
        torch.index_select(grids, 1, group, out=self._grids)
        self._graph.replay()
        return self._steps, self._errors

    def _run(self) -> None:
        _round_columns(self._columns, self._grids.unbind(1), self._local, self._steps, self._errors)


def _compensation(moments: Tensor, order: Tensor, damping: float) -> Tensor:
    """[K, K], upper triangular: row k holds how much of column k's error each later column makes up for, less its sign.

    Columns are in `order`. U / diag(U), U being the upper Cholesky factor of the inverse of `moments`, damped (more
    where that is not definite). Turned end for end, `moments` has the lower factor L, and U is the inverse of L turned
    back: nothing is inverted twice. Four matrices of this size are held at most.
    """
    diagonal = moments.diagonal()
    # A channel that was never active has no second moment, and still needs one that is not 0.
    floor = (1e-6 * diagonal.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    turned = order.flip(0)
    while True:
        damped = moments[turned[:, None], turned]
        damped.diagonal().copy_(diagonal.clamp_min(floor)[turned] * (1 + damping) + floor)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed):
            break
        damping = max(10 * damping, 1e-6)
    upper = torch.linalg.solve_triangular(lower, torch.eye(len(moments), device=moments.device), upper=False)
    del lower
    shares: Tensor = upper.flip(0, 1).div_(upper.diagonal().flip(0)[:, None])
    return shares
