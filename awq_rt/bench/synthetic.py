"""A checkpoint of random weights, made where they are needed: a model of any shape with no download and no file."""

from __future__ import annotations

import re
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, StoredLinear
from ..checkpoint.config import parse
from ..conversion import describe, stored_tensors
from ..errors import InvalidConfig
from ..formats import LinearShape, TensorInfo
from ..weights import AwqWeight
from .shapes import SHAPES

WEIGHT_STD = 0.02
"""Of every matrix, as in trained models of this size: neither activations nor logits leave float16's range."""

ZERO_POINTS = (6, 10)
"""Zero points lie in [6, 10), around the mean of the codes, so that weights have a mean of nearly 0."""

CODE_STD = ((16**2 - 1 + 4**2 - 1) / 12) ** 0.5
"""Of codes less zero points: two uniform distributions of 16 and of 4 values."""

ROUTERS = re.compile(r".*\.(gate|shared_expert_gate)\.weight")
"""Matrices inside a layer that AWQ tools leave dense: which expert is chosen."""


class SyntheticCheckpoint(Checkpoint):
    """A gemm checkpoint of the shape `name`, for `awq_rt.load`. Tensors are made on `device` when they are read.

    The same name gives the same values every time. `root` holds config.json alone, and goes with this object.
    Raises `InvalidConfig` for an unknown name.
    """

    def __init__(self, name: str, device: torch.device):
        if name not in SHAPES:
            raise InvalidConfig(f"there is no shape {name!r}; choose one of {', '.join(SHAPES)}")
        self.name, self.device = name, device
        folder = tempfile.TemporaryDirectory(prefix=f"awq_rt-{name}-")
        weakref.finalize(self, folder.cleanup)
        self.root = self.source = Path(folder.name)
        config = SHAPES[name].config()
        group_size = SHAPES[name].group_size
        self.linears, self.dense = _tensors(config, group_size)
        self.layout = "gemm"
        self.config = config.to_dict() | {"quantization_config": describe(self.layout, group_size, dense=[])}
        self.quantization = parse(self.config["quantization_config"], f"the shape {name}")
        config.save_pretrained(self.root)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        packed = sum(linear.nbytes for linear in self.linears.values())
        return packed + sum(info.nbytes for info in self.dense.values())

    def read(self, name: str, device: torch.device | str = "cpu") -> AwqWeight:
        """The linear `name`, made on `device`."""
        linear = self.linears[name]
        shape, random = linear.shape, self._generator(name, device)
        by_group = (shape.groups, shape.out_features)

        def integers(low: int, high: int, size: tuple[int, int]) -> Tensor:
            return torch.randint(low, high, size, dtype=torch.uint8, device=device, generator=random)

        codes = integers(0, 16, (shape.in_features, shape.out_features))
        zeros = integers(*ZERO_POINTS, by_group)
        spread = torch.rand(by_group, device=device, generator=random) + 0.5  # of mean 1
        scales = (spread * (WEIGHT_STD / CODE_STD)).half()
        bias = None
        if linear.bias:
            bias = (torch.randn(shape.out_features, device=device, generator=random) * WEIGHT_STD).half()
        return AwqWeight(codes, zeros, scales, bias)

    def view(self, name: str) -> Tensor:
        """The dense tensor `name`, made on the checkpoint's device: matrices around 0, the scales of norms around 1."""
        info = self.dense[name]
        values = torch.randn(
            info.shape, dtype=info.dtype, device=self.device, generator=self._generator(name, self.device)
        )
        values.mul_(WEIGHT_STD)
        return values.add_(1) if len(info.shape) == 1 and name.endswith(".weight") else values

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as a file would hold it, on the CPU."""
        for name in self.linears:
            packed = stored_tensors(self.read(name, self.device), self.layout)
            yield from ((f"{name}.{suffix}", tensor.cpu()) for suffix, tensor in packed.items())
        yield from ((name, self.view(name).cpu()) for name in self.dense)

    def _generator(self, name: str, device: torch.device | str) -> torch.Generator:
        return torch.Generator(device).manual_seed(zlib.crc32(name.encode()))

    def __repr__(self) -> str:
        return f"SyntheticCheckpoint({self.name!r}, {len(self)} linears, {self.nbytes / 1e9:.2f} GB)"


def _tensors(config: Any, group_size: int) -> tuple[dict[str, StoredLinear], dict[str, TensorInfo]]:
    """(packed linears, dense tensors) of a checkpoint of `config`, under the names that it has in files."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    tied = model.all_tied_weights_keys
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    infos = {
        name: TensorInfo(name, tuple(tensor.shape), torch.float16)
        for name, tensor in revert_weight_conversion(model, state).items()
    }
    linears = {}
    for name, info in list(infos.items()):
        if len(info.shape) == 2 and ".layers." in name and not ROUTERS.fullmatch(name):
            prefix = name.removesuffix(".weight")
            bias = infos.pop(f"{prefix}.bias", None)
            shape = LinearShape(info.shape[1], info.shape[0], group_size)
            linears[prefix] = _stored_linear(prefix, shape, bias)
            del infos[name]
    return linears, infos


def _stored_linear(name: str, shape: LinearShape, bias: TensorInfo | None) -> StoredLinear:
    """The headers that AutoAWQ's GEMM layout has for a linear of this shape."""
    words = shape.out_features // 8
    headers = {
        "qweight": TensorInfo(f"{name}.qweight", (shape.in_features, words), torch.int32),
        "qzeros": TensorInfo(f"{name}.qzeros", (shape.groups, words), torch.int32),
        "scales": TensorInfo(f"{name}.scales", (shape.groups, shape.out_features), torch.float16),
    }
    return StoredLinear(name, "gemm", shape, headers if bias is None else {**headers, "bias": bias})
