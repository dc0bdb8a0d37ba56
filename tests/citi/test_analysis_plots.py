"""Figures of the analysis hold the numbers they were given."""

from __future__ import annotations

import math

import pytest

from citi.capability_shift import Site
from citi.replacement import Replacement
from citi.report.analysis_plots import replacement_curves, shift_curves
from citi.report.drawing import svg


def lines_of(figure) -> dict[str, tuple[list[float], list[float]]]:
    lines = figure.axes[0].get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def test_the_shift_is_drawn_by_layer_for_each_ability_of_one_part() -> None:
    math_ability = {Site(0, "mlp"): None, Site(1, "mlp"): 0.5, Site(1, "attention"): -1.0}
    figure = shift_curves({"math": math_ability, "chat": {Site(1, "mlp"): -0.25}})
    lines = lines_of(figure)
    layers, values = lines["math"]
    assert layers == [0, 1]
    assert math.isnan(values[0])
    assert values[1] == 0.5
    assert lines["chat"] == ([1], [-0.25])
    assert "<svg" in svg(figure, name="shift", alt="co-directional shift")
    with pytest.raises(ValueError, match="attention"):
        shift_curves({"chat": {Site(1, "mlp"): 0.0}}, part="attention")


def test_replacement_is_drawn_by_share_and_end_between_the_whole_models() -> None:
    steps = [
        Replacement("top", 0.5, (), 0.75),
        Replacement("top", 0.25, (), 0.5),
        Replacement("bottom", 0.25, (), 0.125),
    ]
    figure = replacement_curves(steps, label="exact calls", original=0.0, tuned=1.0)
    lines = lines_of(figure)
    assert lines["top"] == ([25.0, 50.0], [0.5, 0.75])
    assert lines["bottom"] == ([25.0], [0.125])
    assert set(lines["original"][1]) == {0.0}
    assert set(lines["tuned"][1]) == {1.0}
    with pytest.raises(ValueError, match="steps"):
        replacement_curves([], label="exact calls", original=0.0, tuned=1.0)
