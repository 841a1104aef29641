"""Whether what the backend stands on is there: torch for CUDA, NVRTC, a driver new enough. Each with its fix."""

from __future__ import annotations

import torch

from awq_rt.devices import Refusal

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
