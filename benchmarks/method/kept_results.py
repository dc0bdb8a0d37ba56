"""Results of earlier machines: a finished row is not run again, nor is a candidate of a search.

A row takes minutes to hours, and machines come and go; result files under version control stay,
and beside them the candidates of every search, so that further seeds, and rows that take the same
rates, go on anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.method.row_config import load_row
from benchmarks.method.row_result import RowResult


def difference(result: RowResult, shared: Mapping[str, object]) -> str | None:
    """What keeps a result from standing beside those of a comparison; None: nothing.

    Args:
        shared: What the comparison's rows share, as its comparison.json has it.
    """
    training = load_row(result.row).training
    row = result.settings.get("row", {})
    pairs = {
        "scale": (result.settings.get("scale"), shared["scale"]),
        "dtype": (result.settings.get("dtype"), shared["dtype"]),
        "model": (result.model, shared["model"]),
        "data_sha256": (result.data_sha256, shared["sha256"]),
        "row config": ({key: row.get(key) for key in training}, training),
    }
    return next((key for key, (kept, wanted) in pairs.items() if kept != wanted), None)
