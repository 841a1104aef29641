"""A transformers model of which one decoder block at a time has weights.

The model is built with parameters on the meta device and buffers in place. What comes before the blocks is loaded, run
once on the calibration tokens and let go; then blocks are loaded, run and let go one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingTensor, ModelMismatch
from ..models.architecture import architecture
from ..models.placement import DOWN, EXPERT_NUMBER, GATE_UP, Renaming
from .experts import UnfusedExperts
from .source import DenseSource

FUSIONS = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
"""transformers' conversions that only stack experts and set gate beside up."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with beside the hidden states [1, length, hidden]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's hidden states."""
        made = block(hidden, *self.args, **self.kwargs)
        result: Tensor = made if isinstance(made, Tensor) else made[0]
        return result


@dataclass(slots=True)
class Block:
    """A decoder block: `path` in the model and, by path in the block, the checkpoint's names for each parameter.

    A parameter has one name, or two where gate and up of an expert are set beside each other. Where the source keeps
    all experts in one tensor, `names` are those to be written, and `stored` has the source's name of what differs and
    the expert's number. `dense` are the source's tensors that hold several matrices and stay so, with the reason.
    """

    path: str
    module: nn.Module
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stored: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {path: module for path, module in self.module.named_modules() if isinstance(module, nn.Linear)}

    @property
    def sources(self) -> set[str]:
        """The source's names of all that is in the block."""
        same = {name for path, names in self.names.items() if path not in self.stored for name in names}
        return same | {name for name, _ in self.stored.values()}


