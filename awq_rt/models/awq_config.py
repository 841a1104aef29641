"""What transformers' `AwqConfig` took until 5.0, taken again: the kernels of AutoAWQ, and its fused modules.

transformers 5 refuses the versions "exllama", "ipex" and "marlin" and drops `do_fuse`, `fuse_max_seq_len`,
`modules_to_fuse` and `exllama_config` without a word. The class is changed where it is, not replaced: a program may
have imported it already.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.utils.quantization_config import AwqConfig, AwqFormat

from ..checkpoint.config import VERSIONS
from ..errors import InvalidConfig

OWN = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config")
ARGUMENTS = "awq_rt_arguments"
"""The attribute of a checkpoint's `AwqConfig` that holds the one that the caller passed, if any."""

EXLLAMA = ("exllama", "exllamav2", "exllama_v1", "exllama_v2")
CHOSEN_HERE = ("auto", "auto_trainable", "autoawq", None)
"""Values of `backend` that leave the choice to the loader."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the caller of `from_pretrained` asked of the load.

    `fuse` is "auto", False, True or AWQ's `modules_to_fuse`; `kernel` a family that is to be preferred, or "auto".
    """

    fuse: bool | str | Mapping[str, Any] = "auto"
    max_seq_len: int | None = None
    kernel: str = "auto"


def wishes_of(config: Any) -> Wishes:
    """The wishes in the `AwqConfig` that was passed beside a checkpoint's own. Raises `InvalidConfig`."""
    asked = getattr(config, ARGUMENTS, None)
    if asked is None:
        return Wishes()
    length = asked.fuse_max_seq_len
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
        raise InvalidConfig(f"AwqConfig has fuse_max_seq_len {length!r}; a number of positions is expected")
    if asked.modules_to_fuse is not None and not isinstance(asked.modules_to_fuse, Mapping):
        raise InvalidConfig(f"AwqConfig has modules_to_fuse {asked.modules_to_fuse!r}; a mapping is expected")
    if asked.do_fuse is False:
        return Wishes(False, length, _kernel(asked))
    if asked.do_fuse and length is None:
        raise InvalidConfig("AwqConfig has do_fuse=True without fuse_max_seq_len; say how long a text may become")
    return Wishes(asked.modules_to_fuse or asked.do_fuse or "auto", length, _kernel(asked))


def _kernel(asked: Any) -> str:
    """The family of kernels that `version` or `backend` names; the others of GPTQModel are not here, which is said."""
    backend = getattr(asked.backend, "value", asked.backend)
    if asked.version in EXLLAMA or backend in EXLLAMA:
        return "exllama"
    if backend not in CHOSEN_HERE:
        warnings.warn(
            f"AwqConfig has backend {backend!r}, a kernel of GPTQModel; awq_rt chooses its own for each linear",
            RuntimeWarning,
            stacklevel=2,
        )
    return "auto"


def widened() -> dict[str, Callable[..., Any]]:
    """Methods for `AwqConfig` by name, each round the one that is there now."""
    create, loading, to_dict = AwqConfig.__init__, AwqConfig.get_loading_attributes, AwqConfig.to_dict

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        for name in OWN:
            setattr(self, name, kwargs.pop(name, None))
        self.version = str(kwargs.get("version") or kwargs.get("format") or "gemm").lower()
        if self.version in VERSIONS and self.version not in AwqFormat.__members__.values():
            kwargs["version"] = "gemm"  # a kernel's name; what the tensors are is read from the tensors
        create(self, *args, **kwargs)

    def get_loading_attributes(self: Any) -> dict[str, Any]:
        return {**loading(self), ARGUMENTS: self}

    def as_dict(self: Any) -> dict[str, Any]:
        stated = to_dict(self)
        unsaid = {ARGUMENTS, *(name for name in OWN if getattr(self, name) is None)}
        return {key: value for key, value in stated.items() if key not in unsaid}

    return {"__init__": __init__, "get_loading_attributes": get_loading_attributes, "to_dict": as_dict}
