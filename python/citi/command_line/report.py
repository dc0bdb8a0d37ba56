"""`citi report`: write a run's HTML page again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
) -> None:
    """Write report.html of a run from its files; a partial run gives a partial report."""
    from citi.report import build_report

    path = build_report(run)
    typer.echo(f"report: {path}")
