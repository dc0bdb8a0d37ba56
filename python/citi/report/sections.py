"""The report's parts below the trade-off: importance, overlap, training, gates, what ran."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from citi.components import split_layer
from citi.report import html, plots
from citi.report.drawing import svg
from citi.report.run_files import RunFiles
from citi.stages import STAGES

if TYPE_CHECKING:
    from citi.gates import GateSummary
    from citi.importance.ability_scores import AbilityScores
    from citi.plan import Plan

_SCALE_SPAN = 1e4  # the colour scale covers at most this ratio below the largest share


def importance(scores: AbilityScores, plan: Plan | None) -> html.Section | None:
    """Two maps on one colour scale, with the plan's components; None without numbered layers."""
    if all(split_layer(name)[0] is None for name in scores.tool):
        return None
    shares = {"tool": scores.tool_importance}
    if scores.general:
        total = len(scores.general)
        shares["general"] = {k: v / total for k, v in scores.general_importance.items()}
    largest = max(max(values.values()) for values in shares.values())
    smallest = min(v for values in shares.values() for v in values.values() if v > 0)
    limits = (max(smallest, largest / _SCALE_SPAN), largest)
    if limits[0] == limits[1]:
        limits = (limits[0] / 10, limits[1])
    marked = _marked(plan)
    figures = [
        _importance_figure(kind, values, marked=marked, limits=limits)
        for kind, values in shares.items()
    ]
    body = html.pair(figures)
    if plan is not None:
        body += _plan_lists(plan)
    return html.Section(
        anchor="importance",
        title="Which components matter",
        lead="First-order estimate of how much the loss on the answers would change if a"
        " component were zero, as a share of the total over all components."
        + _stability(scores, plan),
        body=body,
    )


def _stability(scores: AbilityScores, plan: Plan | None) -> str:
    """Whether a second scoring would choose the plan's components; nothing if that is not known."""
    from citi.importance.stability import ranking_stability, stability_obstacle

    share = 0.20 if plan is None else plan.important_share
    if stability_obstacle(scores.tool, share) is not None:
        return ""
    return f" Is the tool ranking sure? {ranking_stability(scores.tool, share=share).sentence}."


def _marked(plan: Plan | None) -> dict[str, str]:
    if plan is None:
        return {}
    return dict.fromkeys(plan.unimportant, "uco") | dict.fromkeys(plan.important, "molora")


def _importance_figure(
    kind: str,
    values: Mapping[str, float],
    *,
    marked: Mapping[str, str],
    limits: tuple[float, float],
) -> str:
    top = max(values, key=values.__getitem__)
    figure = plots.importance_map(values, marked=marked, limits=limits, title=f"{kind} importance")
    alt = f"{kind} importance by layer and component; the largest is {top}: {values[top]:.2%}"
    symbol = "M_h" if kind == "tool" else "C_h, mean over the abilities"
    caption = (
        f"{symbol}: one cell is one linear module; the brighter, the more it matters for"
        f" {'the tool data' if kind == 'tool' else 'the general abilities'}."
        f" Largest: {top} ({values[top]:.2%})."
    )
    if marked:
        caption += (
            " White dot: gets a MOLoRA adapter (stages RP and MI). White square: its own weights"
            " are trained (stage UCO)."
        )
    outside = [name for name in values if split_layer(name)[0] is None]
    if outside:
        caption += f" Not drawn, outside the layers: {', '.join(outside)}."
    return html.figure(svg(figure, name=f"importance-{kind}", alt=alt), caption)


def _plan_lists(plan: Plan) -> str:
    rows = {
        f"MOLoRA ({len(plan.important)})": ", ".join(plan.important),
        f"unfrozen in UCO ({len(plan.unimportant)})": ", ".join(plan.unimportant),
    }
    if plan.overlap:
        rows["in both sets, MOLoRA wins"] = ", ".join(plan.overlap)
    return html.details("The plan's components by name", html.facts_table(rows))


def overlap(scores: AbilityScores) -> html.Section | None:
    """Jaccard indices of the high thirds; None with one ability or too few components."""
    from citi.analysis import jaccard_matrix, random_jaccard

    abilities = {"tool": scores.tool, **scores.general}
    if len(abilities) < 2 or len(scores.tool) < 3:
        return None
    names = list(abilities)
    values = jaccard_matrix(abilities, third="high")
    chance = random_jaccard(len(scores.tool))
    figure = plots.overlap_matrix(names, values)
    alt = "; ".join(
        f"{row} and {column}: {values[row, column]:.2f}"
        for index, row in enumerate(names)
        for column in names[index + 1 :]
    )
    caption = (
        "Jaccard index of the high thirds: of all components that are in the upper third for one"
        " of two abilities, the share that is there for both. 1: the same components;"
        f" {chance:.2f}: what two random thirds would give."
    )
    return html.Section(
        anchor="overlap",
        title="Do abilities share components?",
        lead="Where tool use leans on the same components as another ability, training them for"
        " tools puts that ability at risk.",
        body=html.figure(svg(figure, name="overlap", alt=alt), caption, alone=True),
    )


def curves(metrics: Sequence[Mapping[str, Any]]) -> html.Section | None:
    """Losses and mean backbone gates over the optimizer steps of the three stages."""
    drawings = [drawing for chart in _CHARTS if (drawing := _curve(chart, metrics))]
    if not drawings:
        return None
    names = "; ".join(f"{stage.name.upper()}: {stage.title}" for stage in STAGES)
    return html.Section(
        anchor="training",
        title="Training",
        lead=f"{names}. Thin lines: as logged; thick: moving mean.",
        body=html.pair(drawings),
    )


