"""One decoder block in 4 bits: scales, then ranges, then codes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import LayoutCannotHold
from ..formats import WRITABLE, LinearShape
from ..weights import AwqWeight
from .feedback import round_with_feedback
from .grid import Grid, grouped, to_weight
from .groups import ScalingGroup, Structure, apply_scales
from .moments import Moments, observe
from .ranges import search_ranges, whole_ranges
from .report import BlockReport, GroupReport, LinearReport
from .scaling import Consumer, quadratic, search_scales
from .settings import Settings
from .source import as_stored
from .streaming import Block, Call

MOMENTS_BYTES = 2 << 30
"""Second moments of experts held at a time. A mixture with more of them is run through once for each part."""

REPORTED_ROWS = 64
"""Rows of a linear, evenly spaced, from which the losses in the report are computed."""

ROUNDED_ROWS = 16384
"""Rows that are rounded at once: q, k and v together, but not all experts of a mixture."""


@dataclass(frozen=True, slots=True)
class Packable:
    """Which linears of a block will be packed: path -> shape; and those that will not: name -> reason."""

    shapes: dict[str, LinearShape] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)


def packable(block: Block, settings: Settings) -> Packable:
    """Every linear of `block`, sorted by whether `settings` ask for it and the layout holds its shape."""
    found = Packable(dense=dict(block.dense))
    for path, linear in block.linears.items():
        names = block.names[f"{path}.weight"]
        full = names[0].removesuffix(".weight")
        size = linear.in_features if settings.group_size == -1 else settings.group_size
        shape = LinearShape(linear.in_features, linear.out_features, size)
        if wanted := next((entry for entry in settings.skip if entry in full), None):
            found.dense[full] = f"its name holds {wanted!r}, which is to be skipped"
        elif shape.in_features % size:
            found.dense[full] = f"groups of {size} do not divide its {shape.in_features} inputs"
        else:
            try:
                WRITABLE[settings.layout].check(LinearShape(shape.in_features, shape.out_features // len(names), size))
                found.shapes[path] = shape
            except LayoutCannotHold as error:
                found.dense[full] = str(error.args[0])
    return found


def round_block(block: Block, chosen: Packable, settings: Settings) -> tuple[dict[str, AwqWeight], BlockReport]:
    """Plain rounding to nearest of the loaded block, for comparison with the search."""
    started = time.perf_counter()
    weights, linears = {}, []
    for path, linear in _chosen(block, chosen):
        scheme = settings.scheme(linear.in_features)
        ranges = whole_ranges(linear.weight, scheme)
        codes = ranges.grid.codes(grouped(linear.weight, scheme.group_size))
        weights[path] = to_weight(codes, ranges.grid, scheme, _bias(linear, settings))
        linears.append(LinearReport(f"{block.path}.{path}", None, None, 0.0, 0))
    seconds = time.perf_counter() - started
    return weights, BlockReport(block.path, seconds, (), tuple(linears), chosen.dense, ())


def search_block(
    block: Block, chosen: Packable, structure: Structure, call: Call, hidden: Tensor, settings: Settings
) -> tuple[dict[str, AwqWeight], BlockReport]:
    """The loaded block's linears in 4 bits by the AWQ search on `hidden` [samples, length, hidden].

    The block's other weights are left smoothed.
    """
    started = time.perf_counter()
    weights: dict[str, AwqWeight] = {}
    groups, linears, notes = [], [], []
    for part in _parts(block, chosen, structure):
        watched = {site: structure.observed[site] for site in part}
        observed = observe(block.module, call, hidden, watched, block.path, normed=structure.normed)
        _release(hidden.device)
        scant = _replace_scant(observed, settings)
        mine = {path: observed[structure.sites[path]] for path in chosen.shapes if structure.sites[path] in observed}
        for group in structure.groups:
            consumers = [path for path in group.consumers if path in mine]
            if consumers and not any(structure.sites[path] in scant for path in consumers):
                groups.append(_scale(block, group, consumers, mine, settings))
        for site in part:
            for together in _together([entry for entry in _chosen(block, chosen) if structure.sites[entry[0]] == site]):
                found, told = _round(block, together, mine[together[0][0]], settings)
                weights |= found
                linears += told
                _release(hidden.device)
        notes += [
            f"{block.path}.{site} saw {tokens} tokens, too few to search with; it was rounded without them"
            for site, tokens in scant.items()
        ]
    scaled = {path for group in structure.groups for path in group.consumers}
    unscaled = tuple(f"{block.path}.{path}" for path in chosen.shapes if path not in scaled)
    seconds = time.perf_counter() - started
    return weights, BlockReport(
        block.path, seconds, tuple(groups), tuple(linears), chosen.dense, unscaled, tuple(notes)
    )


def _release(device: torch.device) -> None:
    """Give back device memory that is cached: sites differ in size, so what one leaves would not serve the next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _chosen(block: Block, chosen: Packable) -> list[tuple[str, nn.Linear]]:
    linears = block.linears
    return [(path, linears[path]) for path in chosen.shapes]


