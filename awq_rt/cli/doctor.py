"""`awq-rt doctor`: the verdict first, then what to do, then what was looked at."""

from __future__ import annotations

import io
import json
import os
import textwrap
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import UNWRAPPED_COLUMNS, console, size, table
from .options import checkpoint_options

if TYPE_CHECKING:
    from rich.console import Console

    from ..devices import Device
    from ..doctor import Report
    from ..doctor.report import KernelRun, Model

STYLES = {"ready": "bold green", "degraded": "bold yellow", "unusable": "bold red"}


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; its `schema` key is versioned.")
@click.option("--strict", is_flag=True, help="Whatever is found makes the machine degraded: exit code 1.")
@click.option("--run/--no-run", default=True, show_default=True, help="Run every kernel beside the reference.")
@click.option("--redact", is_flag=True, help="Leave out user names and private paths.")
@click.option(
    "--bundle",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a zip file to send with a report: this, all versions, the conformance suite's result (minutes).",
)
@click.option(
    "--list-checks", is_flag=True, help="Print what is looked at, in order, and the codes that may come of it."
)
@click.option("--explain", metavar="CODE", help="Print what a code means, and what mends it.")
@checkpoint_options
@click.pass_context
def doctor(
    ctx: click.Context,
    model: str | None,
    as_json: bool,
    strict: bool,
    run: bool,
    redact: bool,
    bundle: Path | None,
    list_checks: bool,
    explain: str | None,
    revision: str | None,
    token: str | None,
    group_size: int | None,
) -> None:
    """Say what works on this machine, what does not, and why.

    With MODEL (a folder, a file or a hub id) also: whether it will run here, how much memory it needs, what is
    unsupported, over how many processes it can be cut, and what code or pickles it brings. Only headers are read.

    Exit code: 0 ready; 1 degraded (it runs, but a GPU is idle, a kernel wrong, a plugin quarantined or a package
    unsupported); 2 unusable; 3 a bug in the doctor itself.
    """
    if list_checks:
        _print_checks(console())
        return
    if explain is not None:
        _explain(explain)
        return
    from ..doctor import BUG, Request, diagnose
    from ..doctor import bundle as bundling
    from ..doctor.redaction import redacted, redactor

    if bundle is not None:
        bundling.check_free(bundle)
    if token:
        os.environ["HF_TOKEN"] = token  # for the worker: arguments of a process are for all to see
    opening = tuple((name, value) for name, value in (("revision", revision), ("group_size", group_size)) if value)
    clean = redactor() if redact else str
    try:
        with console(stderr=True).status("looking at this machine") as status:
            request = Request(run=run, model=model, opening=opening)
            report = diagnose(request, strict=strict, progress=status.update)
        answer = redacted(report.to_json(), clean)
        text = clean(_plain(report))
    except Exception:
        _print_bug(as_json, clean(traceback.format_exc()), BUG)
        ctx.exit(BUG)
    if as_json:
        click.echo(json.dumps(answer, indent=2, allow_nan=False))
    elif redact:
        click.echo(text, nl=False)
    else:
        _print(report, console())
    if bundle is not None:
        bundling.write(bundle, answer, text, clean)
        click.echo(f"written to {bundle}", err=True)
    ctx.exit(int(report.verdict))


def _print_bug(as_json: bool, trace: str, exit_code: int) -> None:
    from .. import __version__
    from ..doctor import SCHEMA

    if as_json:
        facts = {"schema": SCHEMA, "awq_rt": __version__, "verdict": "bug", "exit_code": exit_code}
        click.echo(json.dumps({**facts, "code": "AWQ-DOCTOR-001", "error": trace}, indent=2))
    else:
        click.echo(f"Bug in the doctor; nothing is said of this machine. Please report it. [AWQ-DOCTOR-001]\n\n{trace}")


def _print_checks(out: Console) -> None:
    from ..doctor import CHECKS

    for number, check in enumerate(CHECKS, start=1):
        out.print(f"{number:2} {check.name:13} {check.looks_at}", soft_wrap=True)
        if check.codes:
            lines = textwrap.wrap(" ".join(check.codes), 80, break_on_hyphens=False)
            out.print(textwrap.indent("\n".join(lines), " " * 17))


def _explain(code: str) -> None:
    from ..codes import known

    found = known(code.upper())
    if found is None:
        raise click.ClickException(
            f"no code {code!r} is known; a plugin that is not of awq-rt may have codes of its own"
        )
    click.echo(
        f"{found.code}: {found.title}\n\n{textwrap.fill(found.cause, 100)}\n{textwrap.fill(found.remedy, 100)}\n"
    )
    click.echo(f"  $ {found.command}\n\n{found.page}")


def _plain(report: Report) -> str:
    """The report as a file holds it."""
    from rich.console import Console

    written = io.StringIO()
    _print(report, Console(file=written, width=UNWRAPPED_COLUMNS, markup=False, highlight=False, emoji=False))
    return written.getvalue()


def _print(report: Report, out: Console) -> None:
    verdict = report.verdict.name.lower()
    out.print(f"{verdict.capitalize()}: {report.summary}", style=STYLES[verdict], soft_wrap=True)
    for finding in report.findings:
        out.print()
        out.print(f"{finding.code}  {finding.reason}", soft_wrap=True)
        if finding.cause:
            out.print(f"  {finding.cause}", soft_wrap=True)
        out.print(f"  $ {finding.command}", style="cyan", soft_wrap=True)
        if finding.page:
            out.print(f"  {finding.page}", style="dim", soft_wrap=True)
    out.print("\nChecks", style="bold")
    for number, check in enumerate(report.checks, start=1):
        out.print(f"  {number:2} {check.name:13} {check.status.value:9} {check.says}", soft_wrap=True)
    if report.model:
        _print_model(report.model, out)
    _print_kernels(report, out)
    _print_offers(report, out)
    _print_devices(report, out)
    _print_backends(report, out)
    _print_packages(report, out)
    _print_pairs(out, "System", report.system)
    if report.environment:
        _print_pairs(out, "Environment", report.environment)


