"""Runs one kernel of a code object: decodes it, sets the registers up as the hardware does, and executes its waves.

Waves advance together as long as they agree on where they are; those behind go first, so that they meet again after a
branch. A barrier holds a wave until every wave of its workgroup that has not ended is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from . import access, exchange, matrix, packed
from .codeobject import CodeObject, Kernel
from .disassembly import Instruction, branch_target, disassemble
from .errors import Deadlock, SimulationError, Uninitialised, Unmodelled
from .memory import DeviceMemory, Lds
from .scalar import Scalars
from .state import EXEC, TTMP, Place, Wavefronts
from .targets import Target, target_of
from .vector import Decoder, Step

MEMORY_SLACK = 1 << 20
INSTRUCTION_LIMIT = 20_000_000
"""Of one launch, over all waves: more is taken for a loop that never ends."""
ROUND_TO_NEAREST_KEEP_SUBNORMALS = 0b1111_0000
"""rsrc1 bits 12 to 19: rounding modes and subnormals, the only setting that is modelled."""


@dataclass(frozen=True, slots=True)
class In:
    """An input buffer: the kernel may only read it. `written` bytes of it count as initialised, by default all."""

    array: npt.NDArray[Any]
    written: int | None = None


@dataclass(frozen=True, slots=True)
class Out:
    """An output buffer, updated in place. The kernel must write every byte of it before it reads one."""

    array: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class InOut:
    """A buffer that holds something and may be written."""

    array: npt.NDArray[Any]


@dataclass(slots=True)
class Counts:
    """What a launch executed: instructions by name, each counted once a wave, and bytes that lanes moved."""

    instructions: Counter[str] = field(default_factory=Counter)
    bytes_loaded: int = 0
    bytes_stored: int = 0
    unwritten: dict[int, int] = field(default_factory=dict)  # by argument, bytes of an `Out` that nothing wrote


@dataclass(frozen=True, slots=True)
class Decoded:
    """One instruction ready to execute. `control` is "", "branch", "barrier", "end"; a branch asks `condition`."""

    instruction: Instruction
    steps: tuple[Step, ...]
    control: str = ""
    condition: str = ""
    target: int = 0


class Program:
    """A kernel decoded once; `launch` runs it any number of times."""

    def __init__(self, code: CodeObject, name: str, *, target: Target | None = None) -> None:
        if name not in code.kernels:
            raise Unmodelled(f"the code object has kernels {', '.join(code.kernels)}, not {name}")
        self.code = code
        self.kernel: Kernel = code.kernels[name]
        self.target = target or target_of(code.target)
        if self.kernel.wave_size != self.target.wave_size:
            raise Unmodelled(
                f"{name} is compiled for waves of {self.kernel.wave_size} lanes, not {self.target.wave_size}"
            )
        if self.kernel.scratch_bytes:
            raise Unmodelled(f"{name} uses {self.kernel.scratch_bytes} bytes of scratch memory a lane")
        if self.kernel.rsrc1 >> 12 & 0xFF != ROUND_TO_NEAREST_KEEP_SUBNORMALS:
            raise Unmodelled(f"{name} asks for a rounding or subnormal mode, rsrc1 {self.kernel.rsrc1:#x}")
        if self.kernel.lds_bytes > self.target.lds_bytes:
            raise Unmodelled(
                f"{name} asks for {self.kernel.lds_bytes} bytes of LDS; {self.target.lds_bytes} is the most"
            )
        text = code.image[code.text.start : code.text.stop]
        self.instructions = disassemble(text, code.text.start, self.target.name)
        self._decoder = Decoder(self.target.generation, self.kernel.vgprs)
        self._decoded: dict[int, Decoded] = {}

    def launch(
        self,
        arguments: Sequence[In | Out | InOut | int],
        grid: tuple[int, int, int],
        threads: int,
        *,
        dynamic_lds_bytes: int = 0,
        instruction_limit: int = INSTRUCTION_LIMIT,
    ) -> Counts:
        """Run `grid` workgroups of `threads` work-items. Integers are 64-bit arguments, passed as they stand.

        Raises a `SimulationError` that names the instruction and the waves.
        """
        memory = DeviceMemory(MEMORY_SLACK + len(self.code.image) + sum(_room(argument) for argument in arguments))
        code_base = memory.allocate(np.frombuffer(self.code.image, np.uint8), writable=False)
        block, buffers = self._arguments(memory, arguments)
        packet = memory.allocate(_packet(grid, threads), writable=False)
        lds = Lds(int(np.prod(grid)), self.kernel.lds_bytes + dynamic_lds_bytes)
        state = self._start(memory, lds, grid, threads, block, packet)
        state.code_base = code_base
        counts = Counts()
        with np.errstate(all="ignore"):
            _Run(self, state, counts, instruction_limit).to_end()
        counts.bytes_loaded, counts.bytes_stored = memory.bytes_loaded, memory.bytes_stored
        for index, (address, array) in buffers.items():
            array.reshape(-1).view(np.uint8)[:] = memory.content(address, array.nbytes)
            counts.unwritten[index] = memory.unwritten(address, array.nbytes)
        return counts

    def _arguments(
        self, memory: DeviceMemory, arguments: Sequence[In | Out | InOut | int]
    ) -> tuple[int, dict[int, tuple[int, npt.NDArray[Any]]]]:
        explicit = [a for a in self.kernel.arguments if not a.kind.startswith("hidden")]
        if len(explicit) != len(arguments):
            raise Unmodelled(f"{self.kernel.name} takes {len(explicit)} arguments; {len(arguments)} are given")
        block = bytearray(self.kernel.argument_bytes + 256)  # scalar loads read beyond the last argument
        buffers = {}
        for index, (place, argument) in enumerate(zip(explicit, arguments, strict=True)):
            if isinstance(argument, int):
                value = argument
            else:
                content = np.ascontiguousarray(argument.array).reshape(-1).view(np.uint8)
                written = argument.written if isinstance(argument, In) else 0 if isinstance(argument, Out) else None
                value = memory.allocate(content, writable=not isinstance(argument, In), written=written)
                if not isinstance(argument, In):
                    buffers[index] = (value, argument.array)
            block[place.offset : place.offset + place.size] = value.to_bytes(8, "little")[: place.size]
        end = max((a.offset + a.size for a in explicit), default=0)
        return memory.allocate(np.frombuffer(bytes(block), np.uint8), writable=False, written=end), buffers

    def _start(
        self, memory: DeviceMemory, lds: Lds, grid: tuple[int, int, int], threads: int, block: int, packet: int
    ) -> Wavefronts:
        """Registers as the hardware fills them: LLVM's AMDGPU guide, "Initial Kernel Execution State"."""
        target, kernel = self.target, self.kernel
        waves = -(-threads // target.wave_size)
        z, y, x, wave = (a.ravel() for a in np.indices((grid[2], grid[1], grid[0], waves)))
        place = Place((z * grid[1] + y) * grid[0] + x, wave)
        state = Wavefronts(target, place, kernel.vgprs + kernel.agprs + 1, memory, lds)
        register = 0
        for bit, count, value in (
            (0, 4, None),
            (1, 2, packet),
            (2, 2, None),
            (3, 2, block),
            (4, 2, None),
            (5, 2, None),
            (6, 1, None),
        ):
            if kernel.properties >> bit & 1:
                if value is not None:
                    state.write_scalar(register, value & 0xFFFFFFFF)
                    state.write_scalar(register + 1, value >> 32)
                register += count
        register = kernel.rsrc2 >> 1 & 31
        if target.workgroup_id_in_ttmp:
            state.write_scalar(TTMP + 9, x)
            state.write_scalar(TTMP + 7, y | z << 16)
        else:
            for bit, value in ((7, x), (8, y), (9, z)):
                if kernel.rsrc2 >> bit & 1:
                    state.write_scalar(register, value)
                    register += 1
        item = wave[:, None] * target.wave_size + state.lane
        state.write(0, item.astype(np.uint32))
        if not target.packed_workitem_id:
            for number in range(1, (kernel.rsrc2 >> 11 & 3) + 1):
                state.write(number, np.zeros_like(item, np.uint32))
        state.write_mask(EXEC, item < threads)
        if target.wave_size == 32:
            state.write_scalar(EXEC + 1, 0)
        return state

    def decoded(self, address: int) -> Decoded:
        """The instruction at `address`. Raises `Unmodelled` when it cannot be executed."""
        if address not in self._decoded:
            self._decoded[address] = self._decode(address)
        return self._decoded[address]

    def _decode(self, address: int) -> Decoded:
        if address not in self.instructions:
            raise Unmodelled(f"there is no instruction at {address:#x}")
        parts = self.instructions[address]
        name = parts[0].mnemonic
        if name == "s_endpgm":
            return Decoded(parts[0], (), "end")
        if name in ("s_barrier", "s_barrier_wait"):
            return Decoded(parts[0], (), "barrier")
        if name == "s_branch":
            return Decoded(parts[0], (), "branch", "", branch_target(parts[0]))
        if name.startswith("s_cbranch_"):
            return Decoded(parts[0], (), "branch", name.removeprefix("s_cbranch_"), branch_target(parts[0]))
        return Decoded(parts[0], tuple(self._step(part) for part in parts))

    def _step(self, instruction: Instruction) -> Step:
        builders: tuple[Callable[[Instruction], Step | None], ...] = (
            self._decoder.build,
            lambda i: packed.build(self._decoder, i),
            lambda i: matrix.build(self._decoder, i, self.target),
            lambda i: exchange.build(self._decoder, i),
            lambda i: access.build(self._decoder, i),
            Scalars().build,
        )
        try:
            for build in builders:
                if (step := build(instruction)) is not None:
                    return step
        except (Unmodelled, KeyError, ValueError, IndexError) as error:
            raise Unmodelled(f"{instruction.text}: {error}") from error
        raise Unmodelled(f"{instruction.text}: the instruction is unknown")


class _Run:
    """One launch under way."""

    def __init__(self, program: Program, state: Wavefronts, counts: Counts, limit: int) -> None:
        self.program = program
        self.state = state
        self.counts = counts
        self.limit = limit
        self.pc = np.full(state.waves, program.kernel.entry, np.int64)
        self.ended = np.zeros(state.waves, np.bool_)
        self.waiting = np.zeros(state.waves, np.bool_)
        self.executed = 0

    def to_end(self) -> None:
        while not self.ended.all():
            runnable = ~self.ended & ~self.waiting
            if not runnable.any():
                self._open_barriers()
                continue
            pc = int(self.pc[runnable].min())
            chosen = runnable & (self.pc == pc)
            others = self.pc[runnable & ~chosen]
            self.state.select(chosen)
            self._straight(chosen, pc, int(others.min()) if others.size else None)

    def _straight(self, chosen: npt.NDArray[np.bool_], pc: int, meet: int | None) -> None:
        """Execute from `pc` to the next branch, barrier or end, or to where other waves wait."""
        state, counts = self.state, self.counts.instructions
        decoded: Decoded | None = None
        try:
            while True:
                decoded = self.program.decoded(pc)
                counts[decoded.instruction.mnemonic] += state.count
                self.executed += state.count
                if decoded.control:
                    break
                if len(decoded.steps) == 1:
                    decoded.steps[0](state)
                else:
                    _dual(state, decoded.steps)
                pc = decoded.instruction.next
                if pc == meet:
                    self.pc[chosen] = pc
                    return
            if self.executed > self.limit:
                raise Deadlock(f"{self.executed} instructions and no end")
            self._control(chosen, decoded)
        except SimulationError as error:
            text = (
                decoded.instruction.text if decoded is not None and decoded.instruction.address == pc else "(decoding)"
            )
            waves = np.nonzero(chosen)[0]
            group, wave = state.place.group[waves[0]], state.place.wave[waves[0]]
            raise type(error)(
                f"{pc:#x} {text}: {error} ({waves.size} waves, first: workgroup {group}, wave {wave})"
            ) from error

    def _control(self, chosen: npt.NDArray[np.bool_], decoded: Decoded) -> None:
        if decoded.control == "end":
            self.ended |= chosen
            return
        self.pc[chosen] = decoded.instruction.next
        if decoded.control == "barrier":
            self.waiting |= chosen
        else:
            taken = self._taken(decoded.condition)
            self.pc[np.nonzero(chosen)[0][taken]] = decoded.target

    def _taken(self, condition: str) -> npt.NDArray[np.bool_]:
        state = self.state
        if not condition:
            return np.ones(state.count, np.bool_)
        if condition in ("scc0", "scc1"):
            poison, value = state.scc_poison[state.selected], state.scc[state.selected]
        elif condition in ("execz", "execnz"):
            poison, value = np.zeros(state.count, np.bool_), state.lanes_on.any(1)
        elif condition in ("vccz", "vccnz"):
            poison, value = state.mask_poison(106), state.unpacked(106).any(1)
        else:
            raise Unmodelled(f"branch condition {condition}")
        if poison.any():
            raise Uninitialised("a branch depends on what was never written")
        return value if condition.endswith(("1", "nz")) else ~value

    def _open_barriers(self) -> None:
        """Let go the workgroups all of whose waves have arrived or ended."""
        groups = self.state.place.group
        absent = np.bincount(groups, weights=~(self.waiting | self.ended))
        ready = self.waiting & (absent[groups] == 0)
        if not ready.any():
            raise Deadlock("every wave waits at a barrier")
        self.state.lds.barrier(np.unique(groups[ready]))
        self.waiting &= ~ready


def _packet(grid: tuple[int, int, int], threads: int) -> npt.NDArray[np.uint8]:
    """The dispatch packet, of which kernels read the sizes of a workgroup and of the grid in work-items."""
    sizes = np.zeros(16, np.uint32)
    sizes[1], sizes[2] = threads | 1 << 16, 1
    sizes[3:6] = grid[0] * threads, grid[1], grid[2]
    return sizes.view(np.uint8)


def _dual(state: Wavefronts, steps: tuple[Step, ...]) -> None:
    """Two operations of one instruction: the second reads what was there before the first wrote."""
    recorder = _Recorder(state)
    for step in steps:
        step(recorder)  # type: ignore[arg-type]
    recorder.commit()


class _Recorder:
    """A view of the state that keeps vector writes until `commit`."""

    def __init__(self, state: Wavefronts) -> None:
        self._state = state
        self._writes: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def write(self, *arguments: Any) -> None:
        self._writes.append(arguments)

    def commit(self) -> None:
        for arguments in self._writes:
            self._state.write(*arguments)


def _room(argument: In | Out | InOut | int) -> int:
    return 0 if isinstance(argument, int) else argument.array.nbytes + 16384
