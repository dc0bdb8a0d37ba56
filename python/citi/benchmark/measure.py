"""Timing: all rows of a group in turn, round by round, and ratios within a round.

Shared machines drift by a third; neighbours in time drift together. A ratio is the median over the
rounds of (time of the row / time of the baseline in the same round).

On a GPU the rows of a layer are launched while the GPU still waits, so that what is timed is the
GPU's work, back to back, as in a training loop that is ahead of its GPU; whole models are timed
with what Python costs them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from citi.benchmark.group import NOT_ASKED, Group, Pass, Result, Row, Settings
from citi_kernels.tensor_memory import TensorMemory

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("forward", "backward", "both")
MIN_ROUNDS, MAX_ROUNDS = 3, 200
# for which a GPU is kept waiting, longer than Python takes to launch any row; at up to 2 GHz
_QUEUED_CYCLES = 12_000_000
# more than the last cache of any machine of today holds
_FLUSHED_BYTES = {"cpu": 2**26, "cuda": 2**28}

Times = dict[str, float]
Round = dict[str, Times]


class _Rounds(NamedTuple):
    """`last` is the last round before the others, with the rows that these leave out."""

    last: Round
    others: list[Round]

    def of(self, name: str) -> list[Round]:
        return self.others if name in self.others[0] else [self.last]


def measure(
    group: Group, settings: Settings, note: Callable[[str], None] = lambda text: None
) -> Result:
    """Check, then time the rows of `group`.

    Args:
        note: told what has been done, so that a run that is cut off says where it was.
    Raises:
        AssertionError: a row of ours is wrong; nothing was timed.
    """
    note("checking")
    accuracy_used = group.check()
    gc.collect()
    note("checked; making the rows")
    passes = group.make()
    passes = {n: each for n, each in passes.items() if settings.wants(n, group.baseline)}
    memory = {}
    for name, each in passes.items():
        note(f"first calls of {name}")
        memory[name] = _memory(each, settings.device)
    note("timing")
    rounds = _rounds(passes, group, settings)
    note(f"timed, {len(rounds.others)} rounds")
    rows = tuple(_row(group, name, rounds, memory[name]) for name in passes)
    del passes
    gc.collect()
    return Result(
        suite=group.suite,
        settings=dict(group.settings),
        title=group.title,
        baseline=group.baseline,
        tokens=group.tokens,
        flops=group.flops,
        bytes=group.bytes,
        rounds=len(rounds.others),
        accuracy_used=accuracy_used,
        rows=rows,
        skipped=dict(group.skipped)
        | {n: NOT_ASKED for n in group.stands_for if not settings.wants(n, group.baseline)},
    )


def _row(group: Group, name: str, rounds: _Rounds, memory: tuple[int, int]) -> Row:
    timed = rounds.of(name)
    return Row(
        name=name,
        stands_for=group.stands_for[name],
        seconds={part: _median(timed, lambda each, p=part: each[name][p]) for part in PARTS},
        ratio=_ratios(timed, name, group.baseline),
        saved_bytes=memory[0],
        peak_bytes=memory[1],
        limit=group.limits.get(name),
        rounds=None if timed is rounds.others else 1,
    )


def empty_caches(device: str) -> None:
    """Push out of the caches of this device what earlier passes left there."""
    _flushed(device).zero_()


def make_cold(device: str) -> None:
    """Before a pass: empty caches, and a GPU that waits until the pass has been launched."""
    empty_caches(device)
    if device == "cuda":
        torch.cuda._sleep(_QUEUED_CYCLES)


def timed(each: Pass, settings: Settings, *, is_cold: bool) -> Times:
    """Seconds of one forward, its backward (0 without one), and both."""
    if is_cold:
        make_cold(settings.device)
    if settings.device == "cuda":
        return _timed_on_gpu(each)
    clock = CLOCKS[settings.clock]
    start = clock()
    made = each.forward()
    middle = end = clock()
    if each.backward is not None:
        each.backward(made)
        end = clock()
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def _timed_on_gpu(each: Pass) -> Times:
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    made = each.forward()
    middle.record()
    if each.backward is None:
        middle.synchronize()
        seconds = start.elapsed_time(middle) / 1e3
        return {"forward": seconds, "backward": 0.0, "both": seconds}
    each.backward(made)
    end.record()
    end.synchronize()
    return {
        "forward": start.elapsed_time(middle) / 1e3,
        "backward": middle.elapsed_time(end) / 1e3,
        "both": start.elapsed_time(end) / 1e3,
    }


def _rounds(passes: dict[str, Pass], group: Group, settings: Settings) -> _Rounds:
    """One or two rounds to warm up, and the others without the rows that are too slow."""

    def one_round() -> tuple[float, Round]:
        start = time.perf_counter()
        done = {name: timed(each, settings, is_cold=group.is_cold) for name, each in kept.items()}
        return time.perf_counter() - start, done

    kept = passes
    warm_up, last = one_round()
    too_slow = {name for name, each in last.items() if each["both"] > settings.patience}
    too_slow.discard(group.baseline)
    if too_slow:
        warm_up -= sum(last[name]["both"] for name in too_slow)
        kept = {name: each for name, each in passes.items() if name not in too_slow}
    if warm_up < settings.seconds:
        warm_up, _ = one_round()
    wanted = int(settings.seconds / warm_up) if warm_up > 0 else MAX_ROUNDS
    count = min(MAX_ROUNDS, max(MIN_ROUNDS, wanted))
    return _Rounds(last, [one_round()[1] for _ in range(count)])


def _median(rounds: list[Round], of: Callable[[Round], float]) -> float:
    return statistics.median(map(of, rounds))


def _ratios(rounds: list[Round], name: str, baseline: str) -> Times:
    """Of the parts that the baseline has."""
    return {
        part: _median(rounds, lambda each, p=part: each[name][p] / each[baseline][p])
        for part in PARTS
        if all(each[baseline][part] > 0 for each in rounds)
    }


def _memory(each: Pass, device: str) -> tuple[int, int]:
    """Bytes saved for the backward, without parameters; most bytes alive over those before."""
    if each.backward is None:
        saved = 0
    else:
        saved, made = _saved_bytes(each.forward)
        each.backward(made)
        del made

    def run() -> None:
        made = each.forward()
        if each.backward is not None:
            each.backward(made)

    return saved, _peak_bytes(run, device)


def _peak_bytes(run: Callable[[], None], device: str) -> int:
    if device == "cuda":
        # the allocator's own count, which takes no profiler
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with _quiet_profiler(), TensorMemory(device) as memory:
        run()
    return memory.peak


def _saved_bytes(forward: Callable[[], object]) -> tuple[int, object]:
    """Of distinct storages; leaves that require a gradient, and views of them, are parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not isinstance(base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made = forward()
    return sum(storages.values()), made


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """PyTorch's profiler writes two lines to the process's stderr, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@cache
def _flushed(device: str) -> Tensor:
    return torch.empty(_FLUSHED_BYTES[device], dtype=torch.int8, device=device)
