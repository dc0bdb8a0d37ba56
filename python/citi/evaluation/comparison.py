"""Evaluation results side by side: for the terminal (rich) and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from citi.evaluation.evaluate import EvalResult
from citi.evaluation.tool_calls import SCORES

_NOTHING = "-"
_TITLES = {"tuned": "CITI", "lora": "LoRA on tool data"}
_SECTIONS = (("tool", "tool calls"), ("general", "general ability"))


@dataclass(frozen=True)
class _Row:
    """One line: its label, how many samples stand behind it, one cell a result."""

    label: str
    count: str
    cells: tuple[str, ...]


def title_of(name: str) -> str:
    """What a reader calls the result in eval/<name>.json."""
    return _TITLES.get(name, name)


def mean_relative_change(base: EvalResult, other: EvalResult) -> float | None:
    """Mean over general sets of nll(other) / nll(base) - 1; positive means forgetting.

    Returns:
        None where no set has an NLL above zero in both.
    """
    changes = [
        change for name in base.general if (change := _change(base, other, name)) is not None
    ]
    return sum(changes) / len(changes) if changes else None


def comparison_table(results: Mapping[str, EvalResult]) -> Table:
    """A rich table with one column a result; the first is what the others are compared with.

    Tool rows: format, name, arguments and exact in percent, with counts, the share of questions
    that no tool fits and that were answered without a call, and ROUGE-L of responses. General
    rows: answer NLL with its change against the first column, exact match.

    Args:
        results: column title, or name of a file in eval/ → result, such as base, tuned, lora.

    Raises:
        ValueError: `results` is empty.
    """
    sections = _sections(results)
    caption = Text("\n".join(_footnotes(results)), style="dim")
    table = Table(caption=caption, caption_justify="left")
    table.add_column("")
    table.add_column("n", justify="right")
    for title in results:
        table.add_column(Text(title_of(title)), justify="right")
    for title, rows in sections:
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for row in rows:
            table.add_row(Text(row.label), row.count, *row.cells)
    return table


def comparison_markdown(results: Mapping[str, EvalResult]) -> str:
    """The content of `comparison_table` as a Markdown table with its footnotes below.

    Raises:
        ValueError: `results` is empty.
    """
    sections = _sections(results)
    lines = [
        _markdown_line(["", "n", *map(title_of, results)]),
        _markdown_line(["---"] + ["---:"] * (1 + len(results))),
    ]
    for title, rows in sections:
        lines.append(_markdown_line([f"**{title}**", "", *[""] * len(results)]))
        lines += [_markdown_line([row.label, row.count, *row.cells]) for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in _footnotes(results)), ""])


def _sections(results: Mapping[str, EvalResult]) -> list[tuple[str, list[_Row]]]:
    """The table's sections that hold anything."""
    if not results:
        raise ValueError("results: wanted at least one evaluation result, got none")
    columns = list(results.values())
    rows = {"tool": _tool_rows(columns), "general": _general_rows(columns)}
    return [(title, rows[key]) for key, title in _SECTIONS if rows[key]]


def _tool_rows(columns: list[EvalResult]) -> list[_Row]:
    rows = []
    for name in _names(columns, "tool"):
        figures = [column.tool.get(name, {}) for column in columns]
        if any(figure.get("num_calls") for figure in figures):
            rows += [
                _Row(
                    f"{name} · {score}",
                    _count(figures, "num_calls"),
                    tuple(
                        _share(f, score, "num_calls", whole=score != "arguments") for f in figures
                    ),
                )
                for score in SCORES
            ]
        if any(figure.get("num_irrelevant") for figure in figures):
            cells = tuple(_share(f, "irrelevance", "num_irrelevant", whole=True) for f in figures)
            label = f"{name} · no call where no tool fits"
            rows.append(_Row(label, _count(figures, "num_irrelevant"), cells))
        if any(figure.get("num_responses") for figure in figures):
            cells = tuple(_share(f, "rouge_l", "num_responses", whole=False) for f in figures)
            rows.append(_Row(f"{name} · ROUGE-L", _count(figures, "num_responses"), cells))
    return rows


def _general_rows(columns: list[EvalResult]) -> list[_Row]:
    rows = []
    for name in _names(columns, "general"):
        figures = [column.general.get(name, {}) for column in columns]
        cells = tuple(_nll(columns[0], column, name) for column in columns)
        rows.append(_Row(f"{name} · answer NLL", _count(figures, "n"), cells))
        if any(figure.get("num_judged") for figure in figures):
            cells = tuple(_share(f, "exact_match", "num_judged", whole=True) for f in figures)
            rows.append(_Row(f"{name} · exact match", _count(figures, "num_judged"), cells))
    if rows and len(columns) > 1:
        changes = [mean_relative_change(columns[0], column) for column in columns[1:]]
        cells = tuple(_NOTHING if change is None else f"{change:+.1%}" for change in changes)
        rows.append(_Row("mean change of answer NLL", "", ("", *cells)))
    return rows


def _names(columns: list[EvalResult], kind: str) -> list[str]:
    """The sets of all results, each once, in order of appearance."""
    return list(dict.fromkeys(name for column in columns for name in getattr(column, kind)))


def _count(figures: list[dict[str, Any]], key: str) -> str:
    """The number of samples; all of them where the results differ in it."""
    counts = dict.fromkeys(str(figure[key]) for figure in figures if key in figure)
    return " / ".join(counts)


def _share(figures: dict[str, Any], key: str, count_key: str, *, whole: bool) -> str:
    """A share in percent; with `whole`, the count behind it too."""
    value = figures.get(key)
    if value is None:
        return _NOTHING
    count = figures[count_key]
    return f"{value:.1%} ({round(value * count)}/{count})" if whole else f"{value:.1%}"


def _nll(base: EvalResult, other: EvalResult, name: str) -> str:
    value = other.general.get(name, {}).get("nll")
    if value is None:
        return _NOTHING
    change = None if other is base else _change(base, other, name)
    return f"{value:.3f}" if change is None else f"{value:.3f} ({change:+.1%})"


def _change(base: EvalResult, other: EvalResult, name: str) -> float | None:
    """nll(other) / nll(base) - 1 of one general set."""
    before = base.general.get(name, {}).get("nll")
    after = other.general.get(name, {}).get("nll")
    return None if before is None or after is None or before <= 0 else after / before - 1


def _footnotes(results: Mapping[str, EvalResult]) -> list[str]:
    """What a reader must know, and what the results left out."""
    first = next(iter(results))
    lines = []
    if any(result.tool for result in results.values()):
        lines.append("arguments: share of the wanted arguments that were given rightly")
    if any(result.general for result in results.values()):
        lines.append(
            "answer NLL: nats a token of the reference answer, lower is better"
            + (f"; change against {title_of(first)}" if len(results) > 1 else "")
        )
        lines.append("learning an ability's answer format lowers its NLL too, whatever was kept")
    notes: dict[str, list[str]] = {}
    for title, result in results.items():
        for note in result.notes:
            notes.setdefault(note, []).append(title_of(title))
    for note, titles in notes.items():
        everywhere = len(titles) == len(results)
        lines.append(note if everywhere else f"{note} ({', '.join(titles)})")
    return lines


def _markdown_line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
