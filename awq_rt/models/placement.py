"""Which of a checkpoint's tensors belong to which of a model's modules.

transformers renames tensors while it loads (vision-language prefixes, Mixtral's blocks) and fuses some (a mixture's
experts). The same rules are asked here, with the name that the dense weight would have had.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..checkpoint import Checkpoint
from ..errors import MissingTensor, ModelMismatch

GATE_UP, DOWN = "gate_up_proj", "down_proj"
EXPERT_NUMBER = re.compile(r"\.(\d+)\.(?!.*\.\d+\.)")
"""The last number in a name: `model.layers.3.mlp.experts.17.up_proj.weight` is of expert 17."""


@dataclass(slots=True)
class Experts:
    """Checkpoint names of one experts module: `gate_up[e]` is (gate, up) or a name already fused, `down[e]` a name."""

    gate_up: dict[int, tuple[str, ...]] = field(default_factory=dict)
    down: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class Placement:
    """Where everything goes.

    `linears`: module -> checkpoint name. `experts`: module -> names. `dense`: a name packed in the checkpoint -> the
    model's plain matrix (a router) for which it is dequantised. `activations`: module -> name of its scales.
    `targets`: the model's name for each tensor of the checkpoint that is dense.
    """

    linears: dict[str, str] = field(default_factory=dict)
    experts: dict[str, Experts] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)


def place(model: Any, checkpoint: Checkpoint, *, new_heads: bool = False) -> Placement:
    """The place of every tensor of `checkpoint` in `model`, a transformers model on the meta device.

    `new_heads` allows what is put on top of the base model, such as a classifier, to be absent from the checkpoint.
    Raises `ModelMismatch` when the model has no such module or one of another size, `MissingTensor` for what the model
    needs and the checkpoint lacks: nothing has been allocated by then.
    """
    rename = Renaming(model)
    placement = Placement()
    parts: dict[str, dict[str, dict[int, dict[int, str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for name in checkpoint.linears:
        target, converter, part = rename(f"{name}.weight")
        if converter is not None:
            owner, _, parameter = target.rpartition(".")
            _check_fusion(name, target, converter)
            number = EXPERT_NUMBER.search(f"{name}.weight")
            if parameter not in (GATE_UP, DOWN) or number is None:
                raise NotImplementedError(
                    f"transformers fuses {name} into {target}; awq_rt knows fusions into {GATE_UP} and {DOWN} only"
                )
            parts[owner][parameter][int(number[1])][part] = name
        elif isinstance(module := rename.module(target.removesuffix(".weight")), nn.Linear):
            _check_linear(name, target, module, checkpoint)
            placement.linears[target.removesuffix(".weight")] = name
        elif target in rename.targets:
            _check_matrix(name, target, rename.targets[target].shape, checkpoint)
            placement.dense[name] = target
        else:
            raise ModelMismatch(
                f"{name} is packed in {checkpoint.root}, but {type(model).__name__} has no {target}; "
                "config.json describes another model"
            )
    for module_name, parameters in parts.items():
        placement.experts[module_name] = _experts(module_name, rename.module(module_name), parameters, checkpoint)
    for name, info in checkpoint.dense.items():
        target, converter, _ = rename(name)
        placement.targets[name] = target
        module = rename.module(target.removesuffix(".scales")) if target.endswith(".scales") else None
        if module is not None and not list(module.parameters()):
            if len(info.shape) != 1:
                raise ModelMismatch(f"{name} has shape {list(info.shape)}; an activation's scales are a vector")
            placement.activations[target.removesuffix(".scales")] = name
        elif converter is None and target in rename.targets:
            expected = tuple(rename.targets[target].shape)
            if info.shape != expected:
                raise ModelMismatch(f"{name} has shape {list(info.shape)}; config.json makes {target} {list(expected)}")
    _check_complete(model, placement, checkpoint, new_heads)
    return placement


class Renaming:
    """transformers' own rules for one model, asked a name at a time."""

    def __init__(self, model: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.targets = model.state_dict()
        self._modules = dict(model.named_modules())
        self._prefix = model.base_model_prefix
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def __call__(self, name: str) -> tuple[str, Any, int]:
        """(the model's name for it, the converter that fuses it or None, its number among the converter's sources)."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.targets)
        if target not in self.targets and name in self.targets:
            target, pattern = rename_source_key(name, [], [], self._prefix, self.targets)
        for converter in self._converters if pattern is not None else ():
            if pattern in converter.source_patterns:
                return target, converter, converter.source_patterns.index(pattern)
        return target, None, 0

    def module(self, path: str) -> nn.Module | None:
        return self._modules.get(path)


def _check_complete(model: Any, placement: Placement, checkpoint: Checkpoint, new_heads: bool) -> None:
    """Raise `MissingTensor` for parameters that no tensor is for, before they would be made up at random."""
    base = f"{model.base_model_prefix}."
    found = {*placement.targets.values(), *placement.dense.values()}
    packed = tuple(f"{path}." for path in (*placement.linears, *placement.experts))
    tied: dict[str, str] = model.all_tied_weights_keys
    same = {name for pair in tied.items() if found & set(pair) for name in pair}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = [
        name
        for name, _ in model.named_parameters()
        if name not in found | same
        and not name.startswith(packed)
        and not any(p.search(name) for p in ignored)
        and not (new_heads and not name.startswith(base))
    ]
    if missing:
        raise MissingTensor(
            f"{checkpoint.root} lacks {len(missing)} tensors of {type(model).__name__}: {', '.join(missing[:5])}; "
            "the download is not whole, or config.json is of another model"
        )


def _check_fusion(name: str, target: str, converter: Any) -> None:
    """Only stacking experts and setting gate beside up can be done with packed weights as they are."""
    operations = [type(operation).__name__ for operation in converter.operations]
    if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        raise NotImplementedError(
            f"transformers turns {name} into {target} by {', '.join(operations)}, which awq_rt cannot do in 4 bits"
        )


def _check_linear(name: str, target: str, module: nn.Linear, checkpoint: Checkpoint) -> None:
    linear = checkpoint.linears[name]
    if (linear.in_features, linear.out_features) != (module.in_features, module.out_features):
        raise ModelMismatch(
            f"{name} is {linear.in_features} -> {linear.out_features}, but config.json makes {target} "
            f"{module.in_features} -> {module.out_features}"
        )
    if module.bias is not None and not linear.bias:
        raise MissingTensor(f"{name}.bias is not in {checkpoint.root}, but the model's {target} has a bias")


def _check_matrix(name: str, target: str, shape: tuple[int, ...], checkpoint: Checkpoint) -> None:
    linear = checkpoint.linears[name]
    if tuple(shape) != (linear.out_features, linear.in_features):
        raise ModelMismatch(
            f"{name} is {linear.in_features} -> {linear.out_features}, but config.json makes {target} {list(shape)}"
        )


def _experts(
    name: str, module: nn.Module | None, parameters: dict[str, dict[int, dict[int, str]]], checkpoint: Checkpoint
) -> Experts:
    """The experts of one module, every one complete and of the module's size."""
    found = Experts()
    for parameter, chosen in ((GATE_UP, found.gate_up), (DOWN, found.down)):
        shape = tuple(getattr(module, parameter).shape)  # [E, out, in]
        for expert in range(shape[0]):
            sources = parameters.get(parameter, {}).get(expert, {})
            names = tuple(sources[part] for part in sorted(sources))
            out_features = sum(checkpoint.linears[n].out_features for n in names)
            if out_features != shape[1] or any(checkpoint.linears[n].in_features != shape[2] for n in names):
                raise ModelMismatch(
                    f"expert {expert} of {name}.{parameter} is {shape[2]} -> {shape[1]} in config.json; "
                    f"the checkpoint has {', '.join(names) or 'nothing'} for it"
                )
            chosen[expert] = names
    return found
