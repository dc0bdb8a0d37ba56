"""Ctrl-C: whenever it comes, the run can go on, and the last line says how."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from run_cases import adapter_tensors, assert_same_tensors, tiny_recipe, without_figures
from test_run_resume import KillAt

from citi.run import train
from citi.run_directory import RunDirectory

MOMENTS = [
    ("env", "start"),
    ("importance", "start"),
    ("plan", "end"),
    ("rp", 1),
    ("mi", 2),
    ("adapter", "start"),
]


SHORT = {"batch_size": 6, "epochs_mi": 1.0}


class PressAt(KillAt):
    """Presses Ctrl-C at a moment of the run, and keeps what the run says."""

    def __init__(self, stage: str, step: int | str) -> None:
        super().__init__(stage, step, lambda: signal.raise_signal(signal.SIGINT))
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module", autouse=True)
def _without_figures():
    with without_figures():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("interrupt")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunDirectory:
    return train(tiny_recipe(folder, output=str(folder / "undisturbed"), **SHORT))


@pytest.mark.parametrize(("stage", "step"), MOMENTS)
def test_case_60_an_interrupted_run_says_how_to_resume_and_does(
    folder: Path, undisturbed: RunDirectory, stage: str, step: int | str
) -> None:
    recipe = tiny_recipe(folder, output=str(folder / f"{stage}-{step}"), **SHORT)
    observer = PressAt(stage, step)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, observer=observer)
    run = RunDirectory.of(recipe)
    assert observer.lines[-1].endswith(f"To resume: citi train {run.recipe_file}")
    train(run.load_recipe())
    assert_same_tensors(adapter_tensors(run.adapter), adapter_tensors(undisturbed.adapter))
    assert run.load_manifest().finished


def test_case_60_an_interrupt_before_the_first_file(folder: Path, monkeypatch) -> None:
    import citi.run_directory

    def press(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    recipe = tiny_recipe(folder, output=str(folder / "at once"), **SHORT)
    observer = PressAt("none", 0)
    monkeypatch.setattr(citi.run_directory, "digest_files", press)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, observer=observer)
    assert "To resume" in observer.lines[-1]
    assert not Path(recipe.output).exists()
