"""What `citi importance` prints: rankings, overlap, whether the samples are enough, what is out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from citi.components import SkippedModule
    from citi.importance import ComponentScores
    from citi.importance.ability_scores import AbilityScores

_SHOWN_COMPONENTS = 10
_SHOWN_NAMES = 3


def print_summary(console: Console, scores: AbilityScores) -> None:
    """The whole of it.

    Raises: ValueError as `AbilityScores.tool_importance`, if all scores of an ability are 0.
    """
    for name, ability in scores.abilities.items():
        _line(
            console,
            f"{name}: {ability.num_samples} samples, {ability.num_tokens} tokens, "
            f"{ability.num_answer_tokens} of them answers",
        )
    _print_ranking(console, "Tool importance M_h", scores.tool_importance)
    if scores.general:
        number = len(scores.general)
        shares = {name: c / number for name, c in scores.general_importance.items()}
        title = "General importance C_h" + (f", mean of {number} abilities" if number > 1 else "")
        _print_ranking(console, title, shares)
    _print_overlap(console, scores.abilities)
    _print_stability(console, scores.abilities)
    _print_skipped(console, scores)


def _print_ranking(console: Console, title: str, shares: Mapping[str, float]) -> None:
    """The highest and the lowest components, ties by name as in a plan."""
    order = sorted(shares, key=lambda name: (shares[name], name), reverse=True)
    highest, rest = order[:_SHOWN_COMPONENTS], order[_SHOWN_COMPONENTS:]
    lowest = rest[-_SHOWN_COMPONENTS:]
    table = _table("rank", "component", "share")
    for part in (highest, lowest):
        for name in part:
            rank, percent = order.index(name) + 1, f"{100 * shares[name]:.3g} %"
            table.add_row(str(rank), name, percent, end_section=name == highest[-1])
    _print_table(console, title, table)


def _print_overlap(console: Console, abilities: Mapping[str, ComponentScores]) -> None:
    from citi.analysis import THIRDS, jaccard_of_thirds

    names = list(abilities)
    if len(names) < 2 or len(abilities["tool"]) < len(THIRDS):
        return
    overlap = jaccard_of_thirds(abilities)
    title = "Do abilities share components? (Jaccard index of the thirds of their rankings)"
    table = _table("abilities", *THIRDS)
    pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
    for pair in pairs:
        values = [f"{getattr(overlap, third)[pair]:.2f}" for third in THIRDS]
        table.add_row(" and ".join(pair), *values, end_section=pair == pairs[-1])
    table.add_row("chance", *(f"{overlap.random[third]:.2f}" for third in THIRDS))
    _print_table(console, title, table)


def _print_stability(console: Console, abilities: Mapping[str, ComponentScores]) -> None:
    from citi.importance.stability import ranking_stability, stability_obstacle

    obstacles = {name: stability_obstacle(scores) for name, scores in abilities.items()}
    found = {
        name: ranking_stability(scores)
        for name, scores in abilities.items()
        if obstacles[name] is None
    }
    if found:
        units = {stability.unit for stability in found.values()}
        unit = units.pop() if len(units) == 1 else "batches"
        title = "How well two scorings agree on the most important components"
        table = _table("ability", unit, "agreement", "5 % quantile", "chance")
        for name, stability in found.items():
            for each in stability.agreements:
                numbers = (each.mean, each.low, stability.chance)
                is_last = each is stability.agreements[-1]
                row = [name, str(each.num_batches), *(f"{number:.2f}" for number in numbers)]
                table.add_row(*row, end_section=is_last)
        _print_table(console, title, table)
    console.print()
    for name, obstacle in obstacles.items():
        if obstacle is None:
            _line(console, f"{name}: {found[name].sentence}.")
        else:
            _line(console, f"{name}: whether the samples are enough is not known; {obstacle}.")


def _print_skipped(console: Console, scores: AbilityScores) -> None:
    for name, ability in scores.abilities.items():
        seen = ability.num_batches + ability.num_skipped_batches
        counts = {
            "no answer tokens": ability.num_empty_batches,
            "a NaN or infinite loss or score": ability.num_nonfinite_batches,
        }
        for reason, number in counts.items():
            if number:
                _line(console, f"{name}: {number} of {seen} batches skipped: {reason}")
        unused = [module for module in ability.skipped if module.name in ability]
        for reason, listed in _by_reason(unused):
            _line(console, f"{name}: {listed}: {reason}")
    others = [module for module in scores.tool.skipped if module.name not in scores.tool]
    for reason, listed in _by_reason(others):
        _line(console, f"not scored: {listed}: {reason}")


def _by_reason(modules: Iterable[SkippedModule]) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        names[module.reason].append(module.name)
    return [(reason, _listed(found)) for reason, found in names.items()]


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _table(*columns: str) -> Table:
    """Names to the left, numbers to the right."""
    table = Table(pad_edge=False, box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        is_name = column in ("component", "abilities", "ability")
        table.add_column(column, justify="left" if is_name else "right", overflow="fold")
    return table


def _print_table(console: Console, title: str, table: Table) -> None:
    console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    console.print(table)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
