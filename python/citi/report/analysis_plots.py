"""Figures of the paper's analysis: co-directional shift and replacement of components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from citi.capability_shift import Site
from citi.replacement import ENDS, Replacement
from citi.report.drawing import ACCENT, GENERAL, LINE, TOOL, new_figure, themed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.8, 2.7  # inches
_DASHES = ("solid", "dashed", "dotted", "dashdot")


@themed
def shift_curves(
    cosines: Mapping[str, Mapping[Site, float | None]], *, part: str = "mlp"
) -> Figure:
    """Cosine between the tool ability's change and each general one's, over the layers.

    Args:
        cosines: general ability -> what `citi.capability_shift.shift_cosines` gives.
        part: "attention" or "mlp".
    Raises:
        ValueError: no ability has a site of this part.
    """
    curves = {
        name: sorted((s.layer, value) for s, value in sites.items() if s.part == part)
        for name, sites in cosines.items()
    }
    if not any(curves.values()):
        raise ValueError(f"cosines: wanted sites of {part!r}, got none")
    figure, axes = new_figure(_WIDTH, _HEIGHT)
    axes.axhline(0, color=LINE, linewidth=1)
    for index, (name, points) in enumerate(curves.items()):
        layers = [layer for layer, _ in points]
        values = [float("nan") if value is None else value for _, value in points]
        dashes = _DASHES[index % len(_DASHES)]
        axes.plot(layers, values, color=GENERAL, linestyle=dashes, marker=".", label=name)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"cosine with tool, {part}")
    axes.legend(loc="best")
    return figure


@themed
def replacement_curves(
    steps: Sequence[Replacement[float]], *, label: str, original: float, tuned: float
) -> Figure:
    """A figure over the share of replaced components, most and least important ones.

    Args:
        steps: What `citi.replacement.replacement_experiment` gives for a measure of one number.
        label: Of that number.
        original, tuned: The same number of the two whole models.
    Raises:
        ValueError: no steps.
    """
    if not steps:
        raise ValueError("steps: wanted at least one, got none")
    figure, axes = new_figure(_WIDTH, _HEIGHT)
    for end, colour in zip(ENDS, (TOOL, GENERAL), strict=True):
        points = sorted((step.share, step.figures) for step in steps if step.end == end)
        if points:
            shares, values = zip(*points, strict=True)
            axes.plot(
                [100 * share for share in shares], values, color=colour, marker="o", label=end
            )
    for value, name, dashes in ((original, "original", "dotted"), (tuned, "tuned", "dashed")):
        axes.axhline(value, color=ACCENT, linewidth=1, linestyle=dashes, label=name)
    axes.set_xlabel("% of components replaced")
    axes.set_ylabel(label)
    axes.legend(loc="best")
    return figure
