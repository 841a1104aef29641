"""Everything that decides the result of a run, in one value that an unfinished run is compared by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ..errors import InvalidSetting, UnknownLayout
from ..formats import WRITABLE
from .grid import Scheme
from .scaling import Search

GRIDS = {"both": Search(), "autoawq": Search(original=False), "original": Search(autoawq=False)}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Settings:
    """How to quantise. `group_size` -1 is one group a row; `skip` are parts of names of linears to leave alone.

    `damping` enlarges the diagonals of second moments, for the feedback only; None: by what the text leaves uncertain.
    `tuning` is the number of steps in which scales and norms are tuned in the end, the whole model in memory.
    """

    method: Literal["awq", "rtn"] = "awq"
    group_size: int = 128
    zero_point: bool = True
    layout: str = "gemm"
    dtype: str = "float16"
    grid: str = "both"
    clip: bool = True
    rounding: Literal["feedback", "nearest"] = "feedback"
    damping: float | None = None
    tuning: int = 0
    samples: int = 128
    length: int = 512
    seed: int = 0
    skip: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        choices = {
            "method": ("awq", "rtn"), "rounding": ("feedback", "nearest"), "dtype": tuple(DTYPES), "grid": tuple(GRIDS),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InvalidSetting(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.layout not in WRITABLE:
            raise UnknownLayout(f"layout {self.layout!r} cannot be written; choose one of {', '.join(WRITABLE)}")
        if self.group_size != -1 and self.group_size < 1:
            raise InvalidSetting(f"group_size is {self.group_size}; a positive number or -1 (a row) is expected")
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name} is {getattr(self, name)}; at least 1 is expected")
        if self.tuning < 0 or (self.tuning and self.method == "rtn"):
            raise InvalidSetting(f"tuning is {self.tuning} with method {self.method}; 0 or, with awq, more is expected")
        if self.damping is not None and not self.damping >= 0:
            raise InvalidSetting(f"damping is {self.damping}; 0 or more is expected")

    def scheme(self, in_features: int) -> Scheme:
        """How a linear with that many inputs is stored."""
        size = in_features if self.group_size == -1 else self.group_size
        # AutoAWQ's layouts are read by kernels that know float16 scales only.
        scales = self.stored_dtype if self.layout == "compressed-tensors" else torch.float16
        return Scheme(size, not self.zero_point, scales)

    @property
    def search(self) -> Search:
        return GRIDS[self.grid]

    @property
    def stored_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "skip": list(self.skip)}
