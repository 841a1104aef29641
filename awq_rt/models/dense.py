"""A dense tensor that is read when transformers asks for it, in the dtype that the model wants.

transformers takes any value with the interface of safetensors' slices. Read one at a time, the file's pages go as soon
as they were converted. The dtype is settled here because older releases (5.16, 5.17) leave what they rename uncast.
"""

from __future__ import annotations

from types import EllipsisType

import torch
from torch import Tensor

from ..checkpoint import Checkpoint

CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""safetensors' names of floating dtypes; transformers asks whether a name begins with F or BF."""


class DenseTensor:
    """The dense tensor `name` of `checkpoint`. `dtype` is set when the model is known; None keeps the file's."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint = checkpoint
        self._name = name
        self.info = checkpoint.dense[name]
        self.dtype: torch.dtype | None = None

    def get_dtype(self) -> str:
        return CODES.get(self.info.dtype, "I64")

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def __getitem__(self, index: EllipsisType | slice | tuple[slice, ...]) -> Tensor:
        tensor = self._checkpoint.view(self._name)[index]
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor
