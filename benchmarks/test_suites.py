"""The rows of `citi bench` under pytest-benchmark.

    pytest benchmarks/ --suite layer --benchmark-group-by=group --benchmark-columns=median,rounds

A row's baseline is timed right before it in every round; `extra_info` has the medians of the
ratios. A group whose correctness check fails is not timed: its rows fail.
"""

from __future__ import annotations

import statistics

import pytest

from citi.benchmark.group import Group, Settings
from citi.benchmark.measure import PARTS, make_cold, timed

ROUNDS = 7


def test_row(benchmark, group: Group, row: str, settings: Settings, current) -> None:
    if row in group.skipped:
        pytest.skip(group.skipped[row])
    passes = current.passes(group)
    if row not in passes:
        pytest.skip(f"{row} does not run on {settings.device}")
    benchmark.group = f"{group.suite}, {group.title}"
    rounds: list[dict[str, float]] = []
    bases: list[dict[str, float]] = []

    def baseline() -> None:
        bases.append(timed(passes[group.baseline], settings, is_cold=group.is_cold))
        if group.is_cold:
            make_cold(settings.device)

    def one() -> None:
        rounds.append(timed(passes[row], settings, is_cold=False))

    benchmark.pedantic(one, setup=baseline, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:  # by --benchmark-disable, or by pytest-xdist: one call, to see it run
        return
    del rounds[0], bases[0]
    for part in PARTS:
        if all(base[part] > 0 for base in bases):
            ratios = [each[part] / base[part] for each, base in zip(rounds, bases, strict=True)]
            benchmark.extra_info[f"{part} over {group.baseline}"] = statistics.median(ratios)
    benchmark.extra_info |= {"stands for": group.stands_for[row], "tokens": group.tokens}
    assert len(rounds) == ROUNDS
