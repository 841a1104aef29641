"""Which scales a block has room for, found by trying.

A scaling group is a producer (a norm, or rows of a linear) and the linears that read nothing but its output: dividing
the producer's channels by s and multiplying the linears' input channels by s changes nothing. No table of
architectures says which these are. Each of a producer's channels is multiplied by a power of two that spells its
number, digit by digit over a few runs on a few tokens; a linear whose every input channel comes out multiplied by
exactly one of these powers reads that producer, and the powers say which channel goes where (the same head of v for
several of o, say). Then the linears take the factors back, and the group stands if the block's output is as before.
Powers of two multiply without rounding, so "as before" is meant nearly bit for bit, and a wrong guess is off by
factors of two.

Two things cannot be tried. An activation can only be divided where loaders look for its `scales`: `SCALED_ACTIVATIONS`.
An expert that none of the tokens goes to is taken to be like the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.activation import ScaledActivation
from .experts import UnfusedExperts
from .streaming import Call

SCALED_ACTIVATIONS: Mapping[str, str] = {
    "mpt": "ffn.act", "bloom": "mlp.gelu_impl", "gptj": "mlp.act", "gpt_neox": "mlp.act", "gpt_bigcode": "mlp.act",
    "starcoder2": "mlp.act",
}  # fmt: skip
"""Model type -> the activation in a block that may be divided: `<path>.scales` in a checkpoint, as AutoAWQ writes
it."""

BASE = 8
"""Channel numbers are spelt in digits of this base: factors 2^1 to 2^8. 2^0 would look like a linear that reads
others."""

TOLERANCE = 2.0**-10
"""Relative to a channel's largest value. Powers of two are exact, but for Gemma's norms, whose weight is stored less
1 and rounds when it is multiplied: 2^-24 a channel, more where the rest of the block amplifies it. A wrong factor is
off by 1."""

TOKENS = 16
"""How long the text is on which groups are tried."""


@dataclass(frozen=True, slots=True, eq=False)
class ScalingGroup:
    """`producer` (a path in the block) makes the inputs of `consumers`, paths of linears and routers.

    `kind` says how its output is divided; `rows` are the rows of a linear that matter, None for a norm's or an
    activation's channels; `channels` int64 [K] the number in `rows` of each input channel, None where they are the
    same.
    """

    producer: str
    kind: Literal["norm", "offset norm", "rows", "activation"]
    consumers: tuple[str, ...]
    size: int
    rows: Tensor | None = None
    channels: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """What was found out about a kind of block.

    `sites` maps each linear's path to the name of the site where its input is observed, `observed` each site to the
    linears whose inputs are counted there; `expert_downs` are the sites of experts' second linears.
    """

    groups: tuple[ScalingGroup, ...]
    sites: Mapping[str, str]
    observed: Mapping[str, tuple[str, ...]]
    expert_downs: frozenset[str]

    @property
    def normed(self) -> frozenset[str]:
        """Sites whose inputs a norm makes."""
        made = (path for group in self.groups if "norm" in group.kind for path in group.consumers)
        return frozenset(self.sites[path] for path in made if path in self.sites)


@torch.no_grad()
def apply_scales(block: nn.Module, group: ScalingGroup, scales: Tensor) -> None:
    """Divide the producer's channels by `scales` [R] and multiply the consumers' input channels by them, in place."""
    _divide(block, group, scales)
    spread = scales if group.channels is None else scales[group.channels]
    for path in group.consumers:
        block.get_submodule(path).weight.mul_(spread)  # type: ignore[operator]


@torch.no_grad()
def _divide(block: nn.Module, group: ScalingGroup, scales: Tensor) -> None:
    module: Any = block.get_submodule(group.producer)
    if group.kind == "activation":
        if not isinstance(module, ScaledActivation):
            owner, _, name = group.producer.rpartition(".")
            divided = ScaledActivation(module, group.size)
            divided.scales = nn.Parameter(torch.ones_like(scales), requires_grad=False)
            setattr(block.get_submodule(owner), name, divided)
            module = divided
        module.scales.mul_(scales)
    elif group.kind == "offset norm":
        module.weight.add_(1).div_(scales).sub_(1)
    elif group.kind == "norm":
        module.weight.div_(scales)
        if getattr(module, "bias", None) is not None:
            module.bias.div_(scales)
    else:
        module.weight[group.rows] /= scales[:, None]
        if module.bias is not None:
            module.bias[group.rows] /= scales


@torch.no_grad()
def find_structure(block: nn.Module, call: Call, hidden: Tensor, config: Any) -> Structure:
    """Groups and sites of `block`, tried on `hidden` [1, length, hidden]; the block's weights are as before after it.

    All experts' first linears are one site: they read the same states, each those that were sent to it.
    """
    trial = _Trial(block, call, hidden)
    groups = tuple(_find_groups(trial, config))
    sites: dict[str, str] = {}
    observed: dict[str, tuple[str, ...]] = {}
    downs = set()
    for path, module in block.named_modules():
        if isinstance(module, UnfusedExperts):
            first = tuple(f"{path}.gate_up.{number}" for number in range(len(module.gate_up)))
            own = tuple(f"{path}.down.{number}" for number in range(len(module.down)))
            sites |= dict.fromkeys(first, first[0]) | {name: name for name in own}
            observed |= {first[0]: first} | {name: (name,) for name in own}
            downs |= set(own)
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and path not in sites:
            x = trial.plain.inputs.get(path)
            same = (
                other
                for other in observed
                if x is not None
                and (y := trial.plain.inputs.get(other)) is not None
                and other not in downs
                and x.shape == y.shape
                and torch.equal(x, y)
            )
            sites[path] = next(same, path)
            observed.setdefault(sites[path], (path,))
    return Structure(groups, sites, observed, frozenset(downs))


def _find_groups(trial: _Trial, config: Any) -> list[ScalingGroup]:
    """Every scaling group. A linear is in one at most: that of the producer that comes first."""
    block = trial.block
    groups: list[ScalingGroup] = []
    taken: set[str] = set()
    for producer in trial.producers(config):
        group = trial.group(producer)
        if group is not None and not taken & set(group.consumers):
            groups.append(group)
            taken |= set(group.consumers)
    groups += [group for group in _activation_groups(trial, config) if not taken & set(group.consumers)]
    return [_with_all_experts(block, group) for group in groups] + list(_expert_groups(block))


@dataclass(slots=True)
class _Producer:
    """A norm (`rows` None) or some rows of a linear, with the number of its channels."""

    path: str
    kind: Literal["norm", "offset norm", "rows"]
    size: int
    rows: Tensor | None = None


@dataclass(slots=True)
class _Run:
    """What one run showed: the inputs [tokens, K] of linears and routers in the order they ran, and the block's
    output."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    result: Tensor = field(default_factory=lambda: torch.empty(0))


