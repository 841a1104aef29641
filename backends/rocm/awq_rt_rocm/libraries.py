"""Where ROCm's libraries are: those that torch itself brought, `rocm_sdk` wheels, or a ROCm of the system.

hip-python finds the last two. Libraries inside a ROCm wheel of torch it does not know, and loading another copy of
the runtime into the same process would be worse than finding none, so torch's own win.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import torch

SEARCH = "ROCM_PATH"


def torch_root() -> Path | None:
    """torch's folder when `lib/libamdhip64.so` lies in it and no `rocm_sdk` wheel does the job."""
    root = Path(torch.__file__).parent
    has_own = (root / "lib" / "libamdhip64.so").exists()
    return root if has_own and importlib.util.find_spec("rocm_sdk") is None else None


def environment() -> dict[str, str]:
    """The environment in which hip-python finds the same libraries as torch."""
    root = torch_root()
    return {**os.environ, SEARCH: str(root)} if root is not None else dict(os.environ)


@contextlib.contextmanager
def search_path() -> Iterator[None]:
    """The same for this process, as long as a first call loads the library."""
    before = os.environ.get(SEARCH)
    os.environ.update(environment())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SEARCH, None)
        else:
            os.environ[SEARCH] = before
