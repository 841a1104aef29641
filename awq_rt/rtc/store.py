"""Machine code on disk, by content: `<cache>/kernels/<key>`.

An entry is its own checksum and the code. It appears whole, by a rename, or not at all; what does not match its
checksum counts as absent and is written again. A folder that cannot be written costs a compile a process, never an
error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from .. import cache

MAGIC = b"awq_rt kernel 1\n"
DIGEST_BYTES = hashlib.sha256().digest_size


class KernelStore:
    """The entries under `folder`; the default is the user's cache."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache.cache_dir() / "kernels"
        self._warned = False

    def read(self, key: str) -> bytes | None:
        """The code stored under `key`; None when there is none, or when it is damaged."""
        try:
            entry = (self.folder / key).read_bytes()
        except OSError:
            return None
        digest, code = entry[len(MAGIC) : len(MAGIC) + DIGEST_BYTES], entry[len(MAGIC) + DIGEST_BYTES :]
        if not entry.startswith(MAGIC) or hashlib.sha256(code).digest() != digest:
            return None
        return code

    def write(self, key: str, code: bytes) -> None:
        """Store `code`. Warns once when the folder cannot be written."""
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".new-", delete=False) as file:
                temporary = file.name
                file.write(MAGIC + hashlib.sha256(code).digest() + code)
            os.replace(temporary, self.folder / key)
        except OSError as error:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"compiled kernels cannot be kept in {self.folder} ({error}): every process will compile them "
                    "again; set AWQ_RT_CACHE to a folder that can be written",
                    RuntimeWarning,
                    stacklevel=4,
                )

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Held by one process a key at a time, so that two that start together compile once.

        The kernel drops the lock when its holder dies. Where there is no lock to be had (a read-only folder, a file
        system without locks) both compile, which is only slower: entries are replaced whole.
        """
        handle = None
        try:
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self.folder / f".lock-{key[:2]}", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        try:
            yield
        finally:
            if handle is not None:
                os.close(handle)
