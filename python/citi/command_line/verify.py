"""`citi verify`: whether a run directory is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Load base model and adapter too.")
    ] = True,
) -> None:
    """Whether a run's files are those it wrote, fit each other, and the adapter has an effect.

    Nothing is written. Exit code 1 when something is wrong.
    """
    from citi.verify import verify_run

    findings = verify_run(run, with_model=model)
    width = max(len(finding.part) for finding in findings)
    for finding in findings:
        word, text = ("WRONG", finding.problem) if finding.problem else ("ok", finding.note)
        typer.echo(f"{word:5}  {finding.part:{width}}  {text}".rstrip())
    wrong = sum(bool(finding.problem) for finding in findings)
    if wrong:
        typer.secho(f"{wrong} of {len(findings)} parts are wrong", err=True, fg=typer.colors.RED)
        raise typer.Exit(1)
