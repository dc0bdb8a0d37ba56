"""The search for learning rates: declared candidates, short trainings, the validation NLL.

Every candidate of a row trains `search_steps` steps with seed 0 and is measured on the validation
files of what the row trains on: the tool file, the general ones, or both. The lowest mean NLL wins,
ties by order. Evaluation files take no part.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.method.measures import Measuring, validation_nll
from benchmarks.method.row_config import RowConfig, load_row
from benchmarks.method.train_row import Assignment, train_row
from citi.durable import write_json
from citi.observer import RunObserver
from citi.saved_json import SavedFileError, read_object
from citi.trainer import NonFiniteLossError

FORMAT, VERSION = "citi.method_search", 2
_FOUND = {"rates": dict, "validation_nll": float, "diverged": bool}
_KINDS = {"tool": "tool", "general": "general", "mix": None}


def search_rates(
    row: RowConfig, assignment: Assignment, folder: Path, *, observer: RunObserver
) -> tuple[dict[str, float], list[dict]]:
    """The best candidate of a row, and all of them with their validation NLL.

    Args:
        row: Where it has `rates_of`, that row's search is made, once for all that name it.
        assignment: A pattern: its row, rates, seed, steps and folder are replaced.
        folder: Gets one file a candidate; what lies there is not trained again.
        observer: Told of progress.
    """
    owner = searched_row(row)
    if len(owner.rates) < 2:
        return (dict(owner.rates[0]) if owner.rates else {}), []
    tried = [
        try_rates(owner, rates, assignment, folder, observer=observer) for rates in owner.rates
    ]
    best = best_candidate(tried)
    if best is None:
        raise RuntimeError(f"{owner.name}: the loss was not finite with any of its rates")
    return dict(best["rates"]), tried


def best_candidate(tried: Sequence[dict]) -> dict | None:
    """The one with the lowest validation NLL, the first of equals; None where all diverged."""
    usable = [each for each in tried if not each["diverged"]]
    return min(usable, key=lambda each: each["validation_nll"], default=None)


def searched_row(row: RowConfig) -> RowConfig:
    """The row whose search gives `row` its rates."""
    return load_row(row.rates_of) if row.rates_of else row


def try_rates(
    owner: RowConfig,
    rates: Mapping[str, float],
    assignment: Assignment,
    folder: Path,
    *,
    observer: RunObserver,
) -> dict:
    """One candidate of a search, trained and measured, or read where it was before.

    Args:
        owner: The row that is searched for.
        rates: The candidate, one of `owner.rates`.
        assignment, folder, observer: As for `search_rates`.
    Raises:
        SavedFileError: Its file is damaged, or of another config of the row.
    """
    target = candidate_file(folder, owner, rates)
    work = assignment.folder.parent / f"search_{owner.name}_{target.stem}"
    if not target.is_file():
        candidate = dataclasses.replace(
            assignment,
            row=owner,
            rates=rates,
            seed=0,
            steps=assignment.scale.search_steps,
            folder=work,
        )
        observer.line(f"search for {owner.title}: {dict(rates)}")
        write_candidate(folder, owner, _try(candidate, observer))
    shutil.rmtree(work, ignore_errors=True)
    return _read_candidate(target, owner)


def candidate_file(folder: Path, owner: RowConfig, rates: Mapping[str, float]) -> Path:
    """Where a search keeps what it found of a candidate."""
    name = "_".join(f"{key.removesuffix('_rate')}{value:g}" for key, value in rates.items())
    return folder / owner.name / f"{name}.json"


def write_candidate(folder: Path, owner: RowConfig, found: Mapping[str, object]) -> None:
    """Keep what was found of a candidate: its rates, validation_nll and diverged."""
    content = {"format": FORMAT, "version": VERSION, "row": owner.training}
    content |= {key: found[key] for key in _FOUND}
    write_json(candidate_file(folder, owner, found["rates"]), content)


def _read_candidate(target: Path, owner: RowConfig) -> dict:
    types = {"row": dict} | _FOUND
    found = read_object(target, file_format=FORMAT, version=VERSION, types=types)
    trained = found.pop("row")
    if trained != owner.training:
        raise SavedFileError(target, f"is of {trained}, but rows/{owner.name}.yaml says other")
    return found


def _try(candidate: Assignment, observer: RunObserver) -> Mapping[str, object]:
    """Train and measure one candidate; rates whose loss is not finite are out."""
    found = {"rates": dict(candidate.rates)}
    try:
        trained = train_row(candidate, observer=observer)
    except NonFiniteLossError:
        return found | {"validation_nll": 0.0, "diverged": True}
    measuring = Measuring(trained.model, trained.tokenizer, candidate.scale, observer=observer)
    files = candidate.data.validation(_KINDS[candidate.row.data])
    return found | {
        "validation_nll": round(validation_nll(measuring, files), 6),
        "diverged": False,
    }
