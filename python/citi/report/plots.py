"""The report's figures. Each function takes plain numbers and returns a matplotlib Figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from citi.components import split_layer
from citi.evaluation.comparison import title_of
from citi.report.drawing import ACCENT, GENERAL, INK, LINE, MUTED, PAPER, TOOL, new_figure, themed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.ma import MaskedArray

_PANEL_WIDTH = 4.8  # inches: two panels side by side on a desk, one above the other on a phone
_CURVE_HEIGHT = 2.7
_CELL_HEIGHT = 0.17
_COLOUR_STEPS = 9


def _columns(names: Iterable[str]) -> dict[str, str]:
    """Path inside a layer -> label, in model order; the last word alone where that is unique."""
    paths = list(dict.fromkeys(path for _, path in map(split_layer, names)))
    last = [path.rsplit(".", 1)[-1] for path in paths]
    return {
        path: word if last.count(word) == 1 else path
        for path, word in zip(paths, last, strict=True)
    }


@themed
def importance_map(
    shares: Mapping[str, float],
    *,
    marked: Mapping[str, str],
    limits: tuple[float, float],
    title: str,
) -> Figure:
    """Layers x components, colour = share of the total importance, on a logarithmic scale.

    Args:
        shares: full component name -> importance (M_h or C_h; sums to 1).
        marked: full component name -> "molora" or "uco", drawn as a dot or a square.
        limits: smallest and largest share of the colour scale, shared by the maps of one page.
        title: ability.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    layers, columns, cells = _cells(shares)
    grid = _masked_grid(
        {cells[name]: max(share, limits[0]) for name, share in shares.items() if name in cells},
        (len(layers), len(columns)),
    )
    spots: dict[str, list[tuple[float, float]]] = {"molora": [], "uco": []}
    for name, (row, column) in cells.items():
        if name in marked:
            spots[marked[name]].append((column + 0.5, row + 0.5))
    height = max(1.6, len(layers) * _CELL_HEIGHT) + 1.1
    figure, axes = new_figure(_PANEL_WIDTH, min(height, 14.0))
    mesh = axes.pcolormesh(
        grid,
        cmap=colormaps["viridis"].resampled(_COLOUR_STEPS),
        norm=LogNorm(*limits),
        edgecolors=PAPER,
        linewidth=0.8,
    )
    _draw_spots(axes, spots)
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns)
    axes.tick_params(axis="x", length=0)
    _slant_labels(axes)
    step = max(1, math.ceil(len(layers) / 16))
    axes.set_yticks([i + 0.5 for i in range(0, len(layers), step)], layers[::step])
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("layer")
    axes.set_title(title, loc="left")
    axes.spines[:].set_visible(False)
    _share_scale(figure, mesh, limits)
    return figure


def _cells(names: Iterable[str]) -> tuple[list[int], list[str], dict[str, tuple[int, int]]]:
    """Layers (rows), column labels, and (row, column) of every component that lies in a layer."""
    places = {name: split_layer(name) for name in names}
    places = {name: place for name, place in places.items() if place[0] is not None}
    layers = sorted({layer for layer, _ in places.values()})
    columns = _columns(places)
    row_of = {layer: index for index, layer in enumerate(layers)}
    column_of = {path: index for index, path in enumerate(columns)}
    cells = {name: (row_of[layer], column_of[path]) for name, (layer, path) in places.items()}
    return layers, list(columns.values()), cells


def _masked_grid(values: Mapping[tuple[int, int], float], shape: tuple[int, int]) -> MaskedArray:
    """`values` by (row, column); what has none is masked."""
    import numpy as np

    grid = np.full(shape, np.nan)
    for place, value in values.items():
        grid[place] = value
    return np.ma.masked_invalid(grid)


def _draw_spots(axes: Axes, spots: Mapping[str, list[tuple[float, float]]]) -> None:
    for kind, points in spots.items():
        if points:
            xs, ys = zip(*points, strict=True)
            if kind == "molora":
                axes.scatter(xs, ys, marker="o", s=26, facecolors="white", edgecolors="black")
            else:  # white on a darker rim: seen on bright and on dark cells
                for colour, width in (("black", 2.6), ("white", 1.2)):
                    axes.scatter(
                        xs, ys, marker="s", s=24, facecolors="none", edgecolors=colour, lw=width
                    )


def _share_scale(figure: Figure, mesh: Any, limits: tuple[float, float]) -> None:
    low, high = (math.log10(limit) for limit in limits)
    ticks = [10 ** (low + (high - low) * i / 3) for i in range(4)]
    bar = figure.colorbar(mesh, pad=0.02, aspect=34)
    bar.set_ticks(ticks, labels=[f"{100 * tick:.2g} %" for tick in ticks])
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=MUTED)


@themed
def overlap_matrix(names: Sequence[str], values: Mapping[tuple[str, str], float]) -> Figure:
    """Jaccard indices between abilities, written into the cells of a square matrix."""
    import numpy as np
    from matplotlib import colormaps

    grid = np.array([[values[row, column] for column in names] for row in names])
    size = len(names)
    figure, axes = new_figure(_PANEL_WIDTH, max(2.4, 0.55 * size + 1.2))
    colours = colormaps["viridis"]
    axes.pcolormesh(grid, cmap=colours, vmin=0.0, vmax=1.0, edgecolors=PAPER, linewidth=2)
    for row in range(size):
        for column in range(size):
            red, green, blue, _ = colours(grid[row, column])
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{grid[row, column]:.2f}",
                ha="center",
                va="center",
                color="white" if dark else "black",
            )
    centres = [i + 0.5 for i in range(size)]
    axes.set_xticks(centres, names)
    axes.set_yticks(centres, names)
    _slant_labels(axes)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return figure


