"""``harness doctor``: what this machine has and lacks, as tables or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.options import BuildDir

if TYPE_CHECKING:
    from rich.table import Table

    from harness.doctor.doctor import Ability, Report

_WHOLE = ("part", "takes", "there", "fits")
"""Columns that are not folded: short words and figures of ours."""

GPU_PARTS = (
    "engine onnxruntime, cuda",
    "engine cudnn",
    "engine tensorrt",
    "engine tensorrt-rtx",
)
"""What the doctor calls parts that run on NVIDIA GPUs alone."""

_COLOURS = {"works": "green", "partly": "yellow", "no": "red"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    build_dir: BuildDir = Path("build"),
) -> None:
    """Report what works on this machine, why the rest does not, and what to do about it.

    Each part is tried in a process of its own, which takes some seconds. The exit code is 0: what
    is missing is the report.
    """
    from harness.doctor.doctor import examine

    report = examine(build_dir)
    if json:
        from dataclasses import asdict
        from json import dumps

        typer.echo(dumps(asdict(report), indent=2))
    else:
        _print(report)


def _print(report: Report) -> None:
    from rich.text import Text

    from graph_surgery.terminal import new_console

    console = new_console(markup=False, highlight=False)
    for table in (_machine(report), _packages(report), _abilities(report), _resources(report)):
        console.print(table)
    # the terminal wraps it, so that the command can be copied
    console.print(Text.assemble(("Next: ", "bold"), report.next_step), soft_wrap=True)


def _machine(report: Report) -> Table:
    table = _table("This machine")
    for name, value in report.project.items():
        table.add_row(name, "–" if value is None else str(value))
    gpus = report.gpus
    if not gpus.devices:
        table.add_row("GPU", f"none ({gpus.source})")
    for gpu in gpus.devices:
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB"
        table.add_row("GPU", f"{gpu.name}, compute capability {gpu.compute_capability}, {memory}")
    if gpus.driver or gpus.cuda:
        table.add_row("NVIDIA driver", f"{gpus.driver or '–'}, runs CUDA {gpus.cuda or '–'}")
    return table


def _packages(report: Report) -> Table:
    table = _table("Packages", "extra", "installed", "missing or of a version that does not do")
    for extra, packages in report.packages.items():
        there = ", ".join(f"{one.name} {one.installed}" for one in packages if one.fits)
        wrong = [
            f"{one.name}{one.required}" + (f" (is {one.installed})" if one.installed else "")
            for one in packages
            if not one.fits
        ]
        table.add_row(extra or "always", there, ", ".join(wrong))
    return table


def _abilities(report: Report) -> Table:
    from rich.text import Text

    table = _table("What works", "part", "", "with what; or why not, and what to do")
    for one in report.abilities:
        text = Text(one.detail)
        if one.state != "works":
            text.append(f"\nto do: {to_do(one, gpu=bool(report.gpus.devices))}", "bold")
        table.add_row(one.name, Text(one.state, _COLOURS[one.state]), text)
    return table


def to_do(one: Ability, *, gpu: bool) -> str:
    """Say what makes a part work that does not, or that nothing does on this machine."""
    if one.fix is not None:
        return one.fix
    if one.name in GPU_PARTS and not gpu:
        return "nothing on this machine; it needs an NVIDIA GPU"
    return "what is said above"


def _resources(report: Report) -> Table:
    from rich.text import Text

    found = report.resources
    table = _table(
        f"Disk: {_size(found.disk_free)} free in {found.folder}"
        + ("" if found.writable else ", which cannot be written")
        + f". Memory: {_size(found.memory_available)} of {_size(found.memory_total)} available",
        *("step", "takes", "there", "fits", "source of the figure"),
    )
    for one in found.balance:
        need = one.need
        there = _size(one.there) if need.kind == "disk" else ""
        enough = Text("yes", "green") if one.enough else Text("no", "red")
        table.add_row(need.what, f"{_size(need.size)} {need.kind}", there, enough, need.source)
    return table


def _size(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 1e9:.1f} GB"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns or ("", ""):
        table.add_column(column, overflow="fold", no_wrap=column in _WHOLE)
    return table
