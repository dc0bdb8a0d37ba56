"""Plots of benchmark records: cost by shape, scaling, memory, roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from citi.benchmark.ceilings import COPY, PRODUCT
from citi.benchmark.group import Result
from citi.benchmark.record import Record
from citi.benchmark.tables import names_of

_OURS = ("#1f6f5c", "#5aa58f", "#a3d1c4")
_PEERS = ("#8c8c8c", "#c9a227", "#b5523b", "#5b7db1", "#7a5195", "#d98b5f", "#4f4f4f", "#a6bddb")
_SETTINGS = {"dpi": 140, "metadata": {"Software": None}}
_WIDTH = 8.0


def save(figure: Figure, path: Path) -> None:
    """The same figure gives the same bytes."""
    figure.savefig(path, **_SETTINGS)


def cost_by_shape(results: Sequence[Result], heads: Sequence[str], machine: str) -> Figure:
    """Bars of the time over the baseline: a cluster for each group, a bar for each row."""
    names = names_of(results)
    figure, axes = _new(1.6 + 0.12 * len(names) * len(results), machine)
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        ys, values = [], []
        for cluster, result in enumerate(results):
            row = next((row for row in result.rows if row.name == name), None)
            if row is not None:
                ys.append(cluster - 0.4 + (place + 0.5) * height)
                values.append(row.ratio["both"])
        axes.barh(ys, values, height=height * 0.9, color=_colour(name, names), label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(heads)), heads)
    axes.invert_yaxis()
    axes.set_xlim(left=0.9)
    axes.set_xlabel(f"time over the {results[0].baseline}, forward and backward")
    _legend(figure, axes)
    return figure


def memory_bars(result: Result, machine: str) -> Figure:
    """MiB kept for the backward, by row."""
    rows = [row for row in result.rows if row.saved_bytes > 0]
    figure, axes = _new(1.2 + 0.22 * len(rows), machine)
    names = [row.name for row in rows]
    values = [row.saved_bytes / 2**20 for row in rows]
    axes.barh(names, values, color=[_colour(name, names) for name in names])
    axes.bar_label(axes.containers[0], fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"MiB kept for the backward: {result.title}")
    return figure


def scaling(results: Sequence[Result], machine: str) -> Figure:
    """Time over the baseline against tokens, experts and rank, a panel for each."""
    axes_of = {"T": "tokens", "experts": "experts of rank 8", "rank": "rank of 4 experts"}
    key_of = {"T": "T", "experts": "E", "rank": "r"}
    figure = Figure(figsize=(_WIDTH, 3.0), layout="constrained")
    panels = figure.subplots(1, len(axes_of), sharey=True)
    names = [name for name in names_of(results) if name != results[0].baseline]
    for axes, (axis, title) in zip(panels, axes_of.items(), strict=True):
        chosen = [result for result in results if result.settings["axis"] == axis]
        xs = [result.settings[key_of[axis]] for result in chosen]
        for name in names:
            ys = [result.row(name).ratio["both"] for result in chosen]
            axes.plot(xs, ys, marker="o", markersize=3, color=_colour(name, names), label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.set_xlabel(title)
        axes.axhline(1.0, color="black", linewidth=0.8)
    panels[0].set_ylabel(f"time over the {results[0].baseline}")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(machine, fontsize=8)
    return figure


def roofline(record: Record, dtype: str, machine: str) -> Figure:
    """Arithmetic a second against arithmetic for each byte: the layer's rows under the ceilings.

    Arithmetic and traffic are the frozen layer's, for every row: what is above them is cost.
    """
    bandwidth, peak = _ceilings(record, dtype)
    figure, axes = _new(4.0, machine)
    results = record.of("layer", dtype=dtype)
    intensities = [result.flops / result.bytes for result in results]
    ridge = peak / bandwidth
    low, high = min(ridge, *intensities) / 4, max(ridge, *intensities) * 4
    axes.plot([low, ridge, high], [low * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="black")
    names = names_of(results)
    for name in names:
        points = [
            (intensity, result.flops / row.seconds["both"] / 1e12)
            for intensity, result in zip(intensities, results, strict=True)
            for row in result.rows
            if row.name == name
        ]
        xs, ys = zip(*points, strict=True)
        axes.scatter(xs, ys, s=18, color=_colour(name, names), label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"flop for each byte, {dtype}")
    axes.set_ylabel("useful TFLOP/s")
    _legend(figure, axes)
    return figure


def _ceilings(record: Record, dtype: str) -> tuple[float, float]:
    """Bytes and arithmetic a second."""
    copied, multiplied = (
        record.of("ceilings", what=COPY),
        record.of("ceilings", what=PRODUCT, dtype=dtype),
    )
    if not copied or not multiplied:
        raise ValueError(f"the roofline wants the suite 'ceilings' in {dtype} in the same record")
    copy, product = copied[0], multiplied[0]
    return (
        copy.bytes / copy.rows[0].seconds["both"],
        product.flops / product.rows[0].seconds["both"],
    )


def _new(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)


def _colour(name: str, names: Sequence[str]) -> str:
    is_ours = name.startswith("MOLoRA")
    kind = [other for other in names if other.startswith("MOLoRA") == is_ours]
    colours = _OURS if is_ours else _PEERS
    return colours[kind.index(name) % len(colours)]
