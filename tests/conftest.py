"""Fixtures every test may use. The cache folder is a temporary one: no test reads what an earlier run left."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

os.environ["AWQ_RT_CACHE"] = tempfile.mkdtemp(prefix="awq_rt-test-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Checkpoints and vectors made by other software; too large for this repository."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip("../shared is not here")
    return SHARED
