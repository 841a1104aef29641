"""Which linear is cut how: transformers' plan names them, the sizes of heads and groups say where a cut may be."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import CannotShard
from ..models.placement import Experts, Placement

COLUMNS, ROWS = "colwise", "rowwise"
"""transformers' words for a linear whose out_features are cut, and one whose in_features are."""

UNCUT = ("replicated_with_grad_allreduce",)
"""Its words for what every process has."""

WORD = 8
"""Columns are cut between words of so many 4-bit codes."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a linear that one process has: ranges of its `columns` (out_features), or of its `rows`."""

    columns: tuple[slice, ...] = ()
    rows: slice | None = None


@dataclass(slots=True)
class Plan:
    """`cuts` by the linear's name in the checkpoint; the rest is whole. `summed` are modules with cut rows."""

    cuts: dict[str, Cut] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)


def plan(model: Any, placement: Placement, checkpoint: Checkpoint, rank: int, size: int) -> Plan:
    """The parts of process `rank` of `size`.

    Blocks that need not be equal are cut as evenly as heads and groups allow. Raises `CannotShard` where there are more
    processes than parts, NotImplementedError for architectures that transformers cuts in other ways, or not at all.
    """
    found = Plan()
    limits: dict[str, int] = {}
    for path, block in _blocks(model, placement).items():
        limits[path] = _cut_block(found, model, path, block, placement, checkpoint, rank, size)
    for path, experts in placement.experts.items():
        limits[path] = _cut_experts(found, path, experts, checkpoint, rank, size)
    if not limits:
        raise NotImplementedError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}; use device_map='auto', which places "
            "whole layers on several GPUs"
        )
    tightest = min(limits, key=limits.__getitem__)
    if limits[tightest] < size:
        raise CannotShard(
            f"{tightest} can be cut into {limits[tightest]} parts at most, between its heads and between groups of its "
            f"weights, and there are {size} processes; start 1 to {limits[tightest]}"
        )
    return found


@dataclass(slots=True)
class _Block:
    """Linears of one module: paths of those with cut columns, and of the one that reads what they give."""

    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)


def _blocks(model: Any, placement: Placement) -> dict[str, _Block]:
    """Blocks by module, those of which every linear is packed: where one is dense, all processes compute the block."""
    styles: Mapping[str, str] = model.tp_plan or {}
    blocks: dict[str, _Block] = defaultdict(_Block)
    whole: set[str] = set()
    for path, _ in model.named_modules():
        style = styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        parent = path.rpartition(".")[0]
        if style is None or not parent or style in UNCUT:
            continue
        if style not in (COLUMNS, ROWS):
            if path in placement.linears:
                raise NotImplementedError(
                    f"transformers cuts {path} by {style!r}, which awq_rt does not for packed linears; "
                    "use device_map='auto', which places whole layers on several GPUs"
                )
            continue
        if path not in placement.linears:
            whole.add(parent)
            continue
        (blocks[parent].columns if style == COLUMNS else blocks[parent].rows).append(path)
    return {path: block for path, block in blocks.items() if path not in whole}


def _cut_block(
    found: Plan,
    model: Any,
    path: str,
    block: _Block,
    placement: Placement,
    checkpoint: Checkpoint,
    rank: int,
    size: int,
) -> int:
    """Cut one block; returns into how many parts it could be cut."""
    if len(block.rows) != 1 or not block.columns:
        raise NotImplementedError(f"{path} has {len(block.rows)} linears with cut rows in transformers' plan, not one")
    last = checkpoint.linears[placement.linears[block.rows[0]]]
    head_dim = getattr(model.get_submodule(path), "head_dim", None) or 1
    ratios = {}
    unit = last.group_size
    for linear in block.columns:
        out_features = checkpoint.linears[placement.linears[linear]].out_features
        ratio, odd = divmod(last.in_features, out_features)
        if odd:
            raise NotImplementedError(
                f"{linear} gives {out_features} features where {block.rows[0]} reads {last.in_features}: "
                "awq_rt does not know which belong together; use device_map='auto'"
            )
        ratios[linear] = ratio
        unit = math.lcm(unit, ratio * math.lcm(head_dim, WORD))
    units, odd = divmod(last.in_features, unit)
    if odd:
        return 1
    first, end = unit * (units * rank // size), unit * (units * (rank + 1) // size)
    for linear, ratio in ratios.items():
        found.cuts[placement.linears[linear]] = Cut(columns=(slice(first // ratio, end // ratio),))
    found.cuts[placement.linears[block.rows[0]]] = Cut(rows=slice(first, end))
    found.summed.add(block.rows[0])
    return units


def _cut_experts(found: Plan, path: str, experts: Experts, checkpoint: Checkpoint, rank: int, size: int) -> int:
    """Cut every expert's intermediate features; returns into how many parts they could be cut."""
    fewest = size
    for number, (down,) in experts.down.items():
        last = checkpoint.linears[down]
        unit = math.lcm(last.group_size, WORD)
        units, odd = divmod(last.in_features, unit)
        if odd:
            return 1
        fewest = min(fewest, units)
        first, end = unit * (units * rank // size), unit * (units * (rank + 1) // size)
        found.cuts[down] = Cut(rows=slice(first, end))
        names = experts.gate_up[number]
        starts = [0, last.in_features] if len(names) == 1 else [0]  # where gate begins, and up in a linear of both
        for name in names:
            found.cuts[name] = Cut(columns=tuple(slice(start + first, start + end) for start in starts))
    found.summed.add(path)
    return fewest
