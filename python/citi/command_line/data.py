"""`citi data check`: what a recipe's data files hold, what is cut, what the loss is taken on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from citi.data import DataReport, RenderStatistics, Sample, Segment
    from citi.recipe import Recipe

_OPEN, _CLOSE = "⟦", "⟧"
_SHOWN_CHARACTERS = 4000


def check(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Recipe keys to change.")
    ] = None,
    all_of_it: Annotated[
        bool, typer.Option("--all", help="Show the rendered sample in full length.")
    ] = False,
) -> None:
    """Detected formats, token statistics, what is cut, one sample rendered with its loss mask.

    Exit code 1 when a file has no sample that could be trained on.
    """
    from transformers import AutoTokenizer

    from citi.data import DataError, read_data
    from citi.recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    useless: list[str] = []
    shown: Sample | None = None
    for name, path in settings.data_files.items():
        task_type = 1 if name.partition(".")[0] in ("tool", "eval_tool") else 0
        samples, report = read_data(path, task_type=task_type)
        _print_report(console, name, report)
        try:
            statistics = _render_all(console, samples, settings, tokenizer)
        except DataError as error:
            console.print(Text(f"{error}\n", style="red"))
            useless.append(name)
            continue
        _print_statistics(console, statistics, settings.max_length)
        shown = shown or _first_trained(samples, settings, tokenizer)
    if shown is not None:
        _print_sample(console, shown, settings, tokenizer, in_full=all_of_it)
    if useless:
        raise DataError(
            f"no sample can be trained on in {', '.join(useless)}; the reasons stand above"
        )


def _render_all(
    console: Console, samples: list[Sample], settings: Recipe, tokenizer: Any
) -> RenderStatistics:
    from citi.command_line.progress import Watcher
    from citi.data import RenderedDataset

    with Watcher(console) as watcher:
        return RenderedDataset(
            samples,
            tokenizer,
            max_length=settings.max_length,
            train_on=settings.train_on,
            progress=watcher,
        ).statistics


def _first_trained(samples: list[Sample], settings: Recipe, tokenizer: Any) -> Sample | None:
    """The first sample that a run would train on."""
    from citi.data import DataError, Renderer

    renderer = Renderer(tokenizer, max_length=settings.max_length, train_on=settings.train_on)
    for sample in samples:
        # What the template refuses has been counted under "left out".
        with contextlib.suppress(DataError):
            if renderer.render(sample).num_answer_tokens:
                return sample
    return None


def _print_report(console: Console, name: str, report: DataReport) -> None:
    """What reading the file found."""
    console.print(Text(f"{name}: {report.path}", style="bold"), soft_wrap=True)
    table = _facts()
    for verdict in report.formats:
        keys = ", ".join(verdict.keys)
        table.add_row(
            "format", Text(f"{verdict.name}, {verdict.num_rows} rows, by their keys {keys}")
        )
    kinds = f"{report.num_tool} tool, {report.num_general} general"
    table.add_row("samples", f"{report.num_samples} of {report.num_rows} rows: {kinds}")
    for warning in report.warnings:
        table.add_row("warning", Text(warning, style="yellow"))
    console.print(table)


def _print_statistics(console: Console, found: RenderStatistics, max_length: int) -> None:
    """What rendering and the cut made of it."""
    table = _facts()
    table.add_row(
        "tokens",
        f"median {found.median_tokens}, 95 % up to {found.p95_tokens}, longest {found.max_tokens}",
    )
    share = found.num_answer_tokens / found.num_tokens
    table.add_row("trained on", f"{found.num_answer_tokens} of {found.num_tokens} ({share:.1%})")
    table.add_row("cut", f"{found.num_truncated} of {found.num_rendered} at {max_length} tokens")
    for reason, count in found.dropped.items():
        line = f"{count} samples: {reason} (first: {found.examples[reason]})"
        table.add_row("left out", Text(line, style="yellow"))
    console.print(table)
    console.print()


def _facts() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="dim", min_width=11)
    table.add_column(overflow="fold")
    return table


def _print_sample(
    console: Console, sample: Sample, settings: Recipe, tokenizer: Any, *, in_full: bool
) -> None:
    """The text that the model sees; what the loss is taken on stands in brackets, in green."""
    from citi.data import describe_rendered

    segments = describe_rendered(
        sample, tokenizer, max_length=settings.max_length, train_on=settings.train_on
    )
    console.print(
        Text.assemble(
            (f"One sample as the model sees it ({sample.source}); the loss is taken on ", "bold"),
            (f"{_OPEN}this{_CLOSE}", "bold green"),
        ),
        soft_wrap=True,
    )
    console.print(_marked(segments, limit=None if in_full else _SHOWN_CHARACTERS), soft_wrap=True)


def _marked(segments: list[Segment], *, limit: int | None) -> Text:
    text = Text()
    for segment in segments:
        if segment.trained:
            text.append(f"{_OPEN}{segment.text}{_CLOSE}", "bold green")
        else:
            text.append(segment.text)
    if limit is None or len(text) <= limit:
        return text
    half = limit // 2
    gap = f"\n… {len(text) - 2 * half} characters; citi data check --all shows them …\n"
    return Text.assemble(text[:half], (gap, "dim"), text[-half:])
