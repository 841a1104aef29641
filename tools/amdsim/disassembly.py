"""Machine code to instructions, by LLVM's own disassembler, called in this process through its C interface.

LLVM 20 or later is needed: earlier ones know neither gfx950 nor the 16-bit registers of gfx11. On PyPI the wheel of
`llvm-nanobind` carries such a library. `AMDSIM_LLVM` names a file to use instead.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import glob
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import Unmodelled

LIBRARY = "AMDSIM_LLVM"
PATTERNS = ("llvm_nanobind.libs/libLLVM*.so*", "../../../llvm/llvm_nanobind.libs/libLLVM*.so*")
"""Where the wheel's library lies, from a folder on Python's path or from a virtual environment's site-packages."""
SYSTEM = ("LLVM-22", "LLVM-21", "LLVM-20")


class NoDisassembler(Exception):
    """No LLVM library that is new enough was found. The message says what to install."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One decoded instruction. `operands` are LLVM's text (`v[2:3]`, `-s4`); `modifiers` follow them."""

    address: int
    size: int
    text: str
    mnemonic: str
    operands: tuple[str, ...]
    modifiers: Mapping[str, str]

    @property
    def next(self) -> int:
        return self.address + self.size


def disassemble(code: bytes, address: int, target: str) -> dict[int, tuple[Instruction, ...]]:
    """Instructions by address, two where one does two things (`v_dual_...`); undecodable words are left out."""
    llvm = _library()
    context = llvm.LLVMCreateDisasmCPUFeatures(b"amdgcn-amd-amdhsa", target.encode(), b"", None, 0, None, None)
    if not context:
        raise NoDisassembler(f"{llvm._name} cannot disassemble {target}; LLVM 20 or later is needed")
    data = ctypes.create_string_buffer(code, len(code))
    text = ctypes.create_string_buffer(512)
    found = {}
    at = 0
    while at < len(code):
        size = llvm.LLVMDisasmInstruction(context, ctypes.addressof(data) + at, len(code) - at, address + at, text, 512)
        if not size and (word := _without_third_source(code[at : at + 8])):
            size = llvm.LLVMDisasmInstruction(context, word, 8, address + at, text, 512)
        if size:
            line = " ".join(text.value.decode().split())
            found[address + at] = tuple(parse(part, address + at, size) for part in line.split(" :: "))
        at += size or 4
    llvm.LLVMDisasmDispose(context)
    return found


def _without_third_source(code: bytes) -> bytes | None:
    """An instruction of 8 bytes whose third source is the constant 0, with that field cleared; else None.

    LLVM 23 writes the constant where an instruction has no third source, and LLVM 21 decodes only a cleared field.
    """
    value = int.from_bytes(code, "little")
    field = 0x1FF << 50
    return (value & ~field).to_bytes(8, "little") if len(code) == 8 and value & field == 0x80 << 50 else None


def parse(line: str, address: int = 0, size: int = 4) -> Instruction:
    """The instruction that LLVM printed as `line`."""
    mnemonic, _, rest = line.partition(" ")
    operands, modifiers = [], {}
    for piece in re.split(r",\s*(?![^\[(]*[\])])", rest) if rest else ():
        words = piece.split()
        operands.append(words[0])
        for word in words[1:]:
            name, _, value = word.partition(":")
            modifiers[name] = value
    return Instruction(address, size, line, mnemonic, tuple(operands), modifiers)


def available() -> str | None:
    """Why nothing can be disassembled here; None when it can."""
    try:
        _library()
    except NoDisassembler as error:
        return str(error)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    candidates = [os.environ[LIBRARY]] if LIBRARY in os.environ else []
    for folder in sys.path:
        for pattern in PATTERNS:
            candidates += glob.glob(os.path.join(folder, pattern))
    candidates += filter(None, map(ctypes.util.find_library, SYSTEM))
    for name in candidates:
        try:
            llvm = ctypes.CDLL(name)
        except OSError as error:
            raise NoDisassembler(f"{name} cannot be loaded: {error}") from error
        for part in ("TargetInfo", "TargetMC", "Disassembler"):
            getattr(llvm, f"LLVMInitializeAMDGPU{part}")()
        llvm.LLVMCreateDisasmCPUFeatures.restype = ctypes.c_void_p
        llvm.LLVMCreateDisasmCPUFeatures.argtypes = [
            *[ctypes.c_char_p] * 3,
            ctypes.c_void_p,
            ctypes.c_int,
            *[ctypes.c_void_p] * 2,
        ]
        llvm.LLVMDisasmInstruction.restype = ctypes.c_size_t
        llvm.LLVMDisasmInstruction.argtypes = [
            *[ctypes.c_void_p] * 2,
            *[ctypes.c_uint64] * 2,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]
        llvm.LLVMDisasmDispose.argtypes = [ctypes.c_void_p]
        return llvm
    raise NoDisassembler(f"no LLVM 20 or later was found: install llvm-nanobind, or set {LIBRARY} to a libLLVM file")


def branch_target(instruction: Instruction) -> int:
    """Where a branch goes: its operand counts words from the next instruction, as a signed 16-bit number."""
    words = int(instruction.operands[0], 0)
    if not 0 <= words < 1 << 16:
        raise Unmodelled(f"branch operand {instruction.operands[0]}")
    return instruction.next + 4 * (words - (words >> 15 << 16))
