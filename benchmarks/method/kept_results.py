"""Results of earlier machines: a finished row is not run again, nor is its search for rates.

A row takes minutes to hours, and machines come and go; result files under version control stay.
They hold every candidate of a row's search, so that further seeds, and rows that take the same
rates, go on anywhere; beside them lie the candidates of searches whose rows are not done yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from benchmarks.method.rate_search import candidate_file, write_candidate
from benchmarks.method.row_config import RowConfig, load_row
from benchmarks.method.row_result import RowResult

_DOES_NOT_TRAIN = ("title", "description", "rates", "seeds")


def difference(result: RowResult, shared: Mapping[str, object]) -> str | None:
    """What keeps a result from standing beside those of a comparison; None: nothing.

    Args:
        shared: What the comparison's rows share, as its comparison.json has it.
    """
    pairs = {
        "scale": (result.settings.get("scale"), shared["scale"]),
        "dtype": (result.settings.get("dtype"), shared["dtype"]),
        "model": (result.model, shared["model"]),
        "data_sha256": (result.data_sha256, shared["sha256"]),
    }
    return next((key for key, (kept, wanted) in pairs.items() if kept != wanted), None)


def restore_search(result: RowResult, folder: Path) -> None:
    """The candidates of a result's search as `search_rates` would have left them in `folder`.

    Left out: what the row's config no longer tries, or tried by another training; and the search
    of another row, which that row's own result holds. Files that lie there stay.
    """
    row = load_row(result.row)
    if row.rates_of or _training(result.settings["row"]) != _training(dataclasses.asdict(row)):
        return
    for found in result.search:
        if found["rates"] in row.rates and not candidate_file(folder, row, found["rates"]).exists():
            write_candidate(folder, row, found)


def _training(config: dict) -> dict:
    fields = {spec.name for spec in dataclasses.fields(RowConfig)} - set(_DOES_NOT_TRAIN)
    return {name: config.get(name) for name in fields}
