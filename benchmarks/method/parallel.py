"""Rows side by side: one process a piece of work, each piece as soon as what it needs is done.

    scores, one a seed ──→ rates, one a candidate ──→ rows, one a row and seed

A small model leaves a GPU waiting for Python, and several processes fill it. Every piece leaves its
files as it does in a run of one process, and a piece that is done is not done again. Numbers are
those of one process with as many threads: on a CPU the cores are dealt out to the processes, and
sums of fewer threads round otherwise.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.method.rate_search import searched_row, try_rates
from benchmarks.method.row_config import RowConfig, load_row
from benchmarks.method.train_row import component_scores
from citi.observer import RunObserver

if TYPE_CHECKING:
    from benchmarks.method.run import Comparison


class ParallelError(RuntimeError):
    """Pieces failed; the message names each with its reason. The others are done."""


class Piece(NamedTuple):
    """A piece of work.

    Attributes:
        kind: "scores", "rates" or "row".
        row: Name of the row whose model is trained or scored.
        number: The seed; of rates, the place of the candidate.
    """

    kind: str
    row: str
    number: int


def pieces_of(names: Sequence[str], num_seeds: int | None) -> dict[Piece, frozenset[Piece]]:
    """Every piece of a comparison with the pieces it needs, the most urgent first.

    Args:
        names: Of the rows.
        num_seeds: At most so many of each row; None: what its config says.
    """
    scores: dict[Piece, frozenset[Piece]] = {}
    rates: dict[Piece, frozenset[Piece]] = {}
    rows: dict[Piece, frozenset[Piece]] = {}
    scorer: dict[int, Piece] = {}

    def scored(row: RowConfig, seed: int) -> frozenset[Piece]:
        """The scores that a row's plan is made of; all rows of a seed share them."""
        if row.method != "citi" and row.components != "important":
            return frozenset()
        piece = scorer.setdefault(seed, Piece("scores", row.name, seed))
        scores[piece] = frozenset()
        return frozenset({piece})

    for row in map(load_row, names):
        owner = searched_row(row)
        candidates = range(len(owner.rates) if len(owner.rates) > 1 else 0)
        searched = [Piece("rates", owner.name, number) for number in candidates]
        rates |= dict.fromkeys(searched, scored(owner, 0))
        for seed in row.seed_range(num_seeds):
            rows[Piece("row", row.name, seed)] = scored(row, seed) | frozenset(searched)
    by_seed = sorted(rows, key=lambda piece: piece.number)
    return scores | rates | {piece: rows[piece] for piece in by_seed}


def run_parallel(
    comparison: Comparison,
    names: Sequence[str],
    *,
    jobs: int,
    num_seeds: int | None = None,
    observer: RunObserver | None = None,
) -> None:
    """Do all pieces, at most `jobs` at a time; results lie in the comparison's folder.

    Args:
        comparison: What the rows share.
        names: Of the rows.
        jobs: Processes, which share the GPU, or the cores.
        num_seeds: At most so many of each row.
        observer: Gets a line a piece.
    Raises:
        ParallelError: Pieces failed; whatever did not need them was done first.
    """
    observer = observer or RunObserver()
    needs = pieces_of(names, num_seeds)
    open_pieces, done, failed = list(needs), set(), {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    began = time.monotonic()
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), _prepare, (threads, comparison.is_repeatable)
    ) as pool:
        running = {}
        while open_pieces or running:
            ready = [piece for piece in open_pieces if needs[piece] <= done]
            for piece in ready[: jobs - len(running)]:
                open_pieces.remove(piece)
                running[pool.submit(_work, comparison, piece)] = piece
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                piece = running.pop(future)
                seconds, reason = future.result()
                if reason is None:
                    done.add(piece)
                else:
                    failed[piece] = reason
                total = f"{len(done)} of {len(needs)}, {time.monotonic() - began:.0f} s"
                observer.line(f"{_name(piece)}: {reason or f'{seconds:.0f} s'} ({total})")
    if failed:
        reasons = "; ".join(f"{_name(piece)}: {reason}" for piece, reason in failed.items())
        left = f"; {len(open_pieces)} more need them" if open_pieces else ""
        raise ParallelError(f"{len(failed)} of {len(needs)} failed: {reasons}{left}")


def _prepare(threads: int, is_repeatable: bool) -> None:
    """A fresh process, before its first piece."""
    import torch

    from benchmarks.method.repeatable import make_repeatable

    torch.set_num_threads(threads)
    if is_repeatable:
        make_repeatable()


def _name(piece: Piece) -> str:
    return f"{piece.kind} {piece.row} {piece.number}"


def _work(comparison: Comparison, piece: Piece) -> tuple[float, str | None]:
    """Do a piece: the seconds it took, and why it failed.

    Errors go back as text: not every exception can be sent between processes.
    """
    from benchmarks.method.run import run_row

    began, row = time.monotonic(), load_row(piece.row)
    try:
        if piece.kind == "scores":
            component_scores(comparison.assignment(row, piece.number))
        elif piece.kind == "rates":
            pattern, rates = comparison.assignment(row, 0), row.rates[piece.number]
            try_rates(row, rates, pattern, comparison.search, observer=RunObserver())
        else:
            run_row(comparison, row, piece.number)
        reason = None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        _release_memory()
    return time.monotonic() - began, reason


def _release_memory() -> None:
    """What this process's allocator keeps is missing to the others."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
