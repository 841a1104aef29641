"""Looks at a checkpoint, in a process of its own: headers and configuration; no weight is read, no code of it runs.

Answers the fields of a `Model`, or `{"code": ..., "reason": ...}` for one that cannot be used.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..backend import LinearSpec
from ..checkpoint import Checkpoint, open_checkpoint
from ..checkpoint.files import locate
from ..devices import Device
from ..errors import AwqRtError, CannotShard, NoBackend, RemoteCodeRefused
from ..examination import answer
from ..warmup import spec_of

POSITIONS = 4096
"""Of prompt and answer together that memory is predicted for, or as many as the model has."""

MOST_PROCESSES = 64
MOST_NAMED = 32
"""Linears that are listed as unsupported at most."""

GPU_RUNTIME_BYTES = 768 << 20
"""A CUDA context, torch's kernels and the BLAS library's workspace: what `nvidia-smi` shows of a process before its
first tensor, and what the first products add."""

CPU_RUNTIME_BYTES = 768 << 20
"""Resident memory of Python with torch and transformers imported."""

PICKLES = (".bin", ".pt", ".pth")


def main() -> None:
    """The worker's side."""
    asked = json.loads(sys.argv[1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is in the findings
            answer(examined(open_checkpoint(asked["model"], **asked["opening"])))
    except AwqRtError as error:
        answer({"code": error.code, "reason": error.args[0] if error.args else type(error).__name__})
    except NotImplementedError as error:
        answer({"code": "AWQ-CKPT-013", "reason": str(error)})
    except Exception as error:
        answer({"code": "AWQ-MODEL-004", "reason": f"{type(error).__name__}: {error}"})


def examined(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of a `Model`. Raises what opening a model raises, but for a model that needs code of its own."""
    target = registry.default_device()
    device = registry.device_for(target)
    dtype = _dtype(checkpoint, target)
    served, unsupported = _served(checkpoint, device, dtype)
    architecture, sizes, limit = _architecture(checkpoint)
    weights = sorted(path.name for path in locate(checkpoint.source).weights)
    return {
        "source": str(checkpoint.source),
        "architecture": architecture or ", ".join(map(str, checkpoint.config.get("architectures") or ["unknown"])),
        "layout": checkpoint.layout,
        "group_sizes": sorted({linear.group_size for linear in checkpoint.linears.values()}),
        "linears": len(checkpoint.linears),
        "file_bytes": checkpoint.nbytes,
        "served": [list(pair) for pair in served.items()],
        "unsupported": [list(pair) for pair in list(unsupported.items())[:MOST_NAMED]],
        "memory": memory(checkpoint, target, dtype),
        "tensor_parallel": sizes,
        "tensor_parallel_limit": limit,
        "remote_code": sorted(set(map(str, _auto_map(checkpoint).values()))),
        "needs_remote_code": not architecture,
        "pickles": [name for name in weights if name.endswith(PICKLES)],
        "warnings": list(checkpoint.warnings),
    }


def _dtype(checkpoint: Checkpoint, target: torch.device) -> torch.dtype:
    """What `load` chooses where nothing is asked for."""
    if target.type == "cpu":
        return torch.float32
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return torch.bfloat16 if own == "bfloat16" else torch.float16


def _served(checkpoint: Checkpoint, device: Device, dtype: torch.dtype) -> tuple[Counter[str], dict[str, str]]:
    """How many linears each backend serves, and why those that fall to the reference do."""
    served: Counter[str] = Counter()
    unsupported = {}
    answers: dict[LinearSpec, tuple[str, str]] = {}
    for name, linear in checkpoint.linears.items():
        spec = spec_of([linear], dtype, "auto")
        if spec not in answers:
            try:
                choice = registry.select(spec, device)
            except NoBackend as error:
                answers[spec] = ("none", error.args[0])
            else:
                slow = device.type != "cpu" and choice.backend.priority == 0
                why = "; ".join(f"{backend}: {refusal}" for backend, refusal in choice.refusals) if slow else ""
                answers[spec] = (choice.backend.name, why)
        backend, why = answers[spec]
        served[backend] += 1
        if why:
            unsupported[name] = why
    return served, unsupported


def _architecture(checkpoint: Checkpoint) -> tuple[str, list[int], str]:
    """(the model's class, legal numbers of processes, why no more); no class where it needs code of its own."""
    from ..models.architecture import architecture
    from ..models.placement import place
    from ..parallel.plan import plan

    try:
        config, model_class = architecture(checkpoint, trust_remote_code=False)
    except RemoteCodeRefused:
        return "", [1], "the architecture is not known without the checkpoint's own code"
    with torch.device("meta"):
        model = model_class(config)
    placement = place(model, checkpoint)
    sizes: list[int] = []
    for size in range(1, MOST_PROCESSES + 1):
        try:
            plan(model, placement, checkpoint, 0, size)
        except (CannotShard, NotImplementedError) as error:
            return model_class.__name__, sizes or [1], str(error.args[0]).partition(", and there are")[0]
        sizes.append(size)
    return model_class.__name__, sizes, ""


def memory(checkpoint: Checkpoint, target: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of `Memory`, in bytes.

    Weights are the packed linears with scales and zero points as stored, and dense tensors in `dtype`. While a model
    loads, packing the largest linear takes about three times its codes for a moment; while a prompt is read,
    activations of all its positions live in one layer. The larger of the two counts.
    """
    linears = checkpoint.linears.values()
    packed = sum(linear.in_features * linear.out_features // 2 for linear in linears)
    groups = sum(linear.shape.groups * linear.out_features * 3 for linear in linears)
    dense = sum(info.nbytes // info.dtype.itemsize for info in checkpoint.dense.values()) * dtype.itemsize
    text = checkpoint.config.get("text_config") or checkpoint.config
    positions = min(POSITIONS, _number(text, "max_position_embeddings", POSITIONS))
    hidden = _number(text, "hidden_size", max(linear.in_features for linear in linears))
    wide = max(max(linear.in_features, linear.out_features) for linear in linears)
    packing = 3 * max(linear.in_features * linear.out_features for linear in linears)
    reading = positions * dtype.itemsize * (4 * hidden + 3 * wide)
    free = available(target)
    return {
        "device": str(target),
        "weights": packed + groups + dense,
        "cache": positions * _position_bytes(text, hidden, dtype),
        "positions": positions,
        "moment": max(packing, reading),
        "runtime": CPU_RUNTIME_BYTES if target.type == "cpu" else GPU_RUNTIME_BYTES,
        "available": free,
    }


def _position_bytes(text: Mapping[str, Any], hidden: int, dtype: torch.dtype) -> int:
    """Keys and values of one position in all layers."""
    layers = _number(text, "num_hidden_layers", 0)
    heads = max(1, _number(text, "num_attention_heads", 1))
    kv_heads = _number(text, "num_key_value_heads", heads)
    head_dim = _number(text, "head_dim", hidden // heads)
    return 2 * layers * kv_heads * head_dim * dtype.itemsize


def _number(config: Mapping[str, Any], name: str, otherwise: int) -> int:
    found = config.get(name)
    return found if isinstance(found, int) and found > 0 else otherwise


def available(target: torch.device) -> int:
    """Bytes of memory that are free on `target` now. On a GPU this creates a context, in this process alone."""
    if target.type != "cpu":
        return int(getattr(torch, target.type).mem_get_info(target)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (OSError, ValueError, AttributeError):  # no such file, not a POSIX system
        return 0


def _auto_map(checkpoint: Checkpoint) -> Mapping[str, Any]:
    found = checkpoint.config.get("auto_map")
    return found if isinstance(found, dict) else {}