class StreamedModel:
    """The model of a dense checkpoint. Computes in float32 on `device`."""

    def __init__(self, source: DenseSource, device: torch.device, *, trust_remote_code: bool = False):
        self.source, self.device = source, device
        self.config, model_class = architecture(source, trust_remote_code)  # type: ignore[arg-type]
        self.model = _empty(self.config, model_class)
        self.decoder = self.model.get_decoder()
        self._rename = rename = Renaming(self.model)
        targets: dict[str, list[tuple[str, Any, int]]] = {}
        for name in source.tensors:
            target, converter, part = rename(name)
            targets.setdefault(target, []).append((name, converter, part))
        path, modules = _blocks(self.model, self.decoder)
        self.blocks = [self._block(f"{path}.{index}", module, targets) for index, module in enumerate(modules)]
        inside = tuple(f"{block.path}." for block in self.blocks)
        self.outside = {
            name: found[0][0]
            for name, found in targets.items()
            if name in rename.targets and not name.startswith(inside) and found[0][1] is None
        }

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """(hidden states [samples, length, hidden] before the first block, how each block is called).

        `tokens` int64 [samples, length].
        """
        prefix = next(name for name, module in self.model.named_modules() if module is self.decoder)
        inside = tuple(f"{block.path}." for block in self.blocks)
        wanted = [n for n, _ in self.decoder.named_parameters(prefix=prefix) if not n.startswith(inside)]
        for name in wanted:
            if name not in self.outside:
                raise MissingTensor(f"{self.source.root} lacks {name} of {type(self.model).__name__}")
            self._place(self.model, name, self.source.read(self.outside[name], self.device, torch.float32))
        for buffer_name, buffer in list(self.decoder.named_buffers()):
            owner, _, name = buffer_name.rpartition(".")
            self.decoder.get_submodule(owner)._buffers[name] = buffer.to(self.device)
        hidden, calls = tokens.new_empty(0), None
        for number, sample in enumerate(tokens):
            states, again = self._record(sample[None].to(self.device))
            if calls is None:
                hidden, calls = states.new_empty(len(tokens), *states.shape[1:]), again
            elif number == 1 and not _same(calls, again):
                raise NotImplementedError(
                    f"the blocks of {type(self.model).__name__} are called with arguments that depend on the text, "
                    "which awq_rt cannot keep between layers"
                )
            hidden[number] = states[0]
        for name in wanted:
            self._place(self.model, name, None)
        assert calls is not None
        return hidden, calls

    @contextmanager
    def loaded(self, block: Block) -> Iterator[nn.Module]:
        """The block with its weights, which are let go at the end."""
        for path, names in block.names.items():
            stored = [block.stored[path]] if path in block.stored else [(name, None) for name in names]
            parts = [self.source.read(name, self.device, torch.float32, part=part) for name, part in stored]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            expected = block.module.get_parameter(path).shape
            if tensor.shape != expected:
                raise ModelMismatch(
                    f"{' and '.join(names)} make {list(tensor.shape)}; config.json makes {block.path}.{path} "
                    f"{list(expected)}"
                )
            self._place(block.module, path, tensor)
        for module in block.module.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        try:
            yield block.module
        finally:
            for path in block.names:
                self._place(block.module, path, None)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all its weights, which are let go at the end."""
        for name, stored in self.outside.items():
            self._place(self.model, name, self.source.read(stored, self.device, torch.float32))
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        try:
            with ExitStack() as loaded:
                for block in self.blocks:
                    loaded.enter_context(self.loaded(block))
                yield self.model
        finally:
            for name in self.outside:
                self._place(self.model, name, None)

    def _block(self, path: str, module: nn.Module, targets: dict[str, list[tuple[str, Any, int]]]) -> Block:
        block = Block(path, module)
        parameters = dict(module.named_parameters())
        written = self._written(path, parameters, targets)
        for relative, parameter in parameters.items():
            found = targets.get(f"{path}.{relative}", [])
            if not found:
                raise MissingTensor(f"{self.source.root} lacks {path}.{relative} of {type(self.model).__name__}")
            owner, _, kind = relative.rpartition(".")
            source, converter, _ = found[0]
            together = converter is None and _is_stack(relative, parameter)
            parts = written.get(relative, []) if together else found
            if (together and parts) or converter is not None:
                operations = _operations(parts[0][1])
                if kind not in (GATE_UP, DOWN) or operations not in FUSIONS:
                    raise NotImplementedError(
                        f"transformers turns {parts[0][0]} into {path}.{relative} by {', '.join(operations)}, "
                        "which awq_rt cannot undo"
                    )
                self._unfuse(module, owner, parameter, kind)
                for number, names in _by_expert(parts).items():
                    own = f"{owner}.{'gate_up' if kind == GATE_UP else 'down'}.{number}.weight"
                    block.names[own] = names
                    if together:
                        block.stored[own] = (source, number)
                continue
            block.names[relative] = (source,)
            if together:
                block.dense[source] = "it holds all experts, and transformers has no names for them apart"
            elif relative in written and written[relative][0][0] != source:
                block.names[relative], block.stored[relative] = (written[relative][0][0],), (source, None)
        return block

    def _written(
        self, path: str, parameters: dict[str, nn.Parameter], targets: dict[str, list[tuple[str, Any, int]]]
    ) -> dict[str, list[tuple[str, Any, int]]]:
        """Path in the block -> what it is saved as, as in `targets`, where the source keeps all experts in one tensor.

        Such a checkpoint has transformers' own names throughout. What is written has the names of the architecture's
        checkpoints, which other software knows, with the source's prefix. Empty for all other checkpoints.
        """
        from transformers.core_model_loading import revert_weight_conversion

        stacks = [name for name, parameter in parameters.items() if _is_stack(name, parameter)]
        source = next((found[0] for name in stacks if (found := targets.get(f"{path}.{name}"))), None)
        if source is None or source[1] is not None:
            return {}
        prefix = source[0].removesuffix(stacks[0]) if source[0].endswith(stacks[0]) else f"{path}."
        written: dict[str, list[tuple[str, Any, int]]] = {}
        for name in revert_weight_conversion(self.model, {f"{path}.{name}": p for name, p in parameters.items()}):
            target, converter, part = self._rename(name)
            relative = target.removeprefix(f"{path}.")
            if converter is not None or not _is_stack(relative, parameters[relative]):
                own = f"{prefix}{name.removeprefix(f'{path}.')}"
                written.setdefault(relative, []).append((own, converter, part))
        return written

    @staticmethod
    def _unfuse(module: nn.Module, owner: str, parameter: Tensor, kind: str) -> None:
        """Put an `UnfusedExperts` in the place of `owner`."""
        fused = module.get_submodule(owner)
        if not isinstance(fused, UnfusedExperts):
            experts, out_features, in_features = parameter.shape
            sizes = (in_features, out_features // 2) if kind == GATE_UP else (out_features, in_features)
            _set(module, owner, UnfusedExperts(fused, experts, *sizes))

    def _record(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden states before the first block, and each block's call, from a run in which blocks do nothing."""
        for wrap in (lambda hidden: hidden, lambda hidden: (hidden,)):  # older models expect tuples of their blocks
            recorded: list[tuple[Tensor, Call]] = []
            with self._replaced(recorded, wrap):
                try:
                    self.decoder(input_ids=tokens, use_cache=False)
                except _Recorded:
                    pass
                except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
                    if len(recorded) in (0, len(self.blocks)):
                        raise
                    continue
            first = recorded[0][0]
            if len(recorded) == len(self.blocks) and all(hidden.shape == first.shape for hidden, _ in recorded):
                return first, [call for _, call in recorded]
        raise NotImplementedError(
            f"{type(self.model).__name__} does not run its {len(self.blocks)} blocks one after another on the same "
            f"hidden states ({len(recorded)} were reached)"
        )

    @contextmanager
    def _replaced(self, recorded: list[tuple[Tensor, Call]], wrap: Callable[[Tensor], Any]) -> Iterator[None]:
        """The blocks' forward methods note how they are called and pass the hidden states on."""
        last = self.blocks[-1].module

        def forward_of(module: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                recorded.append((hidden, Call(args[1:], kwargs)))
                if module is last:
                    raise _Recorded
                return wrap(hidden)

            return forward

        for block in self.blocks:
            block.module.forward = forward_of(block.module)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.module.forward

    def _place(self, root: nn.Module, path: str, tensor: Tensor | None) -> None:
        """Give a parameter its values, or put it on the meta device again."""
        owner, _, name = path.rpartition(".")
        module = root.get_submodule(owner)
        if tensor is None:
            tensor = torch.empty_like(module._parameters[name], device="meta")  # type: ignore[arg-type]
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


class _Recorded(Exception):
    """Every block has been reached."""


def _empty(config: Any, model_class: Any) -> Any:
    """The model, its parameters on the meta device and its buffers computed."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with init_empty_weights(include_buffers=False), no_init_weights():
        return model_class._from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def _blocks(model: Any, decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """(path, modules) of the decoder's blocks: its longest list of modules that hold linears."""
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    lists = [
        (name, module)
        for name, module in decoder.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList) and any(isinstance(inner, nn.Linear) for inner in module.modules())
    ]
    if not lists:
        raise NotImplementedError(f"{type(model).__name__} has no list of blocks with nn.Linear in them")
    # The outermost: an expert's list lies inside a block.
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    return max(outer, key=lambda entry: len(entry[1]))


def _is_stack(name: str, parameter: Tensor) -> bool:
    """Whether `name`, a path in a block, is of all experts' matrices in one parameter [E, out, in]."""
    return name.rpartition(".")[2] in (GATE_UP, DOWN) and parameter.dim() == 3


def _operations(converter: Any) -> list[str]:
    return [type(operation).__name__ for operation in converter.operations]


def _by_expert(found: list[tuple[str, Any, int]]) -> dict[int, tuple[str, ...]]:
    """Expert -> its tensors' names in the order in which transformers sets them beside each other."""
    experts: dict[int, dict[int, str]] = {}
    for name, _, part in found:
        number = EXPERT_NUMBER.search(name)
        if number is None:
            raise NotImplementedError(f"{name} is fused with others, but its name has no expert's number")
        experts.setdefault(int(number[1]), {})[part] = name
    return {number: tuple(parts[part] for part in sorted(parts)) for number, parts in sorted(experts.items())}


def _same(one: Any, other: Any) -> bool:
    """Whether two calls pass the same values."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Call) and isinstance(other, Call):
        return _same(one.args, other.args) and _same(one.kwargs, other.kwargs)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(root.get_submodule(owner), name, module)
