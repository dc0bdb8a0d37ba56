"""The importance phase of a run: killed, it goes on; begun with other settings, it begins anew."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from run_cases import tiny_recipe, without_figures

from citi.importance.ability_scores import AbilityScores
from citi.importance.progress_file import batches_done
from citi.observer import RunObserver
from citi.recipe import Recipe
from citi.run import train
from citi.run_directory import RunDirectory

PLAN_ONLY = {"importance_samples": 4, "epochs_rp": 0.0, "epochs_mi": 0.0, "epochs_uco": 0.0}
BATCHES = [(name, done) for name in ("tool", "math", "chat") for done in (1, 2, 3, 4)]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class Scoring(RunObserver):
    """Writes down the batches of the importance phase; may end the work at one of them."""

    def __init__(self, kill_at: tuple[str, int] | None = None) -> None:
        self.phase, self.kill_at = "", kill_at
        self.batches: list[tuple[str, int]] = []

    def phase_started(self, phase: str, title: str) -> None:
        self.phase = phase

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        if self.phase == "importance":
            self.batches.append((note.split(":")[0], done))
            if self.batches[-1] == self.kill_at:
                raise Killed


@pytest.fixture(scope="module", autouse=True)
def _without_figures():
    with without_figures():
        yield


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return tiny_recipe(tmp_path, **PLAN_ONLY)


def killed_at(recipe: Recipe, batch: tuple[str, int]) -> RunDirectory:
    with pytest.raises(Killed):
        train(recipe, observer=Scoring(kill_at=batch))
    return RunDirectory.of(recipe)


def files_of(run: RunDirectory) -> dict[str, bytes]:
    names = ("importance.json", "importance.safetensors", "plan.json")
    return {name: (run.path / name).read_bytes() for name in names}


def undisturbed(recipe: Recipe) -> dict[str, bytes]:
    return files_of(train(dataclasses.replace(recipe, output=recipe.output + " undisturbed")))


@pytest.mark.parametrize("batch", [("tool", 1), ("math", 2), ("chat", 4)])
def test_case_46_a_killed_scoring_goes_on_to_equal_scores(
    recipe: Recipe, batch: tuple[str, int]
) -> None:
    run = killed_at(recipe, batch)
    already = BATCHES.index(batch) + 1
    assert sum(batches_done(run.importance_progress).values()) == already
    again = Scoring()
    train(recipe, observer=again)
    assert again.batches == BATCHES[already:]
    assert files_of(run) == undisturbed(recipe)
    assert not list(run.path.glob("importance.progress*"))


@pytest.mark.parametrize("change", [{"seed": 3}, {"estimator": "batch"}, {"tool": None}])
def test_other_settings_or_data_score_anew(recipe: Recipe, change: dict) -> None:
    run = killed_at(recipe, ("math", 2))
    if "tool" in change:
        path = Path(recipe.tool["tool"])
        path.write_text(re.sub("Rome", "Bern", path.read_text()))
    else:
        recipe = dataclasses.replace(recipe, **change)
    again = Scoring()
    train(recipe, observer=again)
    assert again.batches == BATCHES
    assert files_of(run) == undisturbed(recipe)


def test_the_progress_of_several_processes_is_removed_too(recipe: Recipe) -> None:
    run = RunDirectory.of(recipe)
    run.path.mkdir()
    (run.path / "importance.progress.1-of-2").write_text("of a run of two")
    train(recipe)
    assert not list(run.path.glob("importance.progress*"))


def test_given_scores_are_taken_instead_of_a_scoring(recipe: Recipe, tmp_path: Path) -> None:
    scored = train(recipe)
    scores = AbilityScores.load(scored.importance_prefix)
    observer = Scoring()
    other = dataclasses.replace(recipe, output=str(tmp_path / "other"))
    run = train(other, observer=observer, scores=scores)
    assert not observer.batches
    assert files_of(run) == files_of(scored)


def test_scores_of_another_model_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    scores = AbilityScores.load(train(recipe).importance_prefix)
    foreign = dataclasses.replace(
        scores, fingerprint=scores.fingerprint | {"weights_sha256": "0" * 64}
    )
    other = dataclasses.replace(recipe, output=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"scores: wanted scores of .* differs in weights_sha256"):
        train(other, scores=foreign)


def test_a_run_may_do_without_a_report(recipe: Recipe, monkeypatch) -> None:
    monkeypatch.setattr("citi.report.build_report", lambda path: pytest.fail("built"))
    monkeypatch.setattr(AbilityScores, "plot", lambda scores, path: pytest.fail("drawn"))
    run = train(recipe, with_report=False)
    phases = run.load_manifest().phases
    assert "report" not in phases
    assert "eval" in phases
