"""The progress of a scoring: kept, gone on from bitwise, and refused when it is not one's own."""

from __future__ import annotations

import errno
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_scores import samples

from citi.durable import WriteError
from citi.importance import ImportanceRecorder, progress_file
from citi.importance.ability_scores import AbilityScores
from citi.importance.progress_file import ScoringProgress, batches_done, remove_progress
from citi.importance.score_components import score_components
from citi.importance.totals import BatchCounts, ScoreTotals
from citi.saved_json import SavedFileError
from tiny import tiny_model, tiny_tokenizer

CASES = [
    ("token", "component", torch.float32),
    ("batch", "row", torch.float32),
    ("token", "head", torch.float32),
    ("parameter", "column", torch.float32),
    ("token", "element", torch.float32),
    ("parameter", "element", torch.bfloat16),
]


class Stop(BaseException):
    """Stands for Ctrl-C."""


def stop_after(number):
    """A progress callback that raises at its `number`-th call."""
    calls = iter(range(1, 1_000_000))

    def progress(done, total, note):
        if next(calls) == number:
            raise Stop

    return progress


def score(path=None, *, seen=None, **given):
    settings = {"tool": samples("tool", 4), "general": {"math": samples("math", 3)}} | given
    progress = settings.pop("progress", None)
    if seen is not None:

        def progress(done, total, note):
            seen.append((note.split(":")[0], done, total))

    return score_components(
        tiny_model(), tiny_tokenizer(), progress=progress, progress_file=path, **settings
    )


def interrupted(path, number, **given):
    with pytest.raises(Stop):
        score(path, progress=stop_after(number), **given)


def bytes_of(scores: AbilityScores, folder):
    scores.save(folder / "scores")
    return [(folder / f"scores{suffix}").read_bytes() for suffix in (".json", ".safetensors")]


@pytest.mark.parametrize(("estimator", "granularity", "element_dtype"), CASES)
@pytest.mark.parametrize("after", [1, 3, 4, 6, 7])
def test_an_interrupted_scoring_goes_on_to_the_same_bytes(
    tmp_path, estimator, granularity, element_dtype, after
):
    kind = {"estimator": estimator, "granularity": granularity, "element_dtype": element_dtype}
    undisturbed = bytes_of(score(**kind), tmp_path)
    path = tmp_path / "a ü" / "x.progress"
    interrupted(path, after, **kind)
    assert batches_done(path) == {"tool": min(after, 4), "math": max(after - 4, 0)}
    seen = []
    assert bytes_of(score(path, seen=seen, **kind), tmp_path) == undisturbed
    every = [("tool", n, 4) for n in range(1, 5)] + [("math", n, 3) for n in range(1, 4)]
    assert seen == every[after:], "no batch is scored twice, none is left out"


def test_it_may_be_interrupted_again_and_again(tmp_path):
    undisturbed = bytes_of(score(), tmp_path)
    path = tmp_path / "x.progress"
    for _ in range(7):
        interrupted(path, 1)
    assert bytes_of(score(path), tmp_path) == undisturbed


@pytest.mark.parametrize(("estimator", "granularity"), [("token", "element"), ("batch", "row")])
def test_case_60_interrupted_within_a_batch_nothing_of_it_is_kept(
    tmp_path, monkeypatch, estimator, granularity
):
    kind = {"estimator": estimator, "granularity": granularity}
    undisturbed = bytes_of(score(**kind), tmp_path)
    path, backward = tmp_path / "x.progress", ImportanceRecorder._backward
    monkeypatch.setattr(progress_file, "SECONDS_BETWEEN_SAVES", 0.0)
    calls = iter(range(1_000_000))

    def stop_in_the_third(self, scored, module, use):
        if next(calls) == 2 * len(self.scored) + 10:
            raise Stop
        return backward(self, scored, module, use)

    monkeypatch.setattr(ImportanceRecorder, "_backward", stop_in_the_third)
    with pytest.raises(Stop):
        score(path, **kind)
    monkeypatch.undo()
    assert batches_done(path) == {"tool": 2, "math": 0}
    assert bytes_of(score(path, **kind), tmp_path) == undisturbed


def test_empty_and_nonfinite_batches_stay_counted(tmp_path):
    path = tmp_path / "x.progress"
    totals = two_totals()
    totals["tool"].num_empty, totals["tool"].num_nonfinite = 2, 1
    ScoringProgress(path, {}, totals).save()
    assert batches_done(path) == {"tool": 2 + 2 + 1, "math": 0}
    again = two_totals(empty=True)
    assert ScoringProgress(path, {}, again).restore()
    assert (again["tool"].num_empty, again["tool"].num_nonfinite) == (2, 1)


def two_totals(*, empty=False):
    """Totals of two abilities over three components, the first with two batches."""
    made = {name: ScoreTotals(SHAPES, "batch", "component") for name in ("tool", "math")}
    if not empty:
        for batch in (1.0, 2.0):
            partials = torch.tensor([batch, 0.1, 1 / 3], dtype=torch.float64)
            made["tool"].add(partials, BatchCounts(1, 10, 4))
        made["tool"].ran = {shape.name for shape in SHAPES}
        made["tool"].reached = {SHAPES[0].name}
    return made


