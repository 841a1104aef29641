"""What a configuration says of the quantisation, in every spelling that AWQ tools have written.

It confirms what the tensors say, and states the group size where padding hides it. Nothing here decides a layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidConfig, UnsupportedFormat
from .files import read_json

VERSIONS: Mapping[str, tuple[str, ...]] = {
    "gemm": ("gemm",),
    "exllama": ("gemm",),  # the kernels of these four repack GEMM tensors when they load
    "exllamav2": ("gemm",),
    "exllama_v2": ("gemm",),
    "ipex": ("gemm",),
    "gemv": ("gemv",),
    "gemv_fast": ("gemv_fast",),
    "marlin": ("marlin",),
    "llm-awq": ("gemm", "gemv", "llm-awq"),  # three generations under one name
}
OLD_FILES = ("quant_config.json", "quantize_config.json")
METHODS = ("awq", "compressed-tensors", "auto-round", "autoround", "intel/auto-round")

METHODS_OF = dict.fromkeys(("rtn", "teq"), "neural_compressor (Intel Neural Compressor)")
"""Methods that only the software that wrote them names."""


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """`layouts` it allows and `group_sizes` it names (-1 is one group a column); empty where it does not say."""

    source: str
    method: str
    layouts: tuple[str, ...] = ()
    group_sizes: frozenset[int] = frozenset()
    zero_point: bool | None = None
    skipped: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def group_size(self) -> int | None:
        """The only group size named, or None."""
        return next(iter(self.group_sizes)) if len(self.group_sizes) == 1 else None


def read_config(root: Path) -> tuple[dict[str, Any], QuantizationConfig]:
    """config.json (empty when absent) and what the folder says of the quantisation. Raises `InvalidConfig`."""
    path = root / "config.json"
    config = read_json(path) if path.is_file() else {}
    for container in (config, config.get("text_config")):
        if isinstance(container, dict) and container.get("quantization_config") is not None:
            return config, parse(container["quantization_config"], f"{path}, quantization_config")
    for name in OLD_FILES:
        if (root / name).is_file():
            return config, parse(read_json(root / name), str(root / name))
    return config, QuantizationConfig(f"{root} (no quantization_config)", "awq")


def parse(raw: Any, source: str) -> QuantizationConfig:
    """Raises `UnsupportedFormat` for other methods, bits and unknown versions; `InvalidConfig` for wrong kinds."""
    if not isinstance(raw, dict):
        raise InvalidConfig(f"{source} is a {type(raw).__name__}; an object is expected")
    method = str(raw.get("quant_method") or raw.get("method") or "awq").lower()
    if method not in METHODS:
        raise UnsupportedFormat(
            f"{source} names quantisation method {method!r}; awq_rt loads AWQ (also as written by llm-compressor and "
            f"auto-round); {METHODS_OF.get(method, 'transformers')} may load this one"
        )
    if method == "compressed-tensors":
        return _parse_compressed_tensors(raw, source)
    bits = _integer(raw, source, "bits", "w_bit")
    if bits not in (None, 4):
        raise UnsupportedFormat(f"{source} says {bits} bits; awq_rt runs 4-bit weights")
    group_size = _integer(raw, source, "group_size", "q_group_size")
    _check_group_size(group_size, source)
    zero_point = raw.get("zero_point")
    if zero_point is not None and not isinstance(zero_point, bool):
        raise InvalidConfig(f"{source} has zero_point {zero_point!r}; true or false is expected")
    return QuantizationConfig(
        source,
        method,
        _layouts(raw, source, method),
        frozenset() if group_size is None else frozenset((group_size,)),
        zero_point,
        _names(raw, source, "modules_to_not_convert"),
        raw,
    )


def _layouts(raw: Mapping[str, Any], source: str, method: str) -> tuple[str, ...]:
    if method != "awq":  # auto-round
        packing = str(raw.get("packing_format", ""))
        if packing and "awq" not in packing:
            raise UnsupportedFormat(
                f"{source} has packing_format {packing!r}, the GPTQ layout; export it from auto-round as 'auto_awq'"
            )
        return ("gemm",)
    if str(raw.get("backend", "")).lower() == "llm-awq":
        return VERSIONS["llm-awq"]  # its own converter labels every generation "gemv"
    for key in ("version", "checkpoint_format", "format"):
        version = raw.get(key)
        if version is None:
            continue
        known = VERSIONS.get(str(version).lower())
        if known is None:
            raise UnsupportedFormat(f"{source} has {key} {version!r}; known are {', '.join(VERSIONS)}")
        return known
    return ()


def _parse_compressed_tensors(raw: Mapping[str, Any], source: str) -> QuantizationConfig:
    _check_nothing_beside_packing(raw, source)
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InvalidConfig(f"{source} has no config_groups; a compressed-tensors configuration needs one")
    sizes, symmetric = set(), set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise InvalidConfig(f"{source}: {name} has no weights; a scheme is expected")
        packing = group.get("format") or raw.get("format")
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        if packing not in (None, "pack-quantized") or bits != 4 or kind != "int":
            raise UnsupportedFormat(
                f"{source}: {name} is {packing}, {bits} bits, type {kind!r}; awq_rt loads pack-quantized 4-bit integers"
            )
        if group.get("input_activations"):
            raise UnsupportedFormat(f"{source}: {name} quantises activations too; awq_rt runs weight-only models")
        if weights.get("actorder") in ("group", True):
            raise UnsupportedFormat(f"{source}: {name} has actorder 'group' (GPTQ reordering), which AWQ does not use")
        strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
        if strategy not in ("group", "channel"):
            raise UnsupportedFormat(f"{source}: {name} has strategy {strategy!r}; 'group' or 'channel' is expected")
        size = _integer(weights, f"{source}: {name}", "group_size") if strategy == "group" else -1
        _check_group_size(size, source)
        if size is not None:
            sizes.add(size)
        symmetric.add(bool(weights.get("symmetric", True)))
    zero_point = None if len(symmetric) > 1 else not symmetric.pop()
    ignore = _names(raw, source, "ignore")
    layouts = ("compressed-tensors",)
    return QuantizationConfig(source, "compressed-tensors", layouts, frozenset(sizes), zero_point, ignore, raw)


def _check_nothing_beside_packing(raw: Mapping[str, Any], source: str) -> None:
    """Raise `UnsupportedFormat` for what changes the weights, or what they are multiplied with, beside the packing."""
    transform, sparsity = raw.get("transform_config"), raw.get("sparsity_config")
    if transform and not (isinstance(transform, dict) and transform.get("config_groups") == {}):
        raise UnsupportedFormat(f"{source} has a transform_config (rotations as of SpinQuant), which awq_rt cannot run")
    # llm-compressor writes "dense" of weights that it has measured and found not to be sparse.
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise UnsupportedFormat(f"{source} has a sparsity_config (sparse weights), which awq_rt cannot read")


def _integer(raw: Mapping[str, Any], source: str, *keys: str) -> int | None:
    for key in keys:
        value = raw.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidConfig(f"{source} has {key} {value!r}; an integer is expected")
        return value
    return None


def _names(raw: Mapping[str, Any], source: str, key: str) -> tuple[str, ...]:
    names = raw.get(key) or ()
    if not isinstance(names, (list, tuple)):
        raise InvalidConfig(f"{source} has {key} {names!r}; a list is expected")
    return tuple(str(name) for name in names)


def _check_group_size(group_size: int | None, source: str) -> None:
    if group_size is not None and group_size != -1 and group_size < 1:
        raise InvalidConfig(f"{source} has group size {group_size}; a positive number, or -1, is expected")
