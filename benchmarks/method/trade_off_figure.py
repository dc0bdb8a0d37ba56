"""The comparison as a picture: what a row gained on tool calls, and what it cost elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from benchmarks.method.bootstrap import Estimate
from benchmarks.method.row_config import ROWS, TRIALS, load_row
from benchmarks.method.summary import API_BANK, EVERY_GENERAL, RowSummary

_OURS, _OTHERS, _BEFORE = "#1f6f5c", "#b5523b", "#8c8c8c"


def trade_off(rows: Mapping[str, RowSummary]) -> Figure:
    """Exact calls of API-Bank against the change of the general answers' NLL, with intervals.

    Args:
        rows: The measured ones, vanilla among them.
    """
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(0, color="black", linewidth=0.8, alpha=0.5)
    for name in filter(rows.__contains__, ROWS + TRIALS):
        row = rows[name]
        change = row.change(rows["vanilla"], EVERY_GENERAL) * 100
        calls = row.calls(API_BANK) * 100
        axes.errorbar(
            change.value,
            calls.value,
            xerr=_reach(change),
            yerr=_reach(calls),
            fmt="o",
            markersize=7,
            elinewidth=0.8,
            alpha=0.9,
            color=_colour(name),
        )
        axes.annotate(
            load_row(name).title,
            (change.value, calls.value),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=9,
            color=_colour(name),
        )
    axes.margins(0.12)
    axes.set_xlabel("general answers' NLL against vanilla, %   (left: likelier, right: forgets)")
    axes.set_ylabel("exact calls, API-Bank, %")
    return figure


def _reach(estimate: Estimate) -> list[list[float]]:
    """From a figure to both ends of its interval, as matplotlib wants it."""
    low, high = estimate.interval
    return [[max(0.0, estimate.value - low)], [max(0.0, high - estimate.value)]]


def _colour(name: str) -> str:
    if name == "vanilla":
        return _BEFORE
    return _OURS if load_row(name).method == "citi" else _OTHERS
