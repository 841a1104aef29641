"""A simulator of AMD GPUs' instruction sets: executes compiled code objects on the CPU and checks what they do.

    codeobject.py   the ELF file: image, kernel descriptors, the compiler's notes
    disassembly.py  machine code -> instructions, by LLVM
    operands.py     an instruction's operands -> where values come from
    vector.py, packed.py, matrix.py, scalar.py, access.py, lanes.py   what instructions do
    state.py        registers of all waves, with what in them is not initialised
    memory.py       device memory and LDS, with bounds, writes and races checked
    machine.py      registers at the start, the order of waves, barriers, counts

A development tool: it says whether a kernel is right, not how fast it is. README.md tells what it does not model.
"""

from .codeobject import CodeObject, Kernel
from .errors import (
    BadOperand,
    Deadlock,
    OutOfBounds,
    Race,
    ReadOnly,
    SimulationError,
    Uninitialised,
    Unmodelled,
)
from .machine import Counts, In, InOut, Out, Program
from .targets import TARGETS, Target, target_of

__all__ = [
    "TARGETS",
    "BadOperand",
    "CodeObject",
    "Counts",
    "Deadlock",
    "In",
    "InOut",
    "Kernel",
    "Out",
    "OutOfBounds",
    "Program",
    "Race",
    "ReadOnly",
    "SimulationError",
    "Target",
    "Uninitialised",
    "Unmodelled",
    "target_of",
]
