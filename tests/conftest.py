"""Fixtures every test may use. The cache folder is a temporary one: no test reads what an earlier run left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
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


@pytest.fixture
def registered() -> Iterator[None]:
    """transformers' own `from_pretrained` loads on awq_rt while the test runs."""
    import awq_rt

    awq_rt.register()
    yield
    awq_rt.unregister()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny random Llama in 4 bits, the test's own."""
    from tiny import build, config_of

    build(tmp_path / "llama", config_of("llama"))
    return tmp_path / "llama"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama of two blocks; not to be written to."""
    from dense import write_dense

    folder = tmp_path_factory.mktemp("dense") / "llama"
    write_dense(folder)
    return folder
