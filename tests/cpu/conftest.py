"""All in this folder needs awq-rt-cpu, which a C++ compiler builds; where it is not, it is skipped, saying why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

try:
    from awq_rt_cpu import _native
except ModuleNotFoundError as error:
    ABSENT, ISAS = f"{error}: `pip install -e backends/cpu` builds it", []
else:
    ABSENT, ISAS = "", [name for name, _ in _native.offered()]


class AbsentModule(pytest.Module):
    """A test file that cannot be imported here."""

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        pytest.skip(ABSENT, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return AbsentModule.from_parent(parent, path=module_path) if ABSENT else None


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, in force while the test runs."""
    before, _ = _native.chosen()
    _native.choose(request.param)
    yield request.param
    _native.choose(before)


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
