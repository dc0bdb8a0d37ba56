"""The heat map of importance: layers down, components or heads across, one panel per kind."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from citi.components import split_layer
from citi.durable import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Grid = tuple[list[str], list[str], list[list[float]]]

_OUTSIDE = "none"


def draw_importance(path: str | Path, panels: Mapping[str, Mapping[str, float]]) -> None:
    """Draw shares of importance into a picture file; equal shares give equal bytes.

    Args:
        path: its suffix chooses the format: .png, .svg or .pdf.
        panels: title -> component name -> share of the total.

    Raises:
        ImportError: matplotlib is missing; names the extra to install.
        ValueError: a format that matplotlib does not know.
    """
    _draw(path, {f"{kind} importance": importance_grid(shares) for kind, shares in panels.items()})


def draw_head_importance(
    path: str | Path, panels: Mapping[str, Mapping[str, Sequence[float]]]
) -> None:
    """`draw_importance`, with every head of the attention modules in a column of its own.

    Args:
        panels: title -> component name -> shares of its heads, one for a component without heads.

    Raises: as `draw_importance`.
    """
    _draw(
        path,
        {f"{kind} importance of heads": head_grid(shares) for kind, shares in panels.items()},
    )


def _draw(path: str | Path, grids: Mapping[str, Grid]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plotting needs matplotlib: pip install 'citi-kernels[report]'"
        ) from error
    num_rows = max(len(rows) for rows, _, _ in grids.values())
    figure = Figure(
        figsize=(5 * len(grids), 1.5 + 0.22 * max(num_rows, 8)), layout="constrained", dpi=120
    )
    for axes, (title, grid) in zip(
        figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True
    ):
        image = _draw_panel(axes, title, grid)
        figure.colorbar(image, ax=axes, format="%.2g %%")
    write_bytes(path, _rendered(figure, Path(path).suffix.removeprefix(".") or "png"))


def importance_grid(shares: Mapping[str, float]) -> Grid:
    """Rows (layers), columns (paths inside a layer) and percents; NaN where there is nothing.

    A column is named by the last part of its path where that is unique. Components outside any
    layer form a row of their own.
    """
    rows, paths, grid = _percents(shares)
    last = [inner.rsplit(".", 1)[-1] for inner in paths]
    columns = [
        word if last.count(word) == 1 else inner for word, inner in zip(last, paths, strict=True)
    ]
    return rows, columns, grid


def head_grid(shares: Mapping[str, Sequence[float]]) -> Grid:
    """As `importance_grid`, one column per head; the first of a projection bears its name.

    Components of modules without heads are left out, unless no module has more than one.
    """
    module_of = {name: name.rpartition(".")[0] for name in shares}
    with_heads = {module_of[name] for name, heads in shares.items() if len(heads) > 1}
    rows, paths, grid = _percents(
        {
            f"{name}.{head}": share
            for name, heads in shares.items()
            if not with_heads or module_of[name] in with_heads
            for head, share in enumerate(heads)
        }
    )
    columns = [path.split(".")[-2] if path.endswith(".0") else "" for path in paths]
    return rows, columns, grid


def _percents(shares: Mapping[str, float]) -> Grid:
    """Layers, paths inside a layer, and percents."""
    places = {name: split_layer(name) for name in shares}
    layers = list(dict.fromkeys(layer for layer, _ in places.values()))
    paths = list(dict.fromkeys(inner for _, inner in places.values()))
    grid = [[float("nan")] * len(paths) for _ in layers]
    for name, (layer, inner) in places.items():
        grid[layers.index(layer)][paths.index(inner)] = 100 * shares[name]
    return [_OUTSIDE if layer is None else str(layer) for layer in layers], paths, grid


def _draw_panel(axes: Axes, title: str, grid: Grid) -> AxesImage:
    rows, columns, percents = grid
    image = axes.imshow(percents, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_title(f"{title}, % of the total")
    named = [index for index, column in enumerate(columns) if column]
    axes.set_xticks(named, [columns[index] for index in named], rotation=45, ha="right")
    step = max(1, len(rows) // 16)
    axes.set_yticks(range(0, len(rows), step), rows[::step])
    axes.set_ylabel("layer")
    return image


def _rendered(figure: Figure, kind: str) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # A fixed salt and no date: equal scores, equal bytes.
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "citi", "text.parse_math": False}):
        figure.savefig(buffer, format=kind, metadata=metadata.get(kind))
    return buffer.getvalue()
