"""The checks in the order in which they are made and shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .facts import Facts
from .report import Checked, Finding, Status
from .rules import backends, gpus, imports, machine, model
from .rules.finding import nothing


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. `codes` are all that `find` may yield, beside those that a plugin gives its refusals.

    `say` answers a line, or "" where there is nothing to look at; `absent` then says why.
    """

    name: str
    looks_at: str
    codes: tuple[str, ...]
    say: Callable[[Facts], str]
    find: Callable[[Facts], Iterator[Finding]]
    absent: str = ""


def make(facts: Facts) -> tuple[Checked, ...]:
    """Every check, in order."""
    made = []
    for check in CHECKS:
        findings, says = tuple(check.find(facts)), check.say(facts)
        if findings:
            status = Status[max(finding.verdict for finding in findings).name.replace("READY", "NOTE")]
        else:
            status = Status.OK if says else Status.SKIPPED
        made.append(Checked(check.name, status, says or check.absent, findings))
    return tuple(made)


_IMPORT = {step: tuple(f"AWQ-{step.upper()}-00{number}" for number in (1, 2, 3)) for step in ("torch", "transformers")}

CHECKS = (
    Check("system", "operating system, processor, memory, Python", (), machine.say_system, nothing),
    Check(
        "packages",
        "the distributions that awq-rt requires, and their versions",
        ("AWQ-PACKAGE-001", "AWQ-PACKAGE-002", "AWQ-PACKAGE-003", "AWQ-PACKAGE-004", "AWQ-TORCH-004"),
        machine.say_packages,
        machine.find_packages,
        "awq-rt is not installed",
    ),
    Check(
        "cache",
        "whether kernels can be kept, and by whom they can be written",
        ("AWQ-CACHE-001", "AWQ-CACHE-002"),
        machine.say_cache,
        machine.find_cache,
    ),
    Check(
        "driver",
        "the GPUs' drivers, and whether torch's CUDA is served by them",
        (*machine.SUSPECT, *machine.HIDDEN, "AWQ-CUDA-004"),
        machine.say_driver,
        machine.find_driver,
    ),
    Check(
        "torch",
        "torch's import, what it is built and compiled for",
        _IMPORT["torch"],
        imports.say_torch,
        imports.find_torch,
        "torch was not imported",
    ),
    Check(
        "transformers",
        "transformers' import",
        _IMPORT["transformers"],
        imports.say_transformers,
        imports.find_transformers,
        "transformers was not imported",
    ),
    Check(
        "gpus",
        "each GPU: architecture, waves, memory, variables that hide or disguise it",
        (
            gpus.TORCH_REACHES_NO_GPU,
            "AWQ-TORCH-005",
            "AWQ-BACKEND-004",
            "AWQ-ENV-001",
            "AWQ-CUDA-011",
            "AWQ-CUDA-014",
            "AWQ-CUDA-015",
            "AWQ-CUDA-016",
            "AWQ-CUDA-017",
            "AWQ-CUDA-018",
            "AWQ-ROCM-011",
            "AWQ-ROCM-014",
            "AWQ-ROCM-015",
            "AWQ-ROCM-016",
            "AWQ-ROCM-017",
            "AWQ-ROCM-018",
            "AWQ-ROCM-019",
            "AWQ-ROCM-021",
        ),
        gpus.say_gpus,
        gpus.find_gpus,
        "no GPU was found",
    ),
    Check(
        "compiler",
        "run-time compilers and headers, and where they are",
        (),
        backends.say_compiler,
        nothing,
        "no backend here compiles at run time",
    ),
    Check(
        "plugins",
        "each backend: loaded, quarantined or refused",
        ("AWQ-BACKEND-005", *(f"AWQ-BACKEND-01{number}" for number in range(10)), "AWQ-CPU-001", "AWQ-CPU-002"),
        backends.say_plugins,
        backends.find_plugins,
        "no backend was looked for",
    ),
    Check(
        "selection",
        "kernel, dtype and layout: selected, available or rejected, and why",
        ("AWQ-BACKEND-019",),
        backends.say_selection,
        backends.find_selection,
        "no backend was asked",
    ),
    Check(
        "kernels",
        "each kernel, run in a process of its own beside the reference: error, speed",
        (*backends.KERNEL_CODES.values(), "AWQ-KERNEL-006"),
        backends.say_kernels,
        backends.find_kernels,
        "no kernel was run",
    ),
    Check(
        "model",
        "MODEL: layout, what is unsupported, memory, numbers of processes, code and pickles in it",
        (
            "AWQ-MODEL-001",
            "AWQ-MODEL-002",
            "AWQ-MODEL-003",
            "AWQ-MODEL-004",
            *(f"AWQ-CKPT-0{number:02}" for number in range(1, 15)),
        ),
        model.say_model,
        model.find_model,
        "no MODEL was given",
    ),
)
