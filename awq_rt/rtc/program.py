"""A translation unit as data: its text, the text of all that it includes, its defines and its target.

Two programs with the same key are the same machine code, so the key may name a file in a cache.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Program:
    """`sources` are (name, text), the main file first; the others are what it includes, directly or not."""

    sources: tuple[tuple[str, str], ...]
    defines: tuple[tuple[str, str], ...]
    arch: str  # "sm_90", "gfx942"
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What messages call it: the main file's name."""
        return self.sources[0][0]

    def key(self, compiler: str) -> str:
        """A digest of everything that the machine code depends on; `compiler` is its name and version."""
        digest = hashlib.sha256()
        flat = [compiler, self.arch, *self.options]
        flat += [part for pair in (*self.sources, *self.defines) for part in pair]
        for part in flat:
            # Lengths first, so that no two different lists of parts are the same bytes.
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    def __str__(self) -> str:
        return " ".join([self.name, self.arch, *(f"{name}={value}" for name, value in self.defines)])

    @staticmethod
    def from_file(
        path: Path,
        arch: str,
        defines: Mapping[str, str | int],
        options: tuple[str, ...] = (),
        folders: tuple[Path, ...] = (),
    ) -> Program:
        """The program whose main file is `path`. Includes in quotes are looked for in its folder, then in `folders`."""
        ordered = tuple(sorted((name, str(value)) for name, value in defines.items()))
        return Program(source_closure(path, folders), ordered, arch, options)


@functools.cache
def source_closure(path: Path, folders: tuple[Path, ...] = ()) -> tuple[tuple[str, str], ...]:
    """(name, text) of `path` and of every file it includes in quotes, each once, in the order of first mention.

    An included file is the first of its name in the folder of `path` and in `folders`. Raises FileNotFoundError when
    there is none.
    """
    searched = (path.parent, *folders)
    found: dict[str, str] = {}
    waiting = [path.name]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            file = next((folder / name for folder in searched if (folder / name).exists()), path.parent / name)
            found[name] = file.read_text()
            waiting += INCLUDE.findall(found[name])
    return tuple(found.items())
