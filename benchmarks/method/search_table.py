"""The searches for learning rates as lines of a table: what was tried, and whether far enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.method.rate_search import best_candidate, searched_row
from benchmarks.method.row_config import load_row
from benchmarks.method.summary import RowSummary

HEADER = ["search of", "taken by", "answer NLL on validation data, by rates", "best at the edge of"]


def search_cells(rows: Mapping[str, RowSummary]) -> list[list[str]]:
    """A line for each search that the rows' results hold, under `HEADER`.

    The best candidate is bold. Rates are in the order of `row_config.RATES`. The last cell names
    the rates whose best value is the smallest or largest that was tried: beyond it may be a better.
    """
    searches: dict[str, list[dict]] = {}
    takers: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row.first.search:
            owner = searched_row(load_row(name)).title
            searches.setdefault(owner, row.first.search)
            takers.setdefault(owner, []).append(load_row(name).title)
    return [
        [owner, ", ".join(takers[owner]), _candidates(tried), ", ".join(_at_edge(tried)) or "no"]
        for owner, tried in searches.items()
    ]


def _candidates(tried: Sequence[dict]) -> str:
    best, cells = best_candidate(tried), []
    for each in tried:
        rates = " / ".join(f"{value:g}" for value in each["rates"].values())
        cell = f"{rates}: " + ("diverged" if each["diverged"] else f"{each['validation_nll']:.3f}")
        cells.append(f"**{cell}**" if each is best else cell)
    return "; ".join(cells)


def _at_edge(tried: Sequence[dict]) -> list[str]:
    names = []
    for key, value in best_candidate(tried)["rates"].items():
        values = {each["rates"][key] for each in tried}
        if len(values) > 1 and value in (min(values), max(values)):
            names.append(key)
    return names
