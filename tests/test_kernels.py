"""awq_rt/kernels: device code that every vendor's compiler reads, beside a `platform.cuh` of the backend's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from awq_rt import kernels

FILES = sorted(file for file in kernels.SOURCES.iterdir() if file.suffix in (".cu", ".cuh"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_shared_kernels_name_nothing_of_a_platform(file: Path) -> None:
    text = re.sub(r"//.*", "", file.read_text())
    included = re.findall(r'#\s*include\s+[<"](.*)[>"]', text)
    assert set(included) <= {"platform.cuh", *(other.name for other in FILES)}
    words = r"\basm\b|\bmma|__syncwarp|_sync\(|__CUDA|__HIP|__gfx|__builtin|__nv|half2\b(?<!_half2)|\b(32|64)u? lanes"
    assert not re.search(words, text)


def test_a_program_takes_the_platform_of_the_backend(tmp_path: Path) -> None:
    (tmp_path / "platform.cuh").write_text("int platform;\n")
    program = kernels.program("fused_norm", "gfx942", {"HIDDEN": 64}, tmp_path)
    assert [name for name, _ in program.sources] == ["fused_norm.cu", "fused.cuh", "activations.cuh", "platform.cuh"]
    assert dict(program.sources)["platform.cuh"] == "int platform;\n"


def test_a_program_without_a_platform_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"platform\.cuh"):
        kernels.program("fused_norm", "gfx942", {}, tmp_path)
