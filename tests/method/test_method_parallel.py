"""Rows side by side: what waits for what, the same numbers, and failures that lose nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from method_cases import open_tiny

from benchmarks.method.parallel import ParallelError, Piece, pieces_of, run_parallel
from benchmarks.method.rate_search import candidate_file
from benchmarks.method.row_config import ROWS, load_row
from benchmarks.method.row_result import RowResult
from benchmarks.method.run import run_rows
from citi.observer import RunObserver

NAMES = ("vanilla", "lora")


class Lines(RunObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_pieces_wait_for_scores_and_for_the_rates_of_the_row_that_is_searched() -> None:
    needs = pieces_of(ROWS, None)
    order = list(needs)
    for piece, needed in needs.items():
        assert all(order.index(each) < order.index(piece) for each in needed), piece
    scores = {piece.number: piece for piece in order if piece.kind == "scores"}
    assert set(scores) == {0, 1, 2}, "CITI's seeds; all rows of a seed share its scores"
    searched = {Piece("rates", "citi", number) for number in range(len(load_row("citi").rates))}
    for name in ("citi", "without_rp"):
        assert needs[Piece("row", name, 0)] == searched | {scores[0]}
    assert needs[Piece("row", "citi", 2)] == searched | {scores[2]}
    assert needs[Piece("rates", "citi", 1)] == {scores[0]}
    assert needs[Piece("rates", "ft", 1)] == needs[Piece("row", "vanilla", 0)] == frozenset()
    rows = [piece for piece in order if piece.kind == "row"]
    assert len(rows) == sum(load_row(name).seeds for name in ROWS)
    assert [piece.number for piece in rows] == sorted(piece.number for piece in rows)


def test_fewer_seeds_and_rows_make_fewer_pieces() -> None:
    needs = pieces_of(("lora",), 1)
    num_rates = len(load_row("lora").rates)
    assert num_rates > 2
    rates = frozenset(Piece("rates", "lora", number) for number in range(num_rates))
    assert needs == dict.fromkeys(rates, frozenset()) | {Piece("row", "lora", 0): rates}


def test_side_by_side_gives_what_one_after_the_other_gives(tmp_path: Path) -> None:
    jobs, threads = 2, torch.get_num_threads()
    torch.set_num_threads(max(1, os.cpu_count() // jobs))  # as many as in each process
    try:
        rows = run_rows(open_tiny(tmp_path, tmp_path / "a"), NAMES, num_seeds=1)
    finally:
        torch.set_num_threads(threads)
    alone = {each.row: each for each in rows}
    comparison, observer = open_tiny(tmp_path, tmp_path / "b"), Lines()
    run_parallel(comparison, NAMES, jobs=jobs, num_seeds=1, observer=observer)
    for name in NAMES:
        result = RowResult.load(comparison.result_file(load_row(name), 0))
        assert result.samples == alone[name].samples
        assert (result.rates, result.search) == (alone[name].rates, alone[name].search)
    assert len(observer.lines) == len(pieces_of(NAMES, 1))


def test_a_piece_that_fails_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    comparison = open_tiny(tmp_path, tmp_path / "out")
    lora = load_row("lora")
    damaged = candidate_file(comparison.search, lora, lora.rates[0])
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    pieces = len(lora.rates) + 2
    failed = rf"1 of {pieces} failed: rates lora 0: SavedFileError.*; 1 more need them"
    with pytest.raises(ParallelError, match=failed):
        run_parallel(comparison, NAMES, jobs=2, num_seeds=1)
    assert comparison.result_file(load_row("vanilla"), 0).is_file()
    assert not comparison.result_file(lora, 0).is_file()
    assert len(list(damaged.parent.glob("*.json"))) == len(lora.rates)