class _Trial:
    """A block, how to run it, and how it ran when nothing was changed."""

    def __init__(self, block: nn.Module, call: Call, hidden: Tensor):
        self.block, self.call, self.hidden = block, call, hidden
        leaves = {name: module for name, module in block.named_modules() if not list(module.children())}
        weights = {name: getattr(module, "weight", None) for name, module in leaves.items()}
        dims = {name: weight.dim() for name, weight in weights.items() if isinstance(weight, nn.Parameter)}
        self.readers = {name: leaves[name] for name, dim in dims.items() if dim == 2}
        self.norms = {name: leaves[name] for name, dim in dims.items() if dim == 1}
        self.rest = {n: m for n, m in leaves.items() if n not in self.readers and n not in self.norms}
        self.plain = self.run()

    def run(self) -> _Run:
        run, handles = _Run(), []

        def note_input(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                first = args[0] if args else next(iter(kwargs.values()))
                if path not in run.inputs:
                    run.inputs[path] = first.detach().reshape(-1, first.shape[-1]).clone()

            return hook

        def note_output(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor) and path not in run.outputs:
                    run.outputs[path] = output.detach().reshape(-1, output.shape[-1]).clone()

            return hook

        for path, module in self.readers.items():
            handles.append(module.register_forward_pre_hook(note_input(path), with_kwargs=True))
        for path, module in (self.norms | self.rest).items():
            handles.append(module.register_forward_hook(note_output(path)))
        try:
            run.result = self.call(self.block, self.hidden.clone())
        finally:
            for handle in handles:
                handle.remove()
        return run

    def producers(self, config: Any) -> Iterator[_Producer]:
        """Norms in the order of modules, then linears outside experts in the order they ran, whole and in part."""
        for path, module in self.norms.items():
            output = self.plain.outputs.get(path)
            size = module.weight.numel()
            if output is not None and output.shape[-1] == size:
                yield _Producer(path, "norm", size)
                yield _Producer(path, "offset norm", size)
        experts = tuple(f"{n}." for n, module in self.block.named_modules() if isinstance(module, UnfusedExperts))
        ran = list(self.plain.inputs)
        for index, path in enumerate(ran):
            module = self.readers[path]
            if isinstance(module, nn.Linear) and not path.startswith(experts):
                later = {self.plain.inputs[other].shape[-1] for other in ran[index + 1 :]}
                for rows in _row_choices(module.out_features, later, config):
                    yield _Producer(path, "rows", len(rows), rows.to(module.weight.device))

    def group(self, producer: _Producer) -> ScalingGroup | None:
        """The producer's group, None where it has none."""
        found: list[str] = []
        channels: Tensor | None = None
        while True:
            maps, unchanged = self._channels(producer, found, channels)
            new = [path for path in maps if path not in found]
            if not new:
                break
            first = maps[new[0]] if channels is None else channels
            new = [path for path in new if torch.equal(maps[path], first)]
            if not new:
                return None
            channels = first
            found += new
        if channels is None or not unchanged:
            return None
        own = torch.arange(producer.size, device=channels.device)
        same = torch.equal(channels, own)
        order = [path for path in self.readers if path in found]
        return ScalingGroup(
            producer.path, producer.kind, tuple(order), producer.size, producer.rows, None if same else channels
        )

    def _channels(
        self, producer: _Producer, found: list[str], channels: Tensor | None
    ) -> tuple[dict[str, Tensor], bool]:
        """(readers of the producer -> the number of its channel that each input channel is; whether the output stayed).

        `found` are readers known already, with `channels`; they take the factors back.
        """
        numbers = torch.arange(producer.size, device=self.hidden.device)
        maps: dict[str, Tensor] = {}
        unchanged, place = True, 1
        while place <= max(1, producer.size - 1):
            factors = 2.0 ** (numbers // place % BASE + 1)
            run = self._run_multiplied(producer, found, channels, factors)
            unchanged &= _equal(run.result, self.plain.result)
            digits = {
                path: _exponents(self.plain.inputs[path], run.inputs.get(path))
                for path in (self.plain.inputs if place == 1 else maps)
            }
            maps = {
                path: (maps[path] if place > 1 else 0) + (digit - 1) * place
                for path, digit in digits.items()
                if digit is not None
            }
            if not maps and not found:
                return {}, False
            place *= BASE
        known = {path: self._with_dead(path, numbers, channels) for path, channels in maps.items()}
        return {path: c for path, c in known.items() if c is not None and int(c.max()) < producer.size}, unchanged

    def _with_dead(self, path: str, numbers: Tensor, channels: Tensor) -> Tensor | None:
        """`channels`, where the plain run left some inputs at 0 throughout (after a ReLU): those of the identity."""
        alive = self.plain.inputs[path].abs().amax(0) > 0
        if bool(alive.all()):
            return channels
        same = len(numbers) == len(channels) and torch.equal(channels[alive], numbers[alive])
        return numbers if same and bool(alive.any()) else None

    def _run_multiplied(self, producer: _Producer, found: list[str], channels: Tensor | None, factors: Tensor) -> _Run:
        group = ScalingGroup(producer.path, producer.kind, tuple(found), producer.size, producer.rows, channels)
        touched = [self.block.get_submodule(path) for path in (producer.path, *found)]
        saved = [{name: p.detach().clone() for name, p in module.named_parameters()} for module in touched]
        try:
            apply_scales(self.block, group, 1 / factors)
            return self.run()
        finally:
            for module, parameters in zip(touched, saved, strict=True):
                for name, value in parameters.items():
                    module.get_parameter(name).copy_(value)


def _row_choices(size: int, later: set[int], config: Any) -> Iterator[Tensor]:
    """Rows of a linear of `size` rows that may make somebody's input: all, the last ones, the last of every head."""
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    key_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None) or heads
    head = int(getattr(text, "head_dim", None) or getattr(text, "hidden_size", heads) // heads)
    value_head = int(getattr(text, "v_head_dim", None) or head)
    tails = [(1, size), *((1, width) for width in sorted(later, reverse=True)), (1, key_heads * head), (1, head)]
    tails += [(heads, value_head), (key_heads, head)]
    seen = set()
    for parts, tail in tails:
        each, rest = divmod(size, parts)
        if rest or not 0 < tail <= each or (parts, tail) in seen or (tail == each and parts > 1):
            continue
        seen.add((parts, tail))
        yield torch.arange(size).view(parts, each)[:, each - tail :].flatten()


def _exponents(before: Tensor, after: Tensor | None) -> Tensor | None:
    """int64 [K]: e with `after` = `before` * 2^e in every channel, e in 1..BASE; None where there are no such e.

    A channel that is 0 throughout, before and after, gets 1.
    """
    if after is None or before.shape != after.shape or not bool(torch.isfinite(after).all()):
        return None
    largest, at = before.abs().max(0)
    ratio = after.gather(0, at[None])[0] / before.gather(0, at[None])[0]
    ratio = torch.where((largest == 0) & (after.abs().amax(0) == 0), 2.0, ratio)
    if not bool((ratio > 1).all()):
        return None
    exponents = ratio.log2().round()
    off = (after - before * 2**exponents).abs().amax(0) > TOLERANCE * largest * 2**exponents
    if bool(off.any()) or int(exponents.max()) > BASE or int(exponents.min()) < 1:
        return None
    return exponents.long()


def _equal(one: Tensor, other: Tensor) -> bool:
    largest = other.abs().max()
    return bool(torch.isfinite(one).all()) and bool((one - other).abs().max() <= TOLERANCE * largest)


def _activation_groups(trial: _Trial, config: Any) -> Iterator[ScalingGroup]:
    """The linear that reads the activation that `SCALED_ACTIVATIONS` names."""
    path = SCALED_ACTIVATIONS.get(config.get_text_config().model_type, "")
    output = next(
        (out for name, out in trial.plain.outputs.items() if name == path or name.startswith(f"{path}.")), None
    )
    if not path or output is None:
        return
    readers = [name for name, x in trial.plain.inputs.items() if x.shape == output.shape and torch.equal(x, output)]
    if readers:
        yield ScalingGroup(path, "activation", tuple(readers), output.shape[-1])


def _with_all_experts(block: nn.Module, group: ScalingGroup) -> ScalingGroup:
    """The group with every expert of a mixture of which it has one."""
    consumers = list(group.consumers)
    for path, module in block.named_modules():
        if isinstance(module, UnfusedExperts) and any(name.startswith(f"{path}.gate_up.") for name in consumers):
            consumers = [name for name in consumers if not name.startswith(f"{path}.gate_up.")]
            consumers += [f"{path}.gate_up.{number}" for number in range(len(module.gate_up))]
    return ScalingGroup(group.producer, group.kind, tuple(consumers), group.size, group.rows, group.channels)


def _expert_groups(block: nn.Module) -> Iterator[ScalingGroup]:
    """Each expert's up half and down: `act(gate) * up`, where the module's own rule of gating is linear in up."""
    for path, module in block.named_modules():
        if not isinstance(module, UnfusedExperts):
            continue
        down: Any = module.down[0]
        size = down.in_features
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(4, 2 * size, generator=generator).to(down.weight.device)
        factors = torch.cat([torch.ones(size), 2.0 ** (torch.arange(size) % BASE)]).to(gate_up.device)
        if not _equal(module._apply_gate(gate_up * factors), module._apply_gate(gate_up) * factors[size:]):
            continue
        rows = torch.arange(size, 2 * size, device=gate_up.device)
        for number in range(len(module.down)):
            yield ScalingGroup(f"{path}.gate_up.{number}", "rows", (f"{path}.down.{number}",), size, rows)