@dataclass(frozen=True)
class _Chart:
    """A panel of the training section: its series (name -> key of metrics.jsonl) and caption."""

    name: str
    label: str
    series: Mapping[str, str]
    caption: str


_CHARTS = (
    _Chart(
        "loss",
        "cross entropy",
        {"loss": "ce_loss"},
        "Loss on the answer tokens of the training mix. It starts anew with each stage's own"
        " learning rate schedule.",
    ),
    _Chart(
        "router-loss",
        "router loss",
        {"router loss": "router_loss"},
        "Router loss, summed over the layers, before its weight. Lower: the gates tell tool"
        " samples from general ones better.",
    ),
    _Chart(
        "base-kl",
        "KL from the base, nats a token",
        {"base KL": "base_kl"},
        "Divergence of the model's predictions from the base's on the answers of general samples."
        " Higher: it has moved further from the base.",
    ),
    _Chart(
        "gate-training",
        "mean backbone gate",
        {"tool": "backbone_gate_tool", "general": "backbone_gate_general"},
        "What the router loss drives apart: the share of the gate that the backbone neuron takes"
        " on tool tokens (should fall) and on general tokens (should rise).",
    ),
)


def _curve(chart: _Chart, metrics: Sequence[Mapping[str, Any]]) -> str | None:
    series = {name: _by_stage(metrics, key) for name, key in chart.series.items()}
    series = {name: stages for name, stages in series.items() if stages}
    if not series:
        return None
    alt = "; ".join(
        f"{name} in {stage}: from {points[0][1]:.3g} to {points[-1][1]:.3g}"
        for name, stages in series.items()
        for stage, points in stages.items()
    )
    figure = plots.stage_curves(series, label=chart.label)
    return html.figure(svg(figure, name=f"curve-{chart.name}", alt=alt), chart.caption)


def _by_stage(
    metrics: Sequence[Mapping[str, Any]], key: str
) -> dict[str, list[tuple[float, float]]]:
    """Stage label -> (step, value) in stage order; a step logged twice counts once, the last."""
    stages: dict[str, dict[float, float]] = {}
    for row in metrics:
        value = row.get(key)
        if isinstance(value, (int, float)) and math.isfinite(value) and "step" in row:
            stages.setdefault(row.get("stage", ""), {})[row["step"]] = value
    return {
        stage.name.upper(): sorted(stages[stage.name].items())
        for stage in STAGES
        if stage.name in stages
    }


def gates(summary: GateSummary) -> html.Section:
    """Histogram of the backbone gate and its mean per layer, tool against general."""
    alt = "; ".join(
        f"{kind} tokens: mean backbone gate {mean:.2f}"
        for kind in ("tool", "general")
        if (mean := _histogram_mean(summary.bins, summary.counts[kind])) is not None
    )
    histogram = html.figure(
        svg(plots.gate_histogram(summary.bins, summary.counts), name="gates", alt=alt),
        "How much of the gate the backbone neuron takes, over all MOLoRA layers. General tokens"
        " should stand right (the experts stay out), tool tokens left (the experts work)."
        f" {alt}.",
    )
    by_layer = html.figure(
        svg(plots.gate_by_layer(summary.layers), name="gate-layers", alt=f"by layer; {alt}"),
        "The same, layer by layer: the further apart the two lines, the better this layer's"
        " router tells tool text from general text.",
    )
    return html.Section(
        anchor="gates",
        title="What the routers do",
        lead="Gate entry 0 (the backbone neuron) scales nothing: what it takes, the experts lose.",
        body=html.pair([histogram, by_layer]),
    )


def _histogram_mean(bins: Sequence[float], counts: Sequence[int]) -> float | None:
    total = sum(counts)
    if not total:
        return None
    centres = [(low + high) / 2 for low, high in pairwise(bins)]
    return sum(c * n for c, n in zip(centres, counts, strict=True)) / total


def settings(run: RunFiles) -> html.Section | None:
    """How long each phase took, the resolved recipe and the environment, as tables."""
    parts = []
    if seconds := _phase_seconds(run.manifest):
        parts.append("<h3>Time</h3>" + html.facts_table(seconds))
    if run.recipe:
        parts.append("<h3>Recipe</h3>" + html.facts_table(run.recipe))
    if run.environment:
        parts.append("<h3>Environment</h3>" + html.facts_table(run.environment))
    if not parts:
        return None
    return html.Section(
        anchor="settings",
        title="What ran",
        lead="Every setting of this run after defaults and overrides, and where it ran.",
        body="".join(parts),
    )


def _phase_seconds(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Finished phases with their time; not the report's own, which is recorded after it."""
    return {
        name: f"{round(facts['seconds']) // 60}:{round(facts['seconds']) % 60:02d} min"
        for name, facts in manifest.get("phases", {}).items()
        if "seconds" in facts and name != "report"
    }


def missing(run: RunFiles) -> html.Section | None:
    """Names what this run has not written yet."""
    if not run.missing:
        return None
    rows = {name: f"not in this run yet; written by {writer}" for name, writer in run.missing}
    return html.Section(
        anchor="missing",
        title="Not in this report",
        lead="These files are not there, so their parts are left out.",
        body=html.facts_table(rows),
    )
