"""What a simulated kernel can do wrong, one class a fault, and what the simulator refuses to guess."""

from __future__ import annotations


class SimulationError(Exception):
    """Base of all that stops a simulation. The machine adds the instruction and the wave."""


class Unmodelled(SimulationError):
    """An instruction, operand, modifier or mode that the simulator does not know. It never guesses."""


class OutOfBounds(SimulationError):
    """An access outside every buffer, or outside the workgroup's LDS."""


class ReadOnly(SimulationError):
    """A store to a buffer that the kernel may only read, or to the code object."""


class Uninitialised(SimulationError):
    """An address, a branch, a mask or a stored value depends on a register or memory that nothing wrote."""


class Race(SimulationError):
    """Two waves touch the same byte of LDS with no barrier between, and one of them writes."""


class Deadlock(SimulationError):
    """Waves wait at a barrier that the others never reach, or a kernel does not end."""


class BadOperand(SimulationError):
    """A matrix instruction's operand breaks a rule of the architecture: halves that differ, lanes switched off."""
