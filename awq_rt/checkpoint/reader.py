"""A checkpoint as a mapping from a linear's name to its canonical weight, read one linear at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigMismatch, InvalidTensor, MissingTensor, NonFiniteScales, NotQuantized, UnsupportedFormat
from ..formats import LAYOUTS, MARKERS, SUFFIXES, Layout, LinearShape, TensorInfo, identify
from ..formats.padding import used_groups
from ..weights import AwqWeight
from .config import QuantizationConfig, read_config
from .files import CheckpointFiles, locate
from .storage import TensorFile, open_file

PADDED = ("gemv", "gemv_fast", "llm-awq")
"""Layouts whose group size does not follow from the shapes."""

FOREIGN = {
    "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "SCB": "bitsandbytes",
    "q_weight": "ExLlamaV2 (EXL2)", "trellis": "ExLlamaV3 (EXL3)", "W_q": "HQQ",
    "weight_scale_inv": "FP8", "g_idx": "GPTQ", "weight_scale": "compressed-tensors, but not pack-quantized",
}  # fmt: skip
"""Last parts of tensor names that other quantisation formats leave, and the format's name."""


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A packed linear in a checkpoint: its name, layout and shape, and the headers of its tensors by suffix."""

    name: str
    layout: str
    shape: LinearShape
    tensors: Mapping[str, TensorInfo]

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    @property
    def group_size(self) -> int:
        return self.shape.group_size

    @property
    def bias(self) -> bool:
        return "bias" in self.tensors

    @property
    def symmetric(self) -> bool:
        """Whether no zero points are stored. (Stored ones may still all be 8.)"""
        return not self.tensors.keys() & {"qzeros", "scaled_zeros", "weight_zero_point"}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())


class Checkpoint(Mapping[str, AwqWeight]):
    """A 4-bit AWQ checkpoint: `checkpoint[name]` reads the linear `name` as an `AwqWeight`.

    `linears` are the packed linears by name, `dense` the headers of all other tensors, `layout` the one packing of the
    checkpoint, `config` the contents of config.json, `quantization` what it says of the quantisation, `source` the
    folder (`root`) or the one file in it that was opened.
    """

    def __init__(self, files: CheckpointFiles, group_size: int | None = None):
        self.root = files.root
        self.source = files.source
        self.config, self.quantization = read_config(files.root)
        self._files = tuple(open_file(path) for path in files.weights)
        self._home = tensor_homes(self._files, files.index, files.root)
        infos = {name: file.tensors[name] for name, file in self._home.items()}
        packed, self.dense = _grouped(infos)
        if not packed:
            raise _not_quantized(files.root, infos)
        layouts = {name: identify(name, stored) for name, stored in packed.items()}
        _check_not_empty(packed)
        self.layout = _one_layout(layouts, self.quantization)
        self._group_size_said = _group_size_said(group_size, self.quantization)
        configured = self.quantization.group_size if group_size is None else group_size
        if configured is None and self.layout in PADDED:
            configured = self._group_size_from_padding(packed, layouts)
        self.linears = {
            name: StoredLinear(name, layouts[name].NAME, self._shape(name, layouts[name], stored, configured), stored)
            for name, stored in packed.items()
        }
        for linear in self.linears.values():
            _check_bias(linear)
            self._check_against_config(linear, group_size)

    def __getitem__(self, name: str) -> AwqWeight:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)

    __eq__ = object.__eq__  # a mapping's own would read every weight of both
    __hash__ = object.__hash__

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.tensors[name].nbytes for name, file in self._home.items())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd here but no error."""
        found = []
        if "quantization_config" not in self.config and not self.quantization.raw:
            found.append(f"{self.root} says nothing of its quantisation; everything was inferred from the tensors")
        if self.quantization.raw.get("kv_cache_scheme") is not None:
            found.append(f"{self.quantization.source} has a kv_cache_scheme; awq_rt does not quantise the cache")
        if self.config.get("use_cache") is False:
            found.append("config.json has use_cache false, which AutoAWQ leaves behind; awq_rt uses the cache")
        skipped = [n for n in self.linears if any(n == s or n.endswith("." + s) for s in self.quantization.skipped)]
        if skipped:
            found.append(f"{self.quantization.source} excludes {skipped[0]}, which is packed all the same")
        return tuple(found)

    def read(self, name: str, device: torch.device | str = "cpu") -> AwqWeight:
        """The linear `name`, unpacked on `device`.

        Raises `KeyError` for a name that is not in `linears`; `NonFiniteScales`, `ConfigMismatch` (padding that shows
        another group size) or `InvalidTensor` for bad values.
        """
        linear = self.linears[name]
        layout = LAYOUTS[linear.layout]
        stored = {suffix: self._read_to(info.name, torch.device(device)) for suffix, info in linear.tensors.items()}
        scales = stored["weight_scale" if "weight_scale" in stored else "scales"]
        if not bool(torch.isfinite(scales).all()):
            raise NonFiniteScales(f"{name}: scales hold NaN or infinity; the checkpoint was written wrongly")
        if linear.layout in PADDED:
            self._check_padding(linear, scales)
        try:
            return layout.read(stored, linear.shape)
        except InvalidTensor as error:
            raise InvalidTensor(f"{name}: {error.args[0]}") from error

    def view(self, name: str) -> Tensor:
        """The dense tensor `name`; it may share pages with the file, so it must not be written to."""
        return self._home[self.dense[name].name].view(name)

    def _read(self, name: str) -> Tensor:
        return self._home[name].read(name)

    def _read_to(self, name: str, device: torch.device) -> Tensor:
        """To a GPU through page-locked memory, which it reads by itself: from other memory at a tenth of the speed."""
        if device.type != "cuda":
            return self._read(name).to(device)
        view = self._home[name].view(name)
        locked = torch.empty(view.shape, dtype=view.dtype, pin_memory=True).copy_(view)
        return locked.to(device, non_blocking=True)

    def _group_size_from_padding(
        self, packed: Mapping[str, Mapping[str, TensorInfo]], layouts: Mapping[str, Layout]
    ) -> int:
        """The group size where no configuration states it: the padding of the scales begins after the last group."""
        lengths = {name: layouts[name].shape(stored, -1).in_features for name, stored in packed.items()}
        # In the longest columns: where even they are one group, every column is.
        longest = max(lengths, key=lengths.__getitem__)
        used = self._used_groups(self._read(packed[longest]["scales"].name))
        if used == 0 or lengths[longest] % used:
            raise InvalidTensor(f"{packed[longest]['scales']} holds {used} groups; pass group_size=")
        return lengths[longest] // used if used > 1 else -1

    def _used_groups(self, scales: Tensor) -> int:
        return used_groups(scales.T if self.layout == "gemv" else scales)

    def _shape(
        self, name: str, layout: Layout, stored: Mapping[str, TensorInfo], configured: int | None
    ) -> LinearShape:
        """The linear's shape. Raises `InvalidTensor`, or `ConfigMismatch` where only the stated group size is wrong."""
        if layout.NAME not in PADDED or self._group_size_said is None:
            return layout.shape(stored, configured)
        layout.shape(stored, -1)
        try:
            return layout.shape(stored, configured)
        except InvalidTensor as error:
            raise ConfigMismatch(f"{name}: {error.args[0]}; {self._group_size_said}") from error

    def _check_padding(self, linear: StoredLinear, scales: Tensor) -> None:
        """Raise where the padding of the scales does not begin behind the last group."""
        used = self._used_groups(scales)
        if used == linear.shape.groups:
            return
        found = f"{linear.name}: scales hold {used} groups where the group size makes {linear.shape.groups}"
        if self._group_size_said is None:
            raise InvalidTensor(f"{found}; pass group_size=")
        raise ConfigMismatch(f"{found}; {self._group_size_said}")

    def _check_against_config(self, linear: StoredLinear, wanted: int | None) -> None:
        """Raise `ConfigMismatch` where the configuration contradicts the tensors of `linear`."""
        sizes = self.quantization.group_sizes | (frozenset() if wanted is None else {wanted})
        if sizes and linear.group_size not in {linear.in_features if size == -1 else size for size in sizes}:
            raise ConfigMismatch(
                f"{linear.name}: the tensors have group size {linear.group_size}; {self._group_size_said}"
            )
        if self.quantization.zero_point and linear.symmetric:
            raise ConfigMismatch(
                f"{linear.name} stores no zero points, but {self.quantization.source} says that there are some"
            )

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.root)!r}, {self.layout}, {len(self)} linears, {self.nbytes / 1e9:.2f} GB)"


