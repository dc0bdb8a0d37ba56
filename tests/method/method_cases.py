"""What these tests share: tiny sources in the real layout, a tiny scale and a tiny model."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.method import rate_search, run
from benchmarks.method.data_sets import EVALUATION, TRAINING
from benchmarks.method.row_config import RowConfig, load_row
from benchmarks.method.run import Comparison, open_comparison
from benchmarks.method.scale import Scale
from tiny import tiny_model, tiny_tokenizer

TINY = Scale(
    name="tiny",
    tool_samples=None,
    general_samples=6,
    validation_samples=2,
    eval_samples=2,
    judged_samples=1,
    importance_samples=2,
    steps=4,
    search_steps=4,
    batch_tokens=96,
    accumulation=2,
    max_length=96,
    eval_max_length=160,
    max_new_tokens=3,
    eval_batch_size=4,
    save_steps=1,
    r=2,
    lora_alpha=4.0,
    dtype="fp32",
)
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Paris", "Tunis", "Accra", "Bern")


def tool_row(tool: str, city: str) -> dict:
    """A sample that offers one tool and calls it."""
    call = {"name": tool, "arguments": {"city": city}}
    return {
        "task": "tool",
        "messages": [
            {"role": "user", "content": f"{tool} {city}?"},
            {"role": "assistant", "content": f"API-Request: [{tool}(city='{city}')]"},
        ],
        "tools": [{"name": tool}],
        "meta": {"gold_calls": [call]},
    }


def plain_row(task: str, question: str, reference: str, **meta) -> dict:
    """A sample without tools."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": reference}]
    return {"task": task, "messages": turns, "meta": meta}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_sources(folder: Path) -> Path:
    """Every file that the comparison wants, a few rows each."""
    files = {name: file for name, (_, file) in TRAINING.items()}
    rows = {"api_bank": [tool_row("Weather", city) for city in CITIES]}
    for name in files.keys() - rows.keys():
        rows[name] = [plain_row(name, f"{name} {i}?", f"So {i}.", answer=str(i)) for i in range(11)]
    for name, file in files.items():
        write_rows(folder / file, rows[name])
    for each in EVALUATION:
        if each.file is None:
            continue
        name = each.name.replace("_", " ")
        if each.task == "general":
            made = [plain_row(name, f"{name} of {c}?", f"It is {c}.", answers=[c]) for c in CITIES]
        elif each.name.startswith("responses"):
            made = [plain_row("tool", f"{name}: {c}?", f"{c} is warm.") for c in CITIES]
        else:
            tool = "Weather" if each.group == "trained" else f"Strange{each.name.title()}"
            made = [tool_row(tool, f"{each.name[-3:]} {c}") for c in CITIES]
        write_rows(folder / each.file, made[:4])
    return folder


def write_model(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def open_tiny(
    folder: Path, output: Path, scale: Scale = TINY, *, results: Path | None = None
) -> Comparison:
    """A comparison whose sources and model lie in `folder`, made the first time."""
    if not (folder / "model").is_dir():
        write_sources(folder / "source")
        write_model(folder / "model")
    model = str(folder / "model")
    return open_comparison(folder / "source", output, scale, model, results=results)


def first_rates(name: str) -> RowConfig:
    """The row with its first candidate alone, so that nothing is searched."""
    row = load_row(name)
    return dataclasses.replace(row, rates=row.rates[:1])


@contextmanager
def without_search() -> Iterator[None]:
    """It takes longer than a tiny training, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_row", first_rates)
        patch.setattr(rate_search, "load_row", first_rates)
        yield
