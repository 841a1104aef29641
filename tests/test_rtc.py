"""awq_rt/rtc: what names a kernel in the cache, and what happens to the cache when things go wrong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from awq_rt.rtc import Builder, CompileFailed, CompileForbidden, KernelStore, Program
from awq_rt.rtc.program import source_closure

PROGRAM = Program((("main.cu", "kernel"),), (("ROWS", "1"),), "sm_90")


@dataclass
class FakeCompiler:
    """Machine code is the program's description; each run leaves a line in `log`."""

    log: Path
    version: str = "fake 1.0"
    dies: bool = False

    def compile(self, program: Program) -> bytes:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return str(program).encode()

    @property
    def runs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def compiler(tmp_path: Path) -> FakeCompiler:
    return FakeCompiler(tmp_path / "log")


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(tmp_path / "kernels")


def test_the_closure_holds_every_included_file_once(tmp_path: Path) -> None:
    (tmp_path / "main.cu").write_text('#include "a.cuh"\n#include "b.cuh"\n#include <nothing.h>\n')
    (tmp_path / "a.cuh").write_text('  #  include "b.cuh"\n')
    (tmp_path / "b.cuh").write_text("int b;\n")
    assert [name for name, _ in source_closure(tmp_path / "main.cu")] == ["main.cu", "a.cuh", "b.cuh"]


@pytest.mark.parametrize(
    "changed",
    [
        replace(PROGRAM, sources=(("main.cu", "kernel "),)),
        replace(PROGRAM, sources=(*PROGRAM.sources, ("a.cuh", ""))),
        replace(PROGRAM, defines=(("ROWS", "2"),)),
        replace(PROGRAM, defines=(("ROW", "S1"),)),
        replace(PROGRAM, arch="sm_80"),
        replace(PROGRAM, options=("--use_fast_math",)),
    ],
)
def test_whatever_changes_the_code_changes_the_key(changed: Program) -> None:
    assert changed.key("nvrtc 13.0") != PROGRAM.key("nvrtc 13.0")


def test_another_compiler_has_another_key() -> None:
    assert PROGRAM.key("nvrtc 13.0") != PROGRAM.key("nvrtc 13.1")


def test_a_second_process_reads_what_the_first_compiled(store: KernelStore, compiler: FakeCompiler) -> None:
    first = Builder(compiler, store).machine_code(PROGRAM)
    assert Builder(compiler, store).machine_code(PROGRAM) == first
    assert compiler.runs == 1


@pytest.mark.parametrize("damage", [b"", b"awq_rt kernel 1\n", b"\0" * 100])
def test_a_damaged_entry_is_compiled_again(store: KernelStore, compiler: FakeCompiler, damage: bytes) -> None:
    code = Builder(compiler, store).machine_code(PROGRAM)
    entry = store.folder / PROGRAM.key(compiler.version)
    entry.write_bytes(damage)
    assert Builder(compiler, store).machine_code(PROGRAM) == code
    assert store.read(PROGRAM.key(compiler.version)) == code


def test_one_flipped_bit_is_damage(store: KernelStore, compiler: FakeCompiler) -> None:
    Builder(compiler, store).machine_code(PROGRAM)
    entry = store.folder / PROGRAM.key(compiler.version)
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    assert store.read(PROGRAM.key(compiler.version)) is None


def test_a_cache_that_cannot_be_written_warns_once_and_compiles(tmp_path: Path, compiler: FakeCompiler) -> None:
    (tmp_path / "file").write_text("")
    builder = Builder(compiler, KernelStore(tmp_path / "file" / "kernels"))
    with pytest.warns(RuntimeWarning, match="AWQ_RT_CACHE"):
        code = builder.machine_code(PROGRAM)
    assert code == str(PROGRAM).encode()
    builder.machine_code(replace(PROGRAM, arch="sm_80"))  # a second warning would be an error


