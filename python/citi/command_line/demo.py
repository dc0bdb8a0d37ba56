"""`citi demo`: the whole method on a real small model and real data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from citi.command_line.failures import set_resume


def demo(
    context: typer.Context,
    quick: Annotated[
        bool, typer.Option("--quick", help="Less data: a few minutes, weaker numbers.")
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run directory.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Importance, plan, training, evaluation and report, on the CPU, in minutes."""
    words = ["citi", "demo", *["--quick"] * quick, "--output", str(output)]
    set_resume(context, shlex.join(words))
    from citi.command_line.comparison import print_comparison
    from citi.command_line.progress import Watcher
    from citi.demo import run_demo
    from citi.run_directory import RunDirectory

    console = Console()
    with Watcher(console) as watcher:
        run_demo(quick=quick, output=output, observer=watcher)
    print_comparison(console, RunDirectory(output))