def _print_pairs(out: Console, title: str, pairs: Mapping[str, str]) -> None:
    out.print(f"\n{title}", style="bold")
    rows = table("", "")
    rows.show_header = False
    for name, value in pairs.items():
        rows.add_row(f"  {name}", value)
    out.print(rows)


def _print_model(model: Model, out: Console) -> None:
    memory = model.memory
    served = ", ".join(f"{count} by {backend}" for backend, count in model.served)
    sizes = _range(model.tensor_parallel)
    code = "none" if not model.remote_code else ", ".join(model.remote_code)
    needed = "" if not model.needs_remote_code else " (needed: --trust-remote-code)"
    pairs = {
        "architecture": model.architecture,
        "layout": f"{model.layout}, group size {', '.join(map(str, model.group_sizes))}",
        "files": size(model.file_bytes),
        "linears": f"{model.linears}: {served}",
        "memory": f"{size(memory.peak)} on {memory.device} at the most, {size(memory.available)} are free",
        "  weights": size(memory.weights),
        "  keys and values": f"{size(memory.cache)} for {memory.positions} positions",
        "  for a moment": size(memory.moment),
        "  runtime": size(memory.runtime),
        "processes": sizes + (f"; {model.tensor_parallel_limit}" if model.tensor_parallel_limit else ""),
        "own code": code + needed,
        "pickles": ", ".join(model.pickles) or "none",
    }
    _print_pairs(out, f"Model {model.source}", pairs)
    for name, why in model.unsupported:
        out.print(f"  on the reference: {name}: {why}", soft_wrap=True)
    for warning in model.warnings:
        out.print(f"  warning: {warning}", soft_wrap=True)


def _range(sizes: tuple[int, ...]) -> str:
    return "1" if sizes == (1,) else f"1 to {sizes[-1]}" if sizes == tuple(range(1, sizes[-1] + 1)) else str(sizes)


def _print_kernels(report: Report, out: Console) -> None:
    if not report.kernels:
        return
    out.print("\nKernels, run beside the reference", style="bold")
    right = ("error / bound", "us", "of bandwidth")
    rows = table("  device", "backend", "kernel", "dtype", "", *right, "K x N", right=right)
    for run in report.kernels:
        rows.add_row(f"  {run.device}", run.backend, run.kernel, run.dtype, run.status, *_figures(run))
    out.print(rows)


def _figures(run: KernelRun) -> tuple[str, str, str, str]:
    return (
        "" if run.excess is None else f"{run.excess:.3f}",
        "" if run.latency_us is None else f"{run.latency_us:.1f}",
        "" if run.bandwidth_share is None else f"{100 * run.bandwidth_share:.0f} %",
        run.reason if run.shape is None else f"{run.shape[0]} x {run.shape[1]}",
    )


def _print_offers(report: Report, out: Console) -> None:
    """Who serves what; a backend that rejects all that it is asked on a device, for one reason, takes one line."""
    if not report.selection:
        return
    out.print("\nSelection: kernel, dtype, layout", style="bold")
    rows = table("  device", "backend", "kernel", "dtype", "layouts", "", "why")
    alike: dict[tuple[str, str, str, str], list[Any]] = {}
    for offer in report.selection:
        alike.setdefault((offer.device, offer.backend, offer.status, offer.reason), []).append(offer)
    for (device, backend, status, why), offers in alike.items():
        kernels = dict.fromkeys(offer.kernel for offer in offers)
        dtypes = dict.fromkeys(offer.dtype for offer in offers)
        layouts = dict.fromkeys(layout for offer in offers for layout in offer.layouts)
        if len(offers) == len(kernels) * len(dtypes):  # every pair of them, so that one row says it
            rows.add_row(f"  {device}", backend, ", ".join(kernels), ", ".join(dtypes), ", ".join(layouts), status, why)
            continue
        for offer in offers:
            rows.add_row(f"  {device}", backend, offer.kernel, offer.dtype, ", ".join(offer.layouts), status, why)
    out.print(rows)


def _print_packages(report: Report, out: Console) -> None:
    out.print("\nPackages", style="bold")
    rows = table("  name", "installed", "supported", "")
    for package in report.packages:
        state = "" if package.status == "ok" else package.status
        rows.add_row(f"  {package.name}", package.installed or "-", package.supported, state)
    out.print(rows)


def _print_devices(report: Report, out: Console) -> None:
    out.print("\nDevices", style="bold")
    rows = table("  device", "name", "architecture", "memory", "wave", "driver", right=("memory",))
    for device in report.devices:
        where = device.type if device.type == "cpu" else f"{device.type}:{device.index}"
        memory = f"{device.memory_bytes / 2**30:.1f} GiB" if device.memory_bytes else "?"
        rows.add_row(f"  {where}", device.name, device.arch, memory, str(device.wave_size), device.driver)
    out.print(rows)
    for refusal in report.refusals:
        out.print(f"  {refusal}", soft_wrap=True)
    if report.torch and report.torch.unreachable:
        out.print(f"  torch {report.torch.version} reaches no GPU: {report.torch.unreachable}", soft_wrap=True)


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
    for plugin in report.plugins:
        for tool in plugin.tools:
            where = f" in {tool.path}" if tool.path else ""
            out.print(f"  {plugin.name} compiles with {tool.name} {tool.version}{where}", soft_wrap=True)
