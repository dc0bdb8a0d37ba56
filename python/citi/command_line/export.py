"""`citi export`: a run's model for programs that do not know MOLoRA."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from citi.export import ExportResult


Form = StrEnum("Form", ["lora", "hf"])
Gates = StrEnum("Gates", ["tool", "general", "both"])


def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    to: Annotated[
        Form,
        typer.Option("--to", help="lora: a LoRA for PEFT. hf: plain weights, for every server."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; else export_… in the run's.")
    ] = None,
    gates: Annotated[
        Gates, typer.Option("--gates", help="The data over which a gate's mean is taken.")
    ] = Gates.tool,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Of each data file, for means and measurement.")
    ] = 32,
) -> None:
    """Write a run's model for programs without MOLoRA: its gates fixed, and what that costs."""
    from citi.command_line.comparison import print_path
    from citi.command_line.progress import Watcher
    from citi.export import export_run

    console = Console()
    with Watcher(console) as watcher:
        result = export_run(
            run,
            to.value,
            output=output,
            gates=gates.value,
            num_samples=samples,
            observer=watcher,
        )
    console.print(cost_table(result))
    print_path(console, "exported", result.directory)


def cost_table(result: ExportResult) -> Table:
    """Base, tuned and exported, a line for each data set."""
    kind = "held-out" if result.is_held_out else "training"
    table = Table(title=f"answer NLL on {kind} data, nats a token", title_justify="left")
    table.add_column("")
    for name in ("base", "tuned", "exported"):
        table.add_column(name, justify="right")
    for title, nll in result.answer_nll.items():
        change = nll["exported"] - nll["tuned"]
        exported = f"{nll['exported']:.3f}  ({change:+.3f})"
        table.add_row(title, f"{nll['base']:.3f}", f"{nll['tuned']:.3f}", exported)
    return table
