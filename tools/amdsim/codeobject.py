"""An AMD code object (version 5, ELF64) taken apart: the image, each kernel's descriptor, and the compiler's notes.

Layouts: LLVM, "User Guide for AMDGPU Backend", sections Kernel Descriptor and Code Object Metadata.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Unmodelled

PT_LOAD, SHT_NOTE, SHT_SYMTABS = 1, 7, (2, 11)
NT_AMDGPU_METADATA = 32


@dataclass(frozen=True, slots=True)
class Argument:
    """Where an argument lies in the kernel's argument block."""

    offset: int
    size: int
    kind: str  # "global_buffer", "by_value", "hidden_..."


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: where it begins, what it asks for, and how its first registers are filled."""

    name: str
    entry: int
    lds_bytes: int
    scratch_bytes: int
    argument_bytes: int
    arguments: tuple[Argument, ...]
    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    wave_size: int
    rsrc1: int
    rsrc2: int
    properties: int

    @property
    def spills(self) -> int:
        return self.vgpr_spills + self.sgpr_spills


@dataclass(frozen=True, slots=True)
class CodeObject:
    """`image` is the file as a loader maps it, from address 0; `text` the range of machine code in it."""

    target: str
    image: bytes
    text: range
    kernels: Mapping[str, Kernel]

    @staticmethod
    def read(path: Path) -> CodeObject:
        return CodeObject.parse(path.read_bytes())

    @staticmethod
    def parse(elf: bytes) -> CodeObject:
        """Raises `Unmodelled` when `elf` is no code object of version 5 for an AMD GPU."""
        if elf[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", elf, 18)[0] != 224:
            raise Unmodelled("this is no ELF64 file for AMD GPUs")
        segment_table, section_table = struct.unpack_from("<QQ", elf, 32)
        _, segments, _, sections, _ = struct.unpack_from("<5H", elf, 54)
        image = bytearray()
        for index in range(segments):
            kind, _, offset, address, _, file_bytes, memory_bytes, _ = struct.unpack_from(
                "<IIQQQQQQ", elf, segment_table + 56 * index
            )
            if kind == PT_LOAD:
                image.extend(bytes(max(0, address + memory_bytes - len(image))))
                image[address : address + file_bytes] = elf[offset : offset + file_bytes]
        headers = [struct.unpack_from("<IIQQQQIIQQ", elf, section_table + 64 * index) for index in range(sections)]
        metadata = _metadata(elf, headers)
        symbols = _symbols(elf, headers)
        text = next(header for header in headers if header[1] == 1 and header[2] & 4)
        return CodeObject(
            metadata["amdhsa.target"].split("-")[-1].split(":")[0],
            bytes(image),
            range(text[3], text[3] + text[5]),
            {
                note[".name"]: _kernel(note, bytes(image), symbols[note[".symbol"]])
                for note in metadata["amdhsa.kernels"]
            },
        )


def _kernel(note: Mapping[str, Any], image: bytes, descriptor: int) -> Kernel:
    lds, scratch, argument_bytes, _, entry = struct.unpack_from("<IIIIq", image, descriptor)
    _, rsrc1, rsrc2, properties = struct.unpack_from("<IIIH", image, descriptor + 44)
    return Kernel(
        name=note[".name"],
        entry=descriptor + entry,
        lds_bytes=lds,
        scratch_bytes=scratch,
        argument_bytes=argument_bytes,
        arguments=tuple(Argument(a[".offset"], a[".size"], a[".value_kind"]) for a in note.get(".args", ())),
        vgprs=note[".vgpr_count"],
        agprs=note.get(".agpr_count", 0),
        sgprs=note[".sgpr_count"],
        vgpr_spills=note[".vgpr_spill_count"],
        sgpr_spills=note[".sgpr_spill_count"],
        wave_size=note[".wavefront_size"],
        rsrc1=rsrc1,
        rsrc2=rsrc2,
        properties=properties,
    )


def _symbols(elf: bytes, headers: list[tuple[int, ...]]) -> dict[str, int]:
    found = {}
    for header in headers:
        if header[1] in SHT_SYMTABS:
            strings = headers[header[6]][4]
            for place in range(header[4], header[4] + header[5], 24):
                name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", elf, place)
                start = strings + name
                found[elf[start : elf.index(b"\0", start)].decode()] = value
    return found


def _metadata(elf: bytes, headers: list[tuple[int, ...]]) -> Mapping[str, Any]:
    for header in headers:
        if header[1] == SHT_NOTE:
            name_bytes, bytes_, kind = struct.unpack_from("<III", elf, header[4])
            if kind == NT_AMDGPU_METADATA:
                start = header[4] + 12 + (name_bytes + 3) // 4 * 4
                value, _ = _messagepack(elf[start : start + bytes_], 0)
                assert isinstance(value, dict)
                return value
    raise Unmodelled("the code object has no metadata note; compile with -mcode-object-version=5")


def _messagepack(data: bytes, at: int) -> tuple[Any, int]:
    """The value at `at` and where it ends. MessagePack as notes use it: no floats, no extensions."""
    tag = data[at]
    at += 1
    if tag <= 0x7F:
        return tag, at
    if tag >= 0xE0:
        return tag - 256, at
    if tag <= 0x8F:
        return _map(data, at, tag & 15)
    if tag <= 0x9F:
        return _list(data, at, tag & 15)
    if tag <= 0xBF:
        return data[at : at + (tag & 31)].decode(), at + (tag & 31)
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    sizes = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
    if tag in sizes:
        end = at + sizes[tag]
        return int.from_bytes(data[at:end], "big", signed=tag >= 0xD0), end
    widths = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
    if tag not in widths:
        raise Unmodelled(f"the metadata holds a value of kind {tag:#x}")
    end = at + widths[tag]
    count = int.from_bytes(data[at:end], "big")
    if tag >= 0xDE:
        return _map(data, end, count)
    if tag >= 0xDC:
        return _list(data, end, count)
    return data[end : end + count].decode(), end + count


def _map(data: bytes, at: int, count: int) -> tuple[dict[Any, Any], int]:
    found = {}
    for _ in range(count):
        key, at = _messagepack(data, at)
        found[key], at = _messagepack(data, at)
    return found, at


def _list(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    found = []
    for _ in range(count):
        value, at = _messagepack(data, at)
        found.append(value)
    return found, at
