"""Rounding with error feedback: each column's rounding error is compensated by the columns not yet rounded.

The grid of every group is given, so the result is an AWQ weight like any other; only the codes differ from the
nearest ones. With H = E[x x^T] and U the upper Cholesky factor of its inverse, rounding column k with error e_k moves
column j > k by -(e_k / U_kk) U_kj, which is the least-squares answer. Source: Frantar et al., "GPTQ", 2022, section
3.3; Frantar and Alistarh, "Optimal Brain Compression", 2022.
"""

from __future__ import annotations

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
    shares = _compensation(moments[order][:, order], damping)
    columns = weight.T[order]  # [K, N]: a column of the weight is contiguous
    scales, zeros = (field.squeeze(-1).T.contiguous() for field in (chosen.scales, chosen.zeros))  # [K/G, N]
    grids = list(zip(scales.unbind(), (-zeros).unbind(), (15 - zeros).unbind(), strict=True))
    group = (order // size).tolist()
    steps = torch.empty_like(columns)  # codes less zeros
    for start in range(0, len(columns), BLOCK):
        here = slice(start, min(start + BLOCK, len(columns)))
        errors = torch.empty_like(columns[here])
        local, ahead = shares[here, here], columns[here.stop :]
        read = (columns[here].unbind(), steps[here].unbind(), errors.unbind(), group[here])
        for k, (column, step, error, number) in enumerate(zip(*read, strict=True)):
            scale, low, high = grids[number]
            torch.div(column, scale, out=step).round_().clamp_(low, high)
            torch.addcmul(column, step, scale, value=-1, out=error)
            columns[start + k + 1 : here.stop].addr_(local[k, k + 1 :], error, alpha=-1)
        ahead.addmm_(shares[here, here.stop :].T, errors, alpha=-1)
    placed = torch.empty_like(steps)
    placed[order] = steps
    return grouped(placed.T.contiguous(), size) + chosen.zeros


def _compensation(moments: Tensor, damping: float) -> Tensor:
    """[K, K], upper triangular: row k holds how much of column k's error each later column makes up for, less its sign.

    U / diag(U), U being the upper Cholesky factor of the inverse of `moments`, damped (more where that is not
    definite). Turned end for end, `moments` has the lower factor L, and U is the inverse of L turned back: nothing is
    inverted twice.
    """
    diagonal = moments.diagonal()
    # A channel that was never active has no second moment, and still needs one that is not 0.
    floor = (1e-6 * diagonal.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    diagonal = diagonal.clamp_min(floor)
    identity = torch.eye(len(moments), device=moments.device)
    while True:
        lower, failed = torch.linalg.cholesky_ex((moments + torch.diag(damping * diagonal + floor)).flip(0, 1))
        if not int(failed):
            upper: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            return upper / upper.diagonal()[:, None]
        damping = max(10 * damping, 1e-6)
