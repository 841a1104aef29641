"""Whether what the backend stands on is there: torch for ROCm, the HIP runtime, hipRTC. Each with its fix."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from awq_rt.devices import Refusal, Tool

from . import driver, hiprtc, libraries

INSTALL_TORCH = "install torch for ROCm (https://pytorch.org/get-started/locally/)"
OLDEST = (6, 0)
"""ROCm 6.0: the first whose hipRTC knows gfx942, and that PyTorch 2.10 is still built for."""


def missing() -> Refusal | None:
    """The first requirement that is not met; None when all are. Creates no device context."""
    if torch.version.hip is None:
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without a GPU platform"
        return Refusal("AWQ-ROCM-014", f"torch {torch.__version__} is built {built}, not for ROCm", INSTALL_TORCH)
    try:
        found = driver.version()
    except ImportError as error:
        return Refusal("AWQ-ROCM-016", f"hip-python cannot be imported ({error})", "pip install hip-python")
    except Exception as error:  # hip-python raises RuntimeError when the library is not found
        return Refusal("AWQ-ROCM-017", f"the HIP runtime does not answer ({error})", "install or update ROCm")
    if found < OLDEST:
        return Refusal(
            "AWQ-ROCM-018",
            f"the HIP runtime is {found[0]}.{found[1]}; {OLDEST[0]}.{OLDEST[1]} or later is needed",
            "update ROCm, or install a build of torch that brings a newer one",
        )
    try:
        _ = hiprtc.Hiprtc().version
    except Exception as error:
        return Refusal("AWQ-ROCM-021", str(error), "install or update ROCm")
    return None


def tools() -> tuple[Tool, ...]:
    """hipRTC and the HIP runtime, and where they are looked for. Kernels include no header but their own."""
    root = str(libraries.torch_root() or os.environ.get(libraries.SEARCH, "where hip-python finds them"))
    return (
        Tool("hipRTC", hiprtc.Hiprtc().version.removeprefix("hiprtc "), root),
        Tool("HIP runtime", ".".join(map(str, driver.version())), root),
        Tool("headers", "none but the kernels' own", str(Path(__file__).parent / "kernels")),
    )
