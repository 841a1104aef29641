"""From a program to its machine code: the cache first, the compiler when it must."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .compiler import CompileForbidden, Compiler
from .program import Program
from .store import KernelStore

NO_COMPILE = "AWQ_RT_NO_COMPILE"
NAMED = 12
"""Programs that a message names at most."""


@dataclass(frozen=True, slots=True)
class Built:
    """A program's machine code. `compiled` says that the compiler made it just now; else it was in the cache."""

    program: Program
    code: bytes
    compiled: bool


class Builder:
    """A compiler with a store in front of it, and what this process has built already. Safe to share among threads."""

    def __init__(self, compiler: Compiler, store: KernelStore | None = None) -> None:
        self.compiler = compiler
        self.store = store or KernelStore()
        self._built: dict[str, bytes] = {}

    def machine_code(self, program: Program) -> bytes:
        """The code of `program`. Raises `CompileFailed`, or `CompileForbidden` where compiling is switched off."""
        return self._build(program).code

    def build(self, programs: Sequence[Program]) -> Iterator[Built]:
        """Each of `programs`, in their order; those that must be compiled are compiled side by side.

        Where compiling is switched off, `CompileForbidden` names all that would have to be.
        """
        if _forbidden() and (absent := [program for program in programs if self._stored(program) is None]):
            raise self._refused(absent)
        pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
        try:
            yield from pool.map(self._build, programs)
        finally:  # one that failed ends the others that wait
            pool.shutdown(cancel_futures=True)

    def machine_codes(
        self, programs: Sequence[Program], progress: Callable[[int, int], None] | None = None
    ) -> list[bytes]:
        """The code of each of `programs`, as `build` makes them. `progress` hears (done, all) after each one."""
        codes = []
        for done, built in enumerate(self.build(programs), start=1):
            codes.append(built.code)
            if progress is not None:
                progress(done, len(programs))
        return codes

    def _build(self, program: Program) -> Built:
        code = self._stored(program)
        if code is not None:
            return Built(program, code, compiled=False)
        if _forbidden():
            raise self._refused([program])
        key = program.key(self.compiler.version)
        with self.store.lock(key):
            code = self.store.read(key)  # another process may have compiled it while this one waited
            compiled = code is None
            if code is None:
                code = self.compiler.compile(program)
                self.store.write(key, code)
        self._built[key] = code
        return Built(program, code, compiled)

    def _stored(self, program: Program) -> bytes | None:
        key = program.key(self.compiler.version)
        code = self._built.get(key)
        if code is None and (code := self.store.read(key)) is not None:
            self._built[key] = code
        return code

    def _refused(self, absent: Sequence[Program]) -> CompileForbidden:
        names = [str(program) for program in absent[:NAMED]] + ["..."] * (len(absent) > NAMED)
        what = "1 kernel is" if len(absent) == 1 else f"{len(absent)} kernels are"
        return CompileForbidden(
            f"{what} not in {self.store.folder} for {self.compiler.version}, and {NO_COMPILE} forbids compiling: "
            f"{'; '.join(names)}. Run `awq-rt warmup`, or once without {NO_COMPILE}, with the same AWQ_RT_CACHE"
        )


def _forbidden() -> bool:
    return os.environ.get(NO_COMPILE, "0") not in ("", "0")
