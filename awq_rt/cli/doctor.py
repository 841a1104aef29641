"""`awq-rt doctor`: the verdict first, then what to do, then the facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from .console import console, table

if TYPE_CHECKING:
    from rich.console import Console

    from ..devices import Device
    from ..doctor import Report, Torch

STYLES = {"ready": "bold green", "degraded": "bold yellow", "unusable": "bold red"}
KINDS = {"AWQ-CUDA": "no NVIDIA GPU", "AWQ-ROCM": "no AMD GPU (these need a backend plugin)"}
"""What a probe's refusal is about, by the family of its code."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; its `schema` key is versioned.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what works on this machine, what does not, and why.

    Exit code: 0 ready; 1 degraded (it runs, but a GPU is idle, a plugin quarantined or a package unsupported);
    2 unusable.
    """
    from ..doctor import diagnose

    report = diagnose()
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _print(report, console())
    ctx.exit(int(report.verdict))


def _print(report: Report, out: Console) -> None:
    verdict = report.verdict.name.lower()
    out.print(f"{verdict.upper()}: {report.summary}", style=STYLES[verdict], soft_wrap=True)
    for finding in report.findings:
        out.print()
        out.print(f"{finding.code}  {finding.reason}", soft_wrap=True)
        out.print(f"  $ {finding.command}", style="cyan", soft_wrap=True)
    _print_pairs(out, "System", report.system)
    if report.environment:
        _print_pairs(out, "Environment", report.environment)
    _print_packages(report, out)
    _print_devices(report, out)
    _print_backends(report, out)


def _print_pairs(out: Console, title: str, pairs: Mapping[str, str]) -> None:
    out.print(f"\n{title}", style="bold")
    rows = table("", "")
    rows.show_header = False
    for name, value in pairs.items():
        rows.add_row(f"  {name}", value)
    out.print(rows)


def _print_packages(report: Report, out: Console) -> None:
    out.print("\nPackages", style="bold")
    rows = table("  name", "installed", "supported", "")
    for package in report.packages:
        installed = package.installed or "-"
        rows.add_row(
            f"  {package.name}", installed, package.supported, "" if package.status == "ok" else package.status
        )
    out.print(rows)
    if report.torch:
        _print_torch(report.torch, out)


def _print_torch(torch: Torch, out: Console) -> None:
    build = f"CUDA {torch.cuda}" if torch.cuda else f"HIP {torch.hip}" if torch.hip else "the CPU only"
    reach = f"reaches no GPU: {torch.unreachable}" if torch.unreachable else f"reaches {', '.join(torch.gpus)}"
    out.print(f"  torch is built for {build}" + (f" and {reach}" if torch.cuda or torch.hip else ""), soft_wrap=True)


def _print_devices(report: Report, out: Console) -> None:
    out.print("\nDevices", style="bold")
    rows = table("  device", "name", "architecture", "memory", "wave", "driver", right=("memory",))
    for device in report.devices:
        where = device.type if device.type == "cpu" else f"{device.type}:{device.index}"
        memory = f"{device.memory_bytes / 2**30:.1f} GiB" if device.memory_bytes else "?"
        rows.add_row(f"  {where}", device.name, device.arch, memory, str(device.wave_size), device.driver)
    out.print(rows)
    for refusal in report.refusals:
        kind = KINDS.get(refusal.code.rpartition("-")[0], "not found")
        out.print(f"  {kind}: {refusal}", soft_wrap=True)


def _driven(device: Device) -> str:
    """A device as a backend drives it; of a CPU, with the instruction set that the backend chose."""
    if device.type != "cpu":
        return f"{device.type}:{device.index}"
    return f"cpu ({device.driver})" if device.driver else "cpu"


def _print_backends(report: Report, out: Console) -> None:
    out.print("\nBackends", style="bold")
    if not report.plugins:
        out.print("  none was found")
        return
    rows = table("  name", "version", "distribution", "priority", "drives", "kernels", right=("priority",))
    for plugin in report.plugins:
        if plugin.refusal is None:
            drives = ", ".join(map(_driven, plugin.devices)) or "nothing"
            state = (str(plugin.priority), drives, ", ".join(plugin.kernels))
        else:
            state = ("-", f"quarantined [{plugin.refusal.code}]", "")
        rows.add_row(f"  {plugin.name}", plugin.version, plugin.distribution, *state)
    out.print(rows)