def open_checkpoint(
    id_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    group_size: int | None = None,
) -> Checkpoint:
    """The 4-bit AWQ checkpoint in a local folder or file, or under a hub id; only headers are read now.

    `group_size` is needed only where neither the configuration nor the tensors state it.
    Raises a `CheckpointError` that says what is wrong and what to do.
    """
    return Checkpoint(locate(id_or_path, revision=revision, token=token), group_size)


def tensor_homes(files: tuple[TensorFile, ...], index: Mapping[str, str] | None, root: Path) -> dict[str, TensorFile]:
    """The file of every tensor, checked against the index."""
    homes: dict[str, TensorFile] = {}
    for file in files:
        for name in file.tensors:
            if name in homes:
                both = f"{homes[name].path.name} and again in {file.path.name}"
                raise InvalidTensor(f"{name} is in {both} under {root}; delete the file that is out of date")
            homes[name] = file
    absent = [name for name, file in (index or {}).items() if name not in homes or homes[name].path.name != file]
    if absent:
        raise MissingTensor(
            f"the index of {root} places {absent[0]} in {(index or {})[absent[0]]}, which does not hold it"
            f" ({len(absent)} such tensors); the index and the files belong to different versions"
        )
    return homes


def _grouped(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """(packed linears: prefix -> suffix -> header, all other tensors)."""
    prefixes = {name.rpartition(".")[0] for name in infos if name.rpartition(".")[2] in MARKERS}
    packed: dict[str, dict[str, TensorInfo]] = {prefix: {} for prefix in sorted(prefixes, key=_natural)}
    dense = {}
    for name, info in infos.items():
        prefix, _, suffix = name.rpartition(".")
        if prefix in packed and (suffix in SUFFIXES or suffix in ("g_idx", "weight_g_idx")):
            packed[prefix][suffix] = info
        else:
            dense[name] = info
    return packed, dense


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9. Of two numbers the longer is the larger: no digits are converted, however many."""
    parts = ((part, part.lstrip("0")) for part in name.split("."))
    return [(len(digits), digits) if part.isdecimal() else (-1, part) for part, digits in parts]


def _not_quantized(root: Path, infos: Mapping[str, TensorInfo]) -> UnsupportedFormat | NotQuantized:
    for name in infos:
        if kind := FOREIGN.get(name.rpartition(".")[2]):
            return UnsupportedFormat(f"{root} is quantised as {kind} ({name}), not AWQ; transformers may load it")
    return NotQuantized(
        f"{root} holds {len(infos)} tensors, none of them packed in 4 bits; "
        "load it with transformers, or look for an AWQ checkpoint of the model"
    )


def _one_layout(layouts: Mapping[str, Layout], config: QuantizationConfig) -> str:
    by_layout = {layout.NAME: name for name, layout in layouts.items()}
    if len(by_layout) > 1:
        mixed = ", ".join(f"{name} is {layout}" for layout, name in by_layout.items())
        raise InvalidTensor(f"a checkpoint has one layout, but {mixed}")
    (found,) = by_layout
    if config.layouts and found not in config.layouts:
        name = by_layout[found]
        raise ConfigMismatch(
            f"{config.source} says {' or '.join(config.layouts)}, but the tensors of {name} are {found}; "
            "correct the configuration if the tensors are right"
        )
    return found


def _check_not_empty(packed: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    for stored in packed.values():
        for info in stored.values():
            if 0 in info.shape:
                raise InvalidTensor(f"{info} is empty; a linear has inputs, outputs and groups")


def _check_bias(linear: StoredLinear) -> None:
    bias = linear.tensors.get("bias")
    if bias is not None and (bias.shape != (linear.out_features,) or not bias.dtype.is_floating_point):
        raise InvalidTensor(f"{bias} does not fit; a floating tensor of shape [{linear.out_features}] is expected")


def _group_size_said(wanted: int | None, config: QuantizationConfig) -> str | None:
    """Who states which group size, as a clause for messages; None where nobody does. Raises `ConfigMismatch`."""
    said = f"{config.source} says {', '.join(map(str, sorted(config.group_sizes)))}" if config.group_sizes else None
    if wanted is None:
        return said
    if said is not None and wanted not in config.group_sizes:
        raise ConfigMismatch(f"group_size={wanted} was passed, but {said}")
    return f"group_size={wanted} was passed"


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json without its quantisation, which a converted checkpoint states anew."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return config
