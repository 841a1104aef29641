"""Whether what the backend stands on is there: torch for CUDA, NVRTC, a driver new enough. Each with its fix."""

from __future__ import annotations

from pathlib import Path

import torch

from awq_rt.devices import Device, Refusal, Tool
from awq_rt.rtc import CompileFailed

from . import driver, nvrtc


def missing() -> Refusal | None:
    """The first requirement that is not met; None when all are. Creates no device context."""
    cuda = torch.version.cuda
    if cuda is None:
        return Refusal(
            "AWQ-CUDA-014",
            f"torch {torch.__version__} is built without CUDA",
            "install torch for CUDA (https://pytorch.org/get-started/locally/)",
        )
    extra = f"cu{cuda.split('.')[0]}"
    try:
        version = nvrtc.Nvrtc().version
    except Exception as error:  # the bindings raise RuntimeError or their own classes when the library is not found
        return Refusal("AWQ-CUDA-016", f"NVRTC cannot be loaded ({error})", f"pip install 'awq-rt-cuda[{extra}]'")
    try:
        serves = driver.driver_version()
    except Exception as error:
        return Refusal("AWQ-CUDA-017", f"the NVIDIA driver does not answer ({error})", "reinstall the driver")
    if serves[0] < int(version.split()[1].split(".")[0]):
        return Refusal(
            "AWQ-CUDA-018",
            f"the driver serves CUDA {serves[0]}.{serves[1]}, older than {version}",
            f"update the driver, or install torch and awq-rt-cuda for cu{serves[0]}",
        )
    return None


def unknown(device: Device) -> Refusal | None:
    """Why NVRTC cannot compile for `device`; None when it can. What `missing` looks for is there."""
    try:
        nvrtc.target(device.arch)
    except CompileFailed as error:
        extra = f"cu{(torch.version.cuda or '13').split('.')[0]}"
        return Refusal("AWQ-CUDA-015", str(error.args[0]), f"pip install --upgrade 'awq-rt-cuda[{extra}]'")
    return None


def tools() -> tuple[Tool, ...]:
    """NVRTC and where it was found. Kernels include no header but their own, which are in the sources' folder."""
    from cuda import pathfinder

    library = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path or ""
    return (
        Tool("NVRTC", nvrtc.Nvrtc().version.removeprefix("nvrtc "), library),
        Tool("headers", "none but the kernels' own", str(Path(__file__).parent / "kernels")),
    )
