"""Device code compiled when it is first needed, on the machine that runs it.

    Program (program.py)      one translation unit: a source and what it includes, defines, target
      -> Compiler             NVRTC or hipRTC, behind a protocol (compiler.py)
      -> KernelStore          content-addressed files that survive the process (store.py)
      -> machine code         (build.py)

Nothing here knows a GPU API: a backend brings its `Compiler`, and loads and launches what comes back.
"""

from .build import Builder, Built
from .compiler import CompileFailed, CompileForbidden, Compiler
from .program import Program
from .store import KernelStore

__all__ = ["Builder", "Built", "CompileFailed", "CompileForbidden", "Compiler", "KernelStore", "Program"]
