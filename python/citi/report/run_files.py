"""Reads a run directory for the report. A part that is not there is named, never invented."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from citi.evaluation import EvalResult
from citi.gates import GateSummary

if TYPE_CHECKING:
    from citi.importance.ability_scores import AbilityScores
    from citi.plan import Plan

T = TypeVar("T", "EvalResult", "GateSummary")
GATES_FILE = "gates.json"
_WRITERS = {
    "recipe.resolved.yaml": "citi train",
    "env.json": "citi train",
    "manifest.json": "citi train",
    "metrics.jsonl": "the training stages",
    "importance.json": "the importance phase",
    "plan.json": "the plan phase",
    "eval/base.json": "citi eval",
    "eval/tuned.json": "citi eval",
    f"eval/{GATES_FILE}": "citi eval",
}


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; None or empty where a file is not there (yet).

    Attributes:
        recipe, environment, manifest: recipe.resolved.yaml, env.json, manifest.json.
        metrics: rows of metrics.jsonl.
        scores, plan: importance.{json,safetensors}, plan.json.
        results: eval/*.json by stem, base and tuned first.
        gates: eval/gates.json (see `citi.gates`).
        missing: (file, what writes it) for every file that is not there.
    """

    directory: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    manifest: dict[str, Any]
    metrics: list[dict[str, Any]]
    scores: AbilityScores | None
    plan: Plan | None
    results: dict[str, EvalResult]
    gates: GateSummary | None
    missing: tuple[tuple[str, str], ...]


def read_run(directory: str | Path) -> RunFiles:
    """Read every file of a run that the report shows.

    Raises:
        FileNotFoundError: `directory` is not there, or holds none of a run's files.
        ValueError: a file is there and broken; the message has its path.
    """
    from citi.importance.ability_scores import AbilityScores
    from citi.plan import Plan

    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"run directory: want an existing directory, got {root}")
    found = {name: root / name for name in _WRITERS if (root / name).exists()}
    results = read_results(root / "eval")
    if not found and not results:
        raise FileNotFoundError(
            f"{root} holds no file of a run; want a directory that citi train or citi demo wrote"
        )

    def read(name: str, reader: Callable[[Path], Any], absent: Any = None) -> Any:
        return reader(found[name]) if name in found else absent

    return RunFiles(
        directory=root,
        recipe=read("recipe.resolved.yaml", _read_yaml, {}),
        environment=read("env.json", _read_object, {}),
        manifest=read("manifest.json", _read_object, {}),
        metrics=read("metrics.jsonl", _read_rows, []),
        scores=read("importance.json", lambda path: AbilityScores.load(path.with_suffix(""))),
        plan=read("plan.json", Plan.load),
        results=results,
        gates=read(f"eval/{GATES_FILE}", lambda path: _read_as(GateSummary, path)),
        missing=tuple((name, writer) for name, writer in _WRITERS.items() if name not in found),
    )


def read_results(folder: str | Path) -> dict[str, EvalResult]:
    """The evaluation results in `folder` by file stem: base first, tuned second, then by name.

    Raises: ValueError for a file that is none; the message has its path.
    """
    files = sorted(path for path in Path(folder).glob("*.json") if path.name != GATES_FILE)
    first = [path for name in ("base", "tuned") for path in files if path.stem == name]
    rest = [path for path in files if path not in first]
    return {path.stem: _read_as(EvalResult, path) for path in (*first, *rest)}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; remove it and write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: want a JSON object, got {type(value).__name__}")
    return value


def _read_as(kind: type[T], path: Path) -> T:
    """`kind.from_json` of the file, with the path in the message of its errors."""
    content = _read_object(path)
    try:
        return kind.from_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: want keys and values, got {type(value).__name__}")
    return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file; a last line cut off by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return rows
