"""From a program to its machine code: the cache first, the compiler when it must."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from .compiler import CompileForbidden, Compiler
from .program import Program
from .store import KernelStore

NO_COMPILE = "AWQ_RT_NO_COMPILE"


class Builder:
    """A compiler with a store in front of it, and what this process has built already. Safe to share among threads."""

    def __init__(self, compiler: Compiler, store: KernelStore | None = None) -> None:
        self.compiler = compiler
        self.store = store or KernelStore()
        self.compiled = 0  # how often the compiler ran; what `warmup` reports
        self._built: dict[str, bytes] = {}
        self._count_lock = threading.Lock()

    def machine_code(self, program: Program) -> bytes:
        """The code of `program`. Raises `CompileFailed`, or `CompileForbidden` where compiling is switched off."""
        key = program.key(self.compiler.version)
        if key in self._built:
            return self._built[key]
        code = self.store.read(key)
        if code is None:
            if os.environ.get(NO_COMPILE, "0") not in ("", "0"):
                raise CompileForbidden(
                    f"{program} is not in {self.store.folder} for {self.compiler.version}, and {NO_COMPILE} forbids "
                    "compiling it; run once without it, or `awq-rt warmup`, with the same AWQ_RT_CACHE"
                )
            with self.store.lock(key):
                code = self.store.read(key)  # another process may have compiled it while this one waited
                if code is None:
                    code = self.compiler.compile(program)
                    self.store.write(key, code)
                    with self._count_lock:
                        self.compiled += 1
        self._built[key] = code
        return code

    def machine_codes(
        self, programs: Sequence[Program], progress: Callable[[int, int], None] | None = None
    ) -> list[bytes]:
        """The code of each, compiled side by side. `progress` hears (done, all) after each one."""
        with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            codes = []
            for done, code in enumerate(pool.map(self.machine_code, programs), start=1):
                codes.append(code)
                if progress is not None:
                    progress(done, len(programs))
            return codes