@themed
def stage_curves(
    series: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], *, label: str
) -> Figure:
    """Quantities over the steps of all stages, laid end to end; thin raw, thick moving mean.

    Args:
        series: name -> stage -> (step, value); "tool" and "general" have colours of their own, and
            with several series there is a legend.
        label: of the vertical axis.
    """
    figure, axes = new_figure(_PANEL_WIDTH, _CURVE_HEIGHT)
    colours = {"tool": TOOL, "general": GENERAL}
    ends: dict[str, float] = {}
    for stages in series.values():
        for stage, points in stages.items():
            ends[stage] = max(ends.get(stage, 0.0), points[-1][0])
    starts = dict(zip(ends, accumulate(ends.values(), initial=0.0), strict=False))
    for name, stages in series.items():
        colour, legend = colours.get(name, ACCENT), f"{name} tokens" if len(series) > 1 else None
        for stage, points in stages.items():
            steps = [starts[stage] + step for step, _ in points]
            values = [value for _, value in points]
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.9)
            marker = "o" if len(values) < 3 else None
            axes.plot(steps, _moving_mean(values), color=colour, marker=marker, label=legend)
            legend = None
    _stage_names(axes, starts, ends)
    axes.grid(axis="y")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(label)
    axes.margins(x=0.01)
    if len(series) > 1:
        axes.legend(loc="best")
    return figure


def _stage_names(axes: Axes, starts: Mapping[str, float], ends: Mapping[str, float]) -> None:
    """A dashed line where a stage begins, its name above its part of the axis."""
    for stage, start in starts.items():
        if start:
            axes.axvline(start, color=LINE, linewidth=1, linestyle=(0, (4, 3)))
        axes.text(
            start + ends[stage] / 2,
            1.01,
            stage,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            color=MUTED,
        )


def _moving_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a twentieth of the series; the window shrinks at the ends."""
    reach = len(values) // 40
    means = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        means.append(sum(window) / len(window))
    return means


@themed
def gate_histogram(bins: Sequence[float], counts: Mapping[str, Sequence[int]]) -> Figure:
    """Share of tokens by the value of the backbone gate G[0], tool against general."""
    figure, axes = new_figure(_PANEL_WIDTH, _CURVE_HEIGHT)
    for kind, colour in (("tool", TOOL), ("general", GENERAL)):
        total = sum(counts[kind])
        if not total:
            continue
        shares = [count / total for count in counts[kind]]
        axes.stairs(shares, bins, fill=True, color=colour, alpha=0.35)
        axes.stairs(shares, bins, color=colour, linewidth=1.4, label=f"{kind} tokens")
    axes.set_xlim(0, 1)
    axes.set_xlabel("backbone gate G[0]")
    axes.set_ylabel("share of tokens")
    axes.grid(axis="y")
    _legend_above(axes)
    return figure


@themed
def gate_by_layer(layers: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Mean backbone gate of every MOLoRA layer, in model order, tool against general."""
    figure, axes = new_figure(_PANEL_WIDTH, _CURVE_HEIGHT)
    for kind, colour, marker in (("tool", TOOL, "o"), ("general", GENERAL, "s")):
        pairs = [(i, means[kind][0]) for i, means in enumerate(layers.values()) if kind in means]
        if pairs:
            xs, ys = zip(*pairs, strict=True)
            label = f"{kind} tokens"
            axes.plot(xs, ys, color=colour, marker=marker, ms=3.5, lw=1, label=label)
    step = max(1, math.ceil(len(layers) / 8))
    axes.set_xticks(range(0, len(layers), step), [_short(name) for name in list(layers)[::step]])
    _slant_labels(axes)
    axes.set_ylim(0, 1)
    axes.set_ylabel("mean backbone gate")
    axes.grid(axis="y")
    _legend_above(axes)
    return figure


def _slant_labels(axes: Axes) -> None:
    for label in axes.get_xticklabels():
        label.set(rotation=30, ha="right", va="top", rotation_mode="anchor")


def _short(name: str) -> str:
    layer, path = split_layer(name)
    return path if layer is None else f"{layer} {path.rsplit('.', 1)[-1]}"


def _legend_above(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


@themed
def trade_off(points: Mapping[str, tuple[float, float]]) -> Figure:
    """General forgetting (x: mean change of the answer NLL) against exact tool calls (y, percent).

    Args:
        points: result name -> (NLL change against base, exact tool calls as a share of 1).
    """
    figure, axes = new_figure(_PANEL_WIDTH, 3.1)
    for name, (change, exact) in points.items():
        colour = {"base": MUTED, "tuned": TOOL}.get(name, GENERAL)
        axes.scatter([change], [100 * exact], s=60, color=colour, edgecolors=PAPER, zorder=3)
        below = name == "base"
        axes.annotate(
            title_of(name),
            (change, 100 * exact),
            xytext=(0, -8 if below else 8),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
        )
    axes.axvline(0, color=INK, linewidth=0.8, alpha=0.4)
    # Wide enough that differences within the noise do not look like a trade-off.
    changes = [0.0, *(change for change, _ in points.values())]
    room = max(0.2 * (max(changes) - min(changes)), 0.02)
    axes.set_xlim(min(changes) - room, max(changes) + room)
    top = max(10.0, *(100 * exact for _, exact in points.values()))
    axes.set_ylim(-0.12 * top, 1.15 * top)
    axes.grid()
    axes.set_xlabel("change of the general answer NLL (right = forgets)")
    axes.set_ylabel("exact tool calls, %")
    return figure