def test_a_read_only_cache_serves_what_it_holds(
    store: KernelStore, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = Builder(compiler, store).machine_code(PROGRAM)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    monkeypatch.setattr("os.open", refuse)  # what takes the lock
    reader = Builder(compiler, KernelStore(store.folder))
    assert reader.machine_code(PROGRAM) == code  # a warning would be an error
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        reader.machine_code(replace(PROGRAM, arch="sm_80"))
    assert compiler.runs == 2


def test_compiling_can_be_forbidden(
    store: KernelStore, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWQ_RT_NO_COMPILE", "1")
    with pytest.raises(CompileForbidden, match=r"main\.cu sm_90 ROWS=1"):
        Builder(compiler, store).machine_code(PROGRAM)
    monkeypatch.delenv("AWQ_RT_NO_COMPILE")
    Builder(compiler, store).machine_code(PROGRAM)
    monkeypatch.setenv("AWQ_RT_NO_COMPILE", "1")
    Builder(compiler, store).machine_code(PROGRAM)


def test_processes_that_start_together_compile_once(store: KernelStore, compiler: FakeCompiler) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_build, args=(store.folder, compiler)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert compiler.runs == 1


def test_a_killed_compile_leaves_nothing_behind(store: KernelStore, compiler: FakeCompiler) -> None:
    worker = multiprocessing.get_context("spawn").Process(
        target=_build, args=(store.folder, replace(compiler, dies=True))
    )
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert Builder(compiler, store).machine_code(PROGRAM) == str(PROGRAM).encode()
    assert not list(store.folder.glob(".new-*"))


def test_a_process_killed_while_it_writes_leaves_no_entry(store: KernelStore, compiler: FakeCompiler) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_die_writing, args=(store.folder, compiler))
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    assert store.read(PROGRAM.key(compiler.version)) is None
    assert Builder(compiler, store).machine_code(PROGRAM) == str(PROGRAM).encode()
    assert store.read(PROGRAM.key(compiler.version)) == str(PROGRAM).encode()


def test_many_programs_report_progress(store: KernelStore, compiler: FakeCompiler) -> None:
    programs = [replace(PROGRAM, arch=f"sm_{number}") for number in (80, 86, 90)]
    heard: list[tuple[int, int]] = []
    codes = Builder(compiler, store).machine_codes(programs, lambda done, count: heard.append((done, count)))
    assert codes == [str(program).encode() for program in programs]
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_what_was_compiled_is_told_from_what_was_there(store: KernelStore, compiler: FakeCompiler) -> None:
    other = replace(PROGRAM, arch="sm_80")
    Builder(compiler, store).machine_code(PROGRAM)
    built = list(Builder(compiler, store).build([other, PROGRAM]))
    assert [(each.program, each.compiled) for each in built] == [(other, True), (PROGRAM, False)]


def test_all_that_is_missing_is_named_at_once(
    store: KernelStore, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    Builder(compiler, store).machine_code(PROGRAM)
    monkeypatch.setenv("AWQ_RT_NO_COMPILE", "1")
    programs = [replace(PROGRAM, arch=f"sm_{number}") for number in (80, 86, 90)]
    with pytest.raises(
        CompileForbidden, match=r"2 kernels are not in .*: main\.cu sm_80 ROWS=1; main\.cu sm_86 ROWS=1"
    ):
        Builder(compiler, store).machine_codes(programs)
    many = [replace(PROGRAM, arch=f"sm_{number}") for number in range(100, 120)]
    with pytest.raises(CompileForbidden, match=r"20 kernels are not in .*sm_111 ROWS=1; \.\.\."):
        Builder(compiler, store).machine_codes(many)
    assert compiler.runs == 1


def test_a_refused_program_is_an_error_and_is_not_kept(store: KernelStore, tmp_path: Path) -> None:
    class Refusing(FakeCompiler):
        def compile(self, program: Program) -> bytes:
            if program == PROGRAM:
                raise CompileFailed("line 7: this is no kernel")
            return super().compile(program)

    compiler = Refusing(tmp_path / "log")
    with pytest.raises(CompileFailed, match="line 7"):
        Builder(compiler, store).machine_codes([replace(PROGRAM, arch="sm_80"), PROGRAM])
    assert store.read(PROGRAM.key(compiler.version)) is None
    Builder(FakeCompiler(tmp_path / "log"), store).machine_code(PROGRAM)  # nothing holds its lock


def _build(folder: Path, compiler: FakeCompiler) -> None:
    Builder(compiler, KernelStore(folder)).machine_code(PROGRAM)


def _die_writing(folder: Path, compiler: FakeCompiler) -> None:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    _build(folder, compiler)
