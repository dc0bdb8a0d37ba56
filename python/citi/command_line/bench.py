"""`citi bench`: what this package costs on this machine, beside what you use now."""

from __future__ import annotations

import math
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from citi.command_line.as_given import command_as_given

if TYPE_CHECKING:
    from citi.benchmark.group import Group, Result, Settings

# What the help lists; a test compares them with the package's own, which cost an import of torch.
SUITES = (
    "layer",
    "linears",
    "scaling",
    "top-k",
    "decode",
    "importance ops",
    "importance",
    "training",
    "generation",
    "ceilings",
)
Dtype = StrEnum("Dtype", ["fp32", "bf16", "fp16"])
Clock = StrEnum("Clock", ["wall", "cpu"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])


def bench(
    context: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Argument(help=f"What is measured: {', '.join(SUITES)}. Default: all of them."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Groups with this text in their title, such as llama-8b or 'T 8192'; repeat for "
            "several. Default: all groups of the suites."
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Leave out the row of this name; repeat for several. A group's first row stays."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and smaller shapes: under 5 minutes.")
    ] = False,
    device: Annotated[Device, typer.Option(help="auto: the GPU where there is one.")] = Device.auto,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Repeat for several. Default: bf16 and fp32.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.0, help="Measured for each group. Default: 5, quick: 1."),
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds; rows that take longer are timed once. Default: none."),
    ] = None,
    compile_peers: Annotated[
        bool, typer.Option("--compile", help="The peers under torch.compile too: minutes.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of the CPU. Default: PyTorch's.")
    ] = None,
    clock: Annotated[
        Clock,
        typer.Option(help="cpu: this process's own CPU time, on a machine shared with others."),
    ] = Clock.wall,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="Write the results into this file too, after every group."),
    ] = None,
) -> None:
    """Time our layers and scorings beside their peers, in one process, as ratios.

    An op whose results are wrong is not timed: exit code 1. What is being done goes to the standard
    error. `benchmarks/report.py` makes tables and plots of the files that --json writes.
    """
    chosen = _chosen(suites)
    import torch

    from citi.benchmark.group import Settings

    settings = Settings(
        device=_device(device),
        dtypes=tuple(str(each) for each in dtype or (Dtype.bf16, Dtype.fp32)),
        is_quick=quick,
        seconds=seconds if seconds is not None else 1.0 if quick else 5.0,
        clock=str(clock),
        compiles=compile_peers,
        patience=math.inf if patience is None else patience,
        without=tuple(without or ()),
    )
    if threads is not None:
        torch.set_num_threads(threads)
    failed = _run(chosen, tuple(only or ("",)), settings, command_as_given(context), json)
    raise typer.Exit(1 if failed else 0)


def _run(
    chosen: list[str], only: tuple[str, ...], settings: Settings, command: str, json: Path | None
) -> bool:
    """Whether anything was wrong. What was measured until then is written after every group."""
    from citi.benchmark.measure import measure
    from citi.benchmark.record import Record, machine, machine_line
    from citi.benchmark.tables import as_lines
    from citi.durable import check_writable

    if json is not None:
        check_writable(json)
    groups = _groups(chosen, only, settings)
    console = Console(highlight=False)
    info = machine(settings.device, settings.clock)
    console.print(machine_line(info), soft_wrap=True)
    results: list[Result] = []
    failed = False
    for group in groups:
        try:
            results.append(measure(group, settings, _Progress(group)))
        except AssertionError as error:
            failed = True
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            console.print(f"\n{group.suite} · {group.title}: WRONG, not timed: {reason}")
            continue
        console.print()
        for line in as_lines(results[-1]):
            console.print(line, markup=False, soft_wrap=True)
        if json is not None:
            Record(info, command, tuple(results)).save(json)
    if json is not None and results:
        console.print(f"\nresults: {json}")
    return failed


def _groups(chosen: list[str], only: tuple[str, ...], settings: Settings) -> list[Group]:
    """Those of the suites whose titles hold one of the texts; nothing is made yet."""
    from citi.benchmark.suites import SUITES as OF_NAME

    groups = [group for name in chosen for group in OF_NAME[name](settings)]
    rows = sorted({name for group in groups for name in group.stands_for})
    if unknown := [name for name in settings.without if name not in rows]:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: no such row; there are: {', '.join(rows)}",
            param_hint="--without",
        )
    found = [group for group in groups if any(text in group.title for text in only)]
    if not found:
        titles = "; ".join(group.title for group in groups)
        raise typer.BadParameter(
            f"{', '.join(only)}: in no title; there are: {titles}", param_hint="--only"
        )
    return found


class _Progress:
    """Lines on the standard error with the seconds since the group began."""

    def __init__(self, group: Group) -> None:
        self._name = f"{group.suite} · {group.title}"
        self._start = time.perf_counter()

    def __call__(self, text: str) -> None:
        seconds = time.perf_counter() - self._start
        typer.echo(f"[{seconds:6.1f} s] {self._name}: {text}", err=True)


def _chosen(suites: list[str] | None) -> list[str]:
    names = suites or list(SUITES)
    if unknown := [name for name in names if name not in SUITES]:
        raise typer.BadParameter(
            f"{', '.join(unknown)}: there is no such suite; want one of {', '.join(SUITES)}",
            param_hint="SUITES",
        )
    return names


def _device(device: Device) -> str:
    import torch

    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter(
            "cuda: torch.cuda.is_available() is False here; want cpu", param_hint="--device"
        )
    return str(device)
