"""Learning rates: the lowest validation NLL wins, and evaluation files take no part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from method_cases import TINY, open_tiny

from benchmarks.method import rate_search
from benchmarks.method.rate_search import search_rates
from benchmarks.method.row_config import load_row
from benchmarks.method.train_row import Assignment
from citi.observer import RunObserver
from citi.trainer import NonFiniteLossError


@pytest.fixture
def pattern(tmp_path: Path) -> Assignment:
    comparison = open_tiny(tmp_path, tmp_path / "out")
    row = load_row("lora")
    return comparison.assignment(row, 0)


def search(pattern: Assignment, row, folder: Path):
    return search_rates(row, pattern, folder, observer=RunObserver())


def test_the_candidate_with_the_lowest_validation_nll_wins(pattern, tmp_path: Path) -> None:
    for file in pattern.data.evaluation().values():
        file.unlink()  # nothing of the search may need them
    rates, tried = search(pattern, pattern.row, tmp_path / "search")
    assert [each["rates"] for each in tried] == list(pattern.row.rates)
    assert rates == min(tried, key=lambda each: each["validation_nll"])["rates"]
    assert len({each["validation_nll"] for each in tried}) == len(tried), "they do differ"


def test_a_finished_candidate_is_not_trained_again_and_a_diverged_one_never_wins(
    pattern, tmp_path: Path, monkeypatch
) -> None:
    calls = []

    def scripted(candidate, *, observer):
        calls.append(candidate)
        assert (candidate.seed, candidate.steps) == (0, TINY.search_steps)
        if len(calls) == 1:
            raise NonFiniteLossError("spoiled")
        return type("Trained", (), {"model": None, "tokenizer": None})

    monkeypatch.setattr(rate_search, "train_row", scripted)
    monkeypatch.setattr(
        rate_search, "validation_nll", lambda measuring, files: 3.0 - len(calls) / 10
    )
    rates, tried = search(pattern, load_row("citi"), tmp_path / "search")
    assert rates == dict(load_row("citi").rates[-1])
    assert tried[0]["diverged"]
    again = search(pattern, load_row("without_rp"), tmp_path / "search")
    assert again == (rates, tried)
    assert len(calls) == len(load_row("citi").rates), "the ablations of CITI take CITI's search"
    file = next((tmp_path / "search" / "citi").glob("*.json"))
    assert json.loads(file.read_text())["format"] == rate_search.FORMAT


def test_validation_is_of_what_the_row_trains_on(pattern, tmp_path: Path, monkeypatch) -> None:
    seen = []
    trained = type("Trained", (), {"model": None, "tokenizer": None})
    monkeypatch.setattr(rate_search, "train_row", lambda candidate, observer: trained)

    def remember(measuring, files):
        seen.append(set(files))
        return 1.0

    monkeypatch.setattr(rate_search, "validation_nll", remember)
    general = {"math", "knowledge", "code", "instruct"}
    files_of = {"ft": {"api_bank"}, "dm": general, "citi": {"api_bank"} | general}
    for name, files in files_of.items():
        seen.clear()
        search(pattern, load_row(name), tmp_path / name)
        assert seen == [files] * len(load_row(name).rates)
