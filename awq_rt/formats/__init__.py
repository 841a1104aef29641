"""Every way a 4-bit AWQ linear is stored on disk, one module a packing, each to and from the canonical weight.

    gemm                 AutoAWQ, auto-round, GPTQModel; also llm-awq's first generation
    gemv                 AutoAWQ's gemv; llm-awq's second generation
    gemv_fast            AutoAWQ's gemv_fast
    llm_awq              llm-awq's third generation ("v2"), the same words with other zeros
    marlin               AutoAWQ's symmetric marlin
    compressed_tensors   llm-compressor's pack-quantized, group or channel

The layout is decided from the tensors; a configuration can only confirm it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import MissingTensor, UnsupportedFormat
from . import compressed_tensors, gemm, gemv, gemv_fast, llm_awq, marlin
from .layout import Layout, LinearShape, TensorInfo, WritableLayout

WRITABLE: Mapping[str, WritableLayout] = {layout.NAME: layout for layout in (gemm, gemv, gemv_fast, compressed_tensors)}
READ_ONLY: Mapping[str, Layout] = {layout.NAME: layout for layout in (llm_awq, marlin)}
LAYOUTS: Mapping[str, Layout] = {**WRITABLE, **READ_ONLY}

SUFFIXES = frozenset(suffix for layout in LAYOUTS.values() for suffix in layout.SUFFIXES)
"""Last parts of the names of tensors that may belong to a packed linear."""

MARKERS = ("qweight", "weight_packed")
"""A linear is packed exactly where one of these exists."""

__all__ = [
    "LAYOUTS",
    "MARKERS",
    "SUFFIXES",
    "WRITABLE",
    "Layout",
    "LinearShape",
    "TensorInfo",
    "WritableLayout",
    "identify",
]


def identify(name: str, stored: Mapping[str, TensorInfo]) -> Layout:
    """The layout of the linear `name`, from the tensors under its prefix alone.

    Raises `UnsupportedFormat`, or `MissingTensor` for words without scales.
    """
    for layout in LAYOUTS.values():
        if layout.matches(stored):
            return layout
    found = ", ".join(str(info) for info in stored.values())
    if not stored.keys() & {"scales", "weight_scale"}:
        raise MissingTensor(f"{name} has {found} but no scales; download the checkpoint again, or it is no AWQ one")
    if _is_gptq(stored):
        raise UnsupportedFormat(
            f"{name} is packed in the GPTQ layout ({found}), which is not AWQ; "
            "load it with GPTQModel, or look for an AWQ checkpoint of the model"
        )
    raise UnsupportedFormat(
        f"{name} is packed in no layout that awq_rt knows; found {found}; known are {', '.join(LAYOUTS)}"
    )


def _is_gptq(stored: Mapping[str, TensorInfo]) -> bool:
    if stored.keys() & {"g_idx", "weight_g_idx"}:
        return True
    if not {"qweight", "qzeros", "scales"} <= stored.keys():
        return False
    qweight, scales = stored["qweight"].shape, stored["scales"].shape
    return len(qweight) == len(scales) == 2 and qweight[1] == scales[1]