def _together(linears: list[tuple[str, nn.Linear]]) -> Iterator[list[tuple[str, nn.Linear]]]:
    """Linears with the same input, as many at a time as have some `ROUNDED_ROWS` rows."""
    pending: list[tuple[str, nn.Linear]] = []
    for entry in linears:
        pending.append(entry)
        if sum(linear.out_features for _, linear in pending) >= ROUNDED_ROWS:
            yield pending
            pending = []
    if pending:
        yield pending


def _parts(block: Block, chosen: Packable, structure: Structure) -> list[list[str]]:
    """Sites whose moments are held together: experts' second linears first, a few at a time, then all others.

    Nothing that is done to an expert's second linear depends on the others, so it can be finished before them.
    """
    wanted = list(dict.fromkeys(structure.sites[path] for path in chosen.shapes))
    parts: list[list[str]] = []
    size = MOMENTS_BYTES
    for site in wanted:
        if site in structure.expert_downs:
            needed = 2 * 4 * chosen.shapes[site].in_features ** 2  # one for each half of the text
            if size + needed > MOMENTS_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(site)
            size += needed
    return [*parts, [site for site in wanted if site not in structure.expert_downs]]


def _replace_scant(observed: dict[str, Moments], settings: Settings) -> dict[str, int]:
    """Sites that saw fewer tokens than a group has channels -> how many; their moments become those of white noise.

    So few tokens leave every group's block of the second moments singular: a search would fit them and nothing else.
    """
    scant = {}
    for site, moments in observed.items():
        size = len(moments.mean_abs)
        if moments.tokens < min(size, settings.scheme(size).group_size):
            scant[site] = moments.tokens
            device = moments.second.device
            observed[site] = Moments(torch.eye(size, device=device), torch.ones(size, device=device), moments.tokens)
    return scant


def _scale(
    block: Block, group: ScalingGroup, consumers: list[str], moments: dict[str, Moments], settings: Settings
) -> GroupReport:
    """Search the group's scales, apply them to the block and to `moments`."""
    linears = [block.module.get_submodule(path) for path in consumers]
    first = moments[consumers[0]]
    entries = [
        Consumer(linear.weight, moments[path].second, moments[path].tokens / max(1, first.tokens))  # type: ignore[arg-type]
        for path, linear in zip(consumers, linears, strict=True)
    ]
    scheme = settings.scheme(len(first.mean_abs))
    found = search_scales(entries, first.mean_abs, group.channels, scheme, settings.search)
    apply_scales(block.module, group, found.values)
    spread = found.values if group.channels is None else found.values[group.channels]
    for path in consumers:
        moments[path] = moments[path].scaled(spread)
    names = tuple(f"{block.path}.{path}" for path in consumers)
    return GroupReport(f"{block.path}.{group.producer}", names, found.choice, found.loss_before, found.loss)


def _round(
    block: Block, linears: list[tuple[str, nn.Linear]], moments: Moments, settings: Settings
) -> tuple[dict[str, AwqWeight], list[LinearReport]]:
    """Ranges and codes of linears that are smoothed already and have the same input."""
    weight, second = torch.cat([linear.weight for _, linear in linears]), moments.second
    scheme = settings.scheme(weight.shape[1])
    groups = grouped(weight, scheme.group_size)
    ranges = search_ranges(weight, second, scheme) if settings.clip else whole_ranges(weight, scheme)
    if settings.rounding == "feedback":
        damping = moments.noise if settings.damping is None else settings.damping
        codes = round_with_feedback(weight, second, ranges.grid, damping=damping)
    else:
        codes = ranges.grid.codes(groups)
    sizes = [linear.out_features for _, linear in linears]
    plain = whole_ranges(weight, scheme).grid.rounded(groups).sub_(groups).flatten(1)
    error = (codes - ranges.grid.zeros).mul_(ranges.grid.scales).sub_(groups).flatten(1)
    fields = (weight, plain, error, codes, ranges.grid.scales, ranges.grid.zeros, ranges.clipped)
    split = zip(*(torch.split(field, sizes) for field in fields), strict=True)
    weights, reports = {}, []
    for (path, linear), parts in zip(linears, split, strict=True):
        own, before, after, own_codes, scales, zeros, clipped = parts
        step = max(1, len(own) // REPORTED_ROWS)
        power = quadratic(own[::step], second)
        losses = [quadratic(part[::step], second) / power if power else 0.0 for part in (before, after)]
        share = float(clipped.float().mean())
        weights[path] = to_weight(own_codes, Grid(scales, zeros), scheme, _bias(linear, settings))
        reports.append(LinearReport(f"{block.path}.{path}", losses[0], losses[1], share, moments.tokens))
    return weights, reports


def _bias(linear: nn.Linear, settings: Settings) -> Tensor | None:
    return None if linear.bias is None else as_stored("a bias", linear.bias, settings.stored_dtype)
