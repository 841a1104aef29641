"""What selection knows of a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """What selection knows of a GPU."""

    arch: int  # 90 for compute capability 9.0
    multiprocessors: int
    shared_bytes: int  # that one block may have
    multiprocessor_shared_bytes: int
    threads: int  # that a multiprocessor holds

    @property
    def clusters(self) -> bool:
        """Whether blocks can read each other's shared memory."""
        return self.arch >= 90
