"""The last words of `train`, `eval` and `demo`: base against tuned, and where the report lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from citi.run_directory import RunDirectory


def print_comparison(console: Console, run: RunDirectory) -> None:
    """The table of eval/*.json, and the report's path, as far as they exist."""
    from citi.evaluation import comparison_table
    from citi.report import read_results

    results = read_results(run.evaluation)
    if results:
        console.print(comparison_table(results))
    if run.report_file.is_file():
        print_path(console, "report", run.report_file)


def print_path(console: Console, label: str, path: Path) -> None:
    """`label: path` on one line, however long, so that it can be copied."""
    console.print(f"{label}: {path}", soft_wrap=True, highlight=False, markup=False)
