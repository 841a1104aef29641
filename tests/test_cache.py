"""The folder of what can be computed again: whose it is, and that nothing in it is half-written."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from awq_rt import cache
from awq_rt.rtc.store import KernelStore


@pytest.fixture(autouse=True)
def forgotten() -> None:
    cache._unless_shared.cache_clear()


def test_new_folders_are_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_RT_CACHE", str(tmp_path / "cache"))
    KernelStore().write("key", b"code")
    cache.write_json(cache.cache_dir() / "plugins" / "one.json", {})
    for folder in (tmp_path / "cache" / "kernels", tmp_path / "cache" / "plugins"):
        assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_cache_that_everybody_may_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_RT_CACHE", str(tmp_path))
    KernelStore().write("key", b"planted")
    tmp_path.chmod(0o777)
    cache._unless_shared.cache_clear()
    with pytest.warns(RuntimeWarning, match="chmod o-w"):
        assert cache.cache_dir() != tmp_path
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert KernelStore().read("key") is None
    tmp_path.chmod(0o755)
    cache._unless_shared.cache_clear()
    assert KernelStore().read("key") == b"planted"
