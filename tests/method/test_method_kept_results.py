"""Results of an earlier machine: rows and searches are taken, other settings are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from method_cases import TINY, first_rates, open_tiny, without_search

from benchmarks.method import rate_search, run
from benchmarks.method.rate_search import search_rates, try_rates, write_candidate
from benchmarks.method.row_config import load_row
from benchmarks.method.row_result import RowResult
from benchmarks.method.run import ComparisonError, run_row
from citi.observer import RunObserver
from citi.saved_json import SavedFileError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def lora(folder) -> RowResult:
    """LoRA's row, trained with its first rates, with a search as if all had been tried."""
    with without_search():
        result = run_row(open_tiny(folder, folder / "first"), first_rates("lora"), 0)
    rates = load_row("lora").rates
    found = [
        {"rates": each, "validation_nll": 3.0 - place / 10, "diverged": place == len(rates) - 1}
        for place, each in enumerate(rates)
    ]
    return dataclasses.replace(result, search=found)


@pytest.fixture
def kept(lora, tmp_path: Path) -> Path:
    """A folder of results as a run leaves it, with the candidates of the search."""
    lora.save(tmp_path / "kept")
    for found in lora.search:
        write_candidate(tmp_path / "kept" / "search" / TINY.name, load_row("lora"), found)
    return tmp_path / "kept"


def refuse_to_train(monkeypatch) -> None:
    def train(*args, **kwargs):
        raise AssertionError("trained")

    for module in (run, rate_search):
        monkeypatch.setattr(module, "train_row", train)


def test_a_kept_row_is_not_run_again_and_another_seed_takes_its_search(
    folder, lora, kept: Path, tmp_path: Path, monkeypatch
) -> None:
    comparison = open_tiny(folder, tmp_path / "new", results=kept)
    refuse_to_train(monkeypatch)
    assert run_row(comparison, load_row("lora"), 0) == lora
    pattern = comparison.assignment(load_row("lora"), 1)
    rates, tried = search_rates(
        load_row("lora"), pattern, comparison.search, observer=RunObserver()
    )
    assert rates == load_row("lora").rates[-2], "the lowest NLL of those that did not diverge"
    assert [{**each, "rates": dict(each["rates"])} for each in tried] == lora.search
    with pytest.raises(AssertionError, match="trained"):
        run_row(comparison, load_row("lora"), 1)


def test_a_new_row_is_kept_beside_the_others(folder, lora, kept: Path, tmp_path: Path) -> None:
    result = run_row(open_tiny(folder, tmp_path / "new", results=kept), load_row("vanilla"), 0)
    assert {path.name for path in kept.glob("*.json")} == {lora.file_name, result.file_name}
    assert not (tmp_path / "new" / "results").exists()


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("scale", {"settings": {"scale": dataclasses.asdict(TINY) | {"steps": 8}}}),
        ("dtype", {"settings": {"scale": dataclasses.asdict(TINY), "dtype": "bfloat16"}}),
        ("dtype", {"settings": {"scale": dataclasses.asdict(TINY)}}),
        ("model", {"model": "another"}),
        ("data_sha256", {"data_sha256": {"train/api_bank": "0"}}),
        ("row config", {"row": "lora_dm"}),
    ],
)
def test_results_of_another_comparison_are_refused_by_name(
    folder, lora, tmp_path: Path, what: str, change: dict
) -> None:
    changed = dataclasses.replace(lora, **change)
    changed.save(tmp_path / "kept")
    with pytest.raises(ComparisonError, match=f"{changed.file_name} has another {what}"):
        open_tiny(folder, tmp_path / "new", results=tmp_path / "kept")
    assert not (tmp_path / "new" / "comparison.json").exists()


def test_candidates_lie_beside_the_results_and_are_not_tried_again(
    folder, tmp_path: Path, monkeypatch
) -> None:
    first = open_tiny(folder, tmp_path / "first", results=tmp_path / "kept")
    lora = load_row("lora")
    found = {"rates": lora.rates[0], "validation_nll": 1.5, "diverged": False}
    write_candidate(first.search, lora, found)
    second = open_tiny(folder, tmp_path / "second", results=tmp_path / "kept")
    refuse_to_train(monkeypatch)
    pattern = second.assignment(lora, 0)
    tried = try_rates(lora, lora.rates[0], pattern, second.search, observer=RunObserver())
    assert tried == found | {"rates": dict(lora.rates[0])}
    other = dataclasses.replace(lora, data="mix")
    with pytest.raises(SavedFileError, match=r"learning\S+json is of .*'data': 'tool'"):
        try_rates(other, lora.rates[0], pattern, second.search, observer=RunObserver())
    record = second.search / "comparison.json"
    record.write_text(record.read_text().replace('"float32"', '"bfloat16"'))
    with pytest.raises(ComparisonError, match="begun with dtype bfloat16, got float32"):
        open_tiny(folder, tmp_path / "third", results=tmp_path / "kept")
    assert not (tmp_path / "third" / "comparison.json").exists()


def test_a_damaged_result_is_named(folder, kept: Path, tmp_path: Path) -> None:
    (file,) = kept.glob("*.json")
    file.write_text(file.read_text()[:100])
    with pytest.raises(SavedFileError, match=file.name):
        open_tiny(folder, tmp_path / "new", results=kept)
