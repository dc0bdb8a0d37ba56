"""The result of a row with one seed: a JSON file, checked when it is read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.method.data_sets import EVALUATION
from citi.durable import write_text
from citi.saved_json import SavedFileError, read_object

FORMAT, VERSION = "citi.method_row", 2
WANTED_CALLS = "wanted_calls"
COLUMNS = {
    "tool": {"format", "name", "arguments", "exact", WANTED_CALLS, "rouge_l"},
    "general": {"nll", "tokens", "right", "passes"},
}
_FLAT_LIST = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")


@dataclass(frozen=True)
class RowResult:
    """One row, measured.

    Attributes:
        row, title, description: Of its config.
        scale: Name of its scale.
        seed: Of its training.
        settings: Config and scale, whole.
        rates: That it was trained with.
        search: Every candidate with its validation NLL.
        model: Name of the base, without its path.
        data_sha256: Of every prepared file.
        machine: As `citi.environment_record` tells it.
        steps: Optimizer steps by stage.
        num_tokens, num_answer_tokens: That it trained on.
        train_seconds, measure_seconds: Over all calls.
        samples: Set → column → one value a sample; see `measures`.
    """

    row: str
    title: str
    description: str
    scale: str
    seed: int
    settings: dict
    rates: dict
    search: list
    model: str
    data_sha256: dict
    machine: dict
    steps: dict
    num_tokens: int
    num_answer_tokens: int
    train_seconds: float
    measure_seconds: float
    samples: dict

    @property
    def file_name(self) -> str:
        return f"{self.scale}_{self.row}_seed{self.seed}.json"

    @property
    def num_steps(self) -> int:
        return sum(self.steps.values())

    def save(self, folder: Path) -> Path:
        """Write the file in one step, a column of samples on one line. Raises: WriteError."""
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        text = _FLAT_LIST.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
        path = folder / self.file_name
        write_text(path, text + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> RowResult:
        """Read a file back.

        Raises:
            SavedFileError: Missing, damaged, of another format, or with figures that cannot be;
                names the file.
        """
        types = {spec.name: _PLAIN[spec.type] for spec in dataclasses.fields(cls)}
        result = cls(**read_object(path, file_format=FORMAT, version=VERSION, types=types))
        problem = result._problem()
        if problem:
            raise SavedFileError(path, problem)
        return result

    def _problem(self) -> str | None:
        wanted = {each.name: COLUMNS[each.task] for each in EVALUATION}
        if set(self.samples) != set(wanted):
            return f"must hold samples of {sorted(wanted)}, got {sorted(self.samples)}"
        for name, columns in self.samples.items():
            if not isinstance(columns, dict) or not columns or set(columns) - wanted[name]:
                return (
                    f"must hold columns of {sorted(wanted[name])} for {name}, got {columns!r:.80}"
                )
            for column, values in columns.items():
                top = math.inf if column in ("nll", "tokens", WANTED_CALLS) else 1
                if not (isinstance(values, list) and values and _within(values, top)):
                    return f"must hold numbers from 0 to {top} as {name} {column}"
            if len(columns.get("exact", ())) != len(columns.get(WANTED_CALLS, ())):
                return f"must hold a {WANTED_CALLS} for each exact of {name}"
        return None


_PLAIN = {"str": str, "int": int, "float": float, "dict": dict, "list": list}


def _within(values: list, top: float) -> bool:
    return all(type(value) in (int, float) and 0 <= value <= top for value in values)


def load_results(folder: Path) -> list[RowResult]:
    """All results in a folder, by file name. Raises: SavedFileError."""
    return [RowResult.load(path) for path in sorted(folder.glob("*.json"))]
