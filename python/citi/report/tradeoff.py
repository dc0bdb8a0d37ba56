"""Base against tuned: the table, the scatter and the headline numbers of the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape

from citi.evaluation import EvalResult
from citi.evaluation.comparison import title_of
from citi.report import html, plots
from citi.report.drawing import svg


@dataclass(frozen=True)
class _Metric:
    key: str
    label: str
    count_key: str
    counted: str
    percent: bool = True
    lower_is_better: bool = False

    def show(self, value: float) -> str:
        return f"{100 * value:.1f} %" if self.percent else f"{value:.3f}"

    def change(self, value: float, base: float) -> str:
        return f"{100 * (value - base):+.1f}" if self.percent else f"{value - base:+.3f}"

    def verdict(self, value: float, base: float) -> str:
        if self.show(value) == self.show(base):
            return ""
        return "good" if (value < base) == self.lower_is_better else "bad"


_METRICS = {
    "tool": (
        _Metric("exact", "exact call", "num_calls", "calls"),
        _Metric("format", "well-formed call", "num_calls", "calls"),
        _Metric("name", "right tool name", "num_calls", "calls"),
        _Metric("arguments", "right arguments", "num_calls", "calls"),
        _Metric("irrelevance", "no call where no tool fits", "num_irrelevant", "questions"),
        _Metric("rouge_l", "ROUGE-L", "num_responses", "responses"),
    ),
    "general": (
        _Metric("nll", "answer NLL ↓", "n", "answers", percent=False, lower_is_better=True),
        _Metric("exact_match", "exact match", "num_judged", "answers"),
    ),
}


def mean_exact(result: EvalResult) -> float | None:
    """Exact tool calls, mean over the tool sets; None where none was measured."""
    return _mean([row.get("exact") for row in result.tool.values()])


def general_change(result: EvalResult, base: EvalResult) -> float | None:
    """Mean over the shared general sets of NLL(result) - NLL(base), in nats per answer token."""
    before, after = base.general, result.general
    pairs = [(after[name].get("nll"), before[name].get("nll")) for name in after if name in before]
    return _mean([new - old for new, old in pairs if new is not None and old is not None])


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def headline(results: Mapping[str, EvalResult]) -> list[tuple[str, str, str]]:
    """Cards for the page's head: what the tuning gained and what it cost."""
    rows = []
    base, tuned = results.get("base"), results.get("tuned")
    if base is None or tuned is None:
        return rows
    before, after = mean_exact(base), mean_exact(tuned)
    if before is not None and after is not None:
        note = f"base {100 * before:.1f} %, so {100 * (after - before):+.1f} points"
        rows.append(("Exact tool calls", f"{100 * after:.1f} %", note))
    change = general_change(tuned, base)
    if change is not None:
        note = "mean over the general sets; above zero means forgetting"
        rows.append(("General answer NLL", f"{change:+.3f}", note))
    return rows


def table(results: Mapping[str, EvalResult]) -> str:
    """Metrics down, results across; every result but the base carries its change against it."""
    names = list(results)
    head = "".join(f'<th scope="col">{escape(title_of(name))}</th>' for name in names)
    lines = []
    for kind in ("tool", "general"):
        for dataset in _datasets(results, kind):
            lines.append(_group_line(results, kind, dataset))
            lines.extend(_metric_lines(results, kind, dataset))
    body = "".join(lines)
    return (
        f'<div class="scroll"><table class="results"><thead><tr><th scope="col">measure</th>{head}'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _datasets(results: Mapping[str, EvalResult], kind: str) -> list[str]:
    return list(dict.fromkeys(name for row in results.values() for name in getattr(row, kind)))


def _group_line(results: Mapping[str, EvalResult], kind: str, dataset: str) -> str:
    label = f'<span class="{kind}-name">{kind}</span>: {escape(dataset)}'
    return f'<tr class="group"><th colspan="{len(results) + 1}">{label}</th></tr>'


def _metric_lines(results: Mapping[str, EvalResult], kind: str, dataset: str) -> Iterator[str]:
    figures = {name: getattr(row, kind).get(dataset, {}) for name, row in results.items()}
    for metric in _METRICS[kind]:
        values = {name: figure.get(metric.key) for name, figure in figures.items()}
        if any(value is not None for value in values.values()):
            cells = "".join(_cell(metric, values, name) for name in results)
            counts = dict.fromkeys(figure.get(metric.count_key) for figure in figures.values())
            sizes = " / ".join(str(count) for count in counts if count is not None)
            label = f"{metric.label}<small>{sizes} {metric.counted}</small>"
            yield f'<tr><th scope="row">{label}</th>{cells}</tr>'


def _cell(metric: _Metric, values: Mapping[str, float | None], name: str) -> str:
    value, base = values[name], values.get("base")
    if value is None:
        return "<td>not measured</td>"
    if name == "base" or base is None:
        return f"<td>{metric.show(value)}</td>"
    change = metric.change(value, base)
    verdict = metric.verdict(value, base)
    return f'<td>{metric.show(value)}<small class="{verdict}">{change}</small></td>'


def _notes(results: Mapping[str, EvalResult]) -> str:
    """What a reader must know: how far chance moves a share, and what was not measured.

    The half-width 1.96 sqrt(1/4 / n) belongs to the smallest number of judged answers.
    """
    counts = [
        figure[key]
        for result in results.values()
        for figures, key in ((result.tool, "num_calls"), (result.general, "num_judged"))
        for figure in figures.values()
        if figure.get(key)
    ]
    lines = list(dict.fromkeys(note for result in results.values() for note in result.notes))
    if counts:
        points = 100 * 1.96 * math.sqrt(0.25 / min(counts))
        lines.insert(
            0,
            f"Chance alone moves a share of {min(counts)} answers by up to ±{points:.0f} points"
            " (95 %).",
        )
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def section(results: Mapping[str, EvalResult]) -> html.Section:
    """The trade-off table and, where a base was measured, the scatter of all results."""
    body = table(results) + _notes(results)
    base = results.get("base")
    points = {}
    for name, result in results.items() if base is not None else ():
        exact, change = mean_exact(result), general_change(result, base)
        if exact is not None and change is not None:
            points[name] = (change, exact)
    if len(points) > 1:
        alt = "; ".join(
            f"{title_of(name)}: {100 * y:.1f} % exact, NLL {x:+.3f}"
            for name, (x, y) in points.items()
        )
        drawing = svg(plots.trade_off(points), name="tradeoff", alt=alt)
        caption = (
            "Each dot is one model. Up is more exact tool calls; right of the line at 0 is a"
            " higher NLL on the general answers than the base model has, so forgetting."
            " The best place is high and not to the right. Learning an ability's answer format"
            " lowers its NLL too, whatever was kept."
        )
        body += "<h3>Gain against forgetting</h3>" + html.figure(drawing, caption, alone=True)
    return html.Section(
        anchor="tradeoff",
        title="Base against tuned",
        lead="What the tuning gained on tool calls, and what it cost elsewhere. Small print: the"
        " change against the base model, in points for shares. ↓: lower is better.",
        body=body,
    )
