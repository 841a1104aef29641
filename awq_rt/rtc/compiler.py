"""What a run-time compiler must offer, and how it fails."""

from __future__ import annotations

from typing import Protocol

from ..errors import BackendError
from .program import Program


class CompileFailed(BackendError):
    """The compiler refused a kernel. The message carries its log, the options and the target."""

    code = "AWQ-RTC-001"


class CompileForbidden(BackendError):
    """A kernel is not in the cache and `AWQ_RT_NO_COMPILE` is set."""

    code = "AWQ-RTC-002"


class Compiler(Protocol):
    """Turns a program into machine code for exactly its target."""

    @property
    def version(self) -> str:
        """Its name and version, as part of the cache key: `nvrtc 13.0`."""

    def compile(self, program: Program) -> bytes:
        """The machine code. Raises `CompileFailed`. Called from several threads at once."""