def _shapes():
    from citi.components import find_components
    from citi.importance.granularity import score_shapes

    model = tiny_model()
    return score_shapes(model, find_components(model)[0][:3], "component")


SHAPES = _shapes()


def state_of(totals):
    described, tensors = totals.state()
    return described, {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.fixture
def kept(tmp_path):
    """A progress file that is whole."""
    path = tmp_path / "the progress"
    ScoringProgress(path, {"seed": 3, "data": {"tool": "ü"}}, two_totals()).save()
    return path


def restore(path):
    return ScoringProgress(path, {"seed": 3, "data": {"tool": "ü"}}, two_totals(empty=True))


def test_what_was_kept_comes_back(kept):
    progress = restore(kept)
    assert progress.restore()
    for name, totals in two_totals().items():
        assert state_of(progress.totals[name]) == state_of(totals)
    assert not restore(kept.with_name("none")).restore()


def test_case_53_a_file_cut_short_anywhere_is_one_named_error(kept):
    whole = kept.read_bytes()
    for end in range(0, len(whole), 23):
        kept.write_bytes(whole[:end])
        with pytest.raises(SavedFileError, match="the progress"):
            restore(kept).restore()


def test_case_53_a_changed_byte_anywhere_is_one_named_error(kept):
    whole = kept.read_bytes()
    flips = random.Random(0)
    for place in range(len(whole)):
        flipped = whole[place] ^ (1 << flips.randrange(8))
        kept.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with pytest.raises(SavedFileError, match="the progress"):
            restore(kept).restore()


def test_case_53_a_file_of_something_else_is_refused(tmp_path, kept):
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(SavedFileError, match="must be a file of format citi"):
        restore(tmp_path / "weights").restore()
    (tmp_path / "text").write_text("hello")
    for read in (batches_done, lambda path: restore(path).restore()):
        with pytest.raises(SavedFileError, match="text is no safetensors file of ours"):
            read(tmp_path / "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SavedFileError, match="folder is no safetensors file of ours"):
        batches_done(tmp_path / "folder")
    assert load_file(kept)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"estimator": "batch"}, "estimator"),
        ({"granularity": "row"}, "granularity"),
        ({"element_dtype": torch.bfloat16}, "element_dtype"),
        ({"batch_size": 2}, "batch_size"),
        ({"max_length": 20}, "data"),
        ({"tool": samples("tool", 5)}, "data"),
        ({"general": {"chat": samples("math", 3)}}, "data"),
        ({"batch_size": 2, "estimator": "batch"}, "batch_size, estimator"),
    ],
)
def test_the_progress_of_another_scoring_is_refused_and_kept(tmp_path, change, named):
    path = tmp_path / "x.progress"
    interrupted(path, 2)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"x\.progress .* it differs in {named}; remove it"):
        score(path, **change)
    assert path.read_bytes() == before


def test_the_progress_of_another_model_is_refused(tmp_path):
    path = tmp_path / "x.progress"
    interrupted(path, 2)
    with pytest.raises(ValueError, match="it differs in fingerprint"):
        score_components(
            tiny_model(seed=1),
            tiny_tokenizer(),
            tool=samples("tool", 4),
            general={"math": samples("math", 3)},
            progress_file=path,
        )


def test_it_is_written_once_a_minute_and_at_the_end(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(progress_file.time, "monotonic", lambda: clock[0])
    written = []
    monkeypatch.setattr(progress_file, "write_bytes", lambda path, data: written.append(clock[0]))

    def tick(done, total, note):
        clock[0] += 20.0

    score(tmp_path / "x.progress", progress=tick, general={}, tool=samples("tool", 8))
    assert written == [1060.0, 1120.0, 1160.0]


def test_it_is_not_written_when_it_holds_the_same(tmp_path, monkeypatch):
    path = tmp_path / "x.progress"
    score(path)
    monkeypatch.setattr(progress_file, "write_bytes", lambda path, data: pytest.fail("written"))
    seen = []
    score(path, seen=seen)
    assert seen == []


def test_case_55_a_full_disk_leaves_the_earlier_progress_intact(tmp_path, monkeypatch):
    undisturbed = bytes_of(score(), tmp_path)
    path = tmp_path / "x.progress"
    interrupted(path, 2)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"x\.progress: the disk is full"):
            score(path)
    assert path.read_bytes() == before
    assert bytes_of(score(path), tmp_path) == undisturbed


def test_removing_it_takes_those_of_other_processes_too_and_nothing_else(tmp_path):
    gone = ["x.progress", "x.progress.0-of-2", "x.progress.11-of-16"]
    others = ["x.progress.bak", "y.progress", "x.json", "x.progress.0-of-2.bak", "xxprogress"]
    for name in (*gone, *others):
        (tmp_path / name).write_text("")
    remove_progress(tmp_path / "x.progress")
    assert {path.name for path in tmp_path.iterdir()} == set(others)
    remove_progress(tmp_path / "x.progress")
    remove_progress(tmp_path / "no folder" / "x.progress")
