"""`citi eval`: base against tuned on a run's held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
) -> None:
    """Measure tool calls and general ability of base and tuned model; one table, a new report."""
    from citi.command_line.comparison import print_comparison
    from citi.command_line.progress import Watcher
    from citi.report import build_report
    from citi.run import evaluate_run
    from citi.run_directory import RunDirectory

    console = Console()
    with Watcher(console) as watcher:
        evaluate_run(run, observer=watcher)
        try:
            build_report(run)
        except ImportError as error:
            watcher.line(f"no new report: {error}")
    print_comparison(console, RunDirectory(run))
