"""All in this folder needs an NVIDIA GPU that torch and awq-rt-cuda can use; elsewhere it is skipped, saying why."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """The device that the tests run on."""
    backend = pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed").backend
    probe = backend.probe()
    if not probe.devices:
        pytest.skip("; ".join(map(str, probe.refusals)))
    return torch.device("cuda", 0)
