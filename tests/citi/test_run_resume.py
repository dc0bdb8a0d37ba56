"""Killed anywhere and started again, a run ends at the weights it would have ended at."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from run_cases import adapter_tensors, assert_same_tensors, tiny_recipe, without_figures
from transformers import TrainerState

import citi.checkpoints
import citi.durable
import citi.run
import citi.stage_training
from citi.manifest import Manifest
from citi.observer import RunObserver
from citi.recipe import Recipe
from citi.run import train
from citi.run_directory import RunDirectory

STAGE_FOLDERS = ("stage1_rp", "stage2_mi", "stage3_uco", "adapter")


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class KillAt(RunObserver):
    """Ends the process's work at a step of a stage, or where a phase begins or has ended."""

    def __init__(self, stage: str, step: int | str, kill=None) -> None:
        self.stage, self.step = stage, step
        self.kill = kill or self._raise

    def _raise(self) -> None:
        raise Killed

    def phase_started(self, phase: str, title: str) -> None:
        if (phase, "start") == (self.stage, self.step):
            self.kill()

    def phase_finished(self, phase: str, seconds: float) -> None:
        if (phase, "end") == (self.stage, self.step):
            self.kill()

    def metrics(self, stage: str, step: int, values) -> None:
        if (stage, step) == (self.stage, self.step):
            self.kill()


class Lines(RunObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


SETTINGS = {  # five steps an epoch, the last one short; dropout, so that the RNG matters
    "batch_size": 2,
    "gradient_accumulation": 2,
    "lora_dropout": 0.2,
}
ONE_STAGE = {"epochs_mi": 0.0, "epochs_uco": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _without_figures():
    with without_figures():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


class Runs:
    """Runs of one recipe that differ in their folder; importance and plan are made once."""

    def __init__(self, folder: Path, name: str, **settings) -> None:
        self.folder, self.name, self.settings = folder, name, SETTINGS | settings
        with pytest.raises(Killed):
            train(self.recipe("planned"), observer=KillAt("rp", "start"))
        self.reference = train(self.begun("undisturbed"))

    def recipe(self, case: str) -> Recipe:
        return tiny_recipe(
            self.folder, output=str(self.folder / f"{self.name} {case}"), **self.settings
        )

    def begun(self, case: str) -> Recipe:
        """The recipe of a run whose plan is made."""
        recipe = self.recipe(case)
        shutil.copytree(self.recipe("planned").output, recipe.output)
        return recipe


@pytest.fixture(scope="module")
def three_stages(folder: Path) -> Runs:
    return Runs(folder, "three stages")


@pytest.fixture(scope="module")
def one_stage(folder: Path) -> Runs:
    return Runs(folder, "one stage", **ONE_STAGE)


def metric_rows(run: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in run.metrics_file.read_text().splitlines()]


def assert_same_run(run: RunDirectory, reference: RunDirectory) -> None:
    """Bitwise equal adapters after every stage, equal metrics, nothing left behind."""
    for name in STAGE_FOLDERS:
        if (reference.path / name).exists():
            assert_same_tensors(
                adapter_tensors(run.path / name), adapter_tensors(reference.path / name)
            )
    assert metric_rows(run) == metric_rows(reference)
    names = [
        {str(path.relative_to(each.path)) for path in each.path.rglob("*") if path.is_file()}
        for each in (run, reference)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("stage", "step", "resumed_from"),
    [
        ("rp", 1, 0),
        ("rp", 4, 2),
        ("mi", 4, 2),
        ("mi", 9, 8),
        ("uco", 5, 4),
        ("mi", "start", None),
        ("uco", "start", None),
        ("uco", "end", None),
    ],
)
def test_case_46_a_killed_run_resumes_bitwise(
    three_stages: Runs, stage: str, step, resumed_from: int | None
) -> None:
    recipe = three_stages.begun(f"killed {stage} {step}")
    with pytest.raises(Killed):
        train(recipe, observer=KillAt(stage, step))
    run = train(recipe)
    assert_same_run(run, three_stages.reference)
    if resumed_from is not None:
        facts = json.loads(run.manifest_file.read_text())["phases"][stage]
        assert facts["resumed_from"] == resumed_from


def test_case_46_a_run_killed_twice_in_one_stage_resumes_bitwise(three_stages: Runs) -> None:
    recipe = three_stages.begun("killed twice")
    for step in (4, 7):
        with pytest.raises(Killed):
            train(recipe, observer=KillAt("mi", step))
    assert_same_run(train(recipe), three_stages.reference)


def _nth_call(monkeypatch, owner, name: str, count: int, *, after: bool = False) -> None:
    """Kill at the `count`-th call of `owner.name`: half-way through it, or right after it."""
    original, calls = getattr(owner, name), [0]

    def dying(*args, **kwargs):
        calls[0] += 1
        result = original(*args, **kwargs) if after or calls[0] != count else None
        if calls[0] == count:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


# A checkpoint is adapter, arguments, optimizer, schedule, RNG, Trainer state, seal, in this order;
# the run is killed in its second one.
CHECKPOINT_WRITES = {
    "before the adapter": (PeftModel, "save_pretrained", 2, False),
    "after the adapter": (PeftModel, "save_pretrained", 2, True),
    "training arguments": (torch, "save", 5, False),
    "optimizer": (torch, "save", 6, False),
    "schedule": (torch, "save", 7, False),
    "random numbers": (torch, "save", 8, False),
    "trainer state": (TrainerState, "save_to_json", 2, False),
    "seal": (citi.checkpoints, "write_json", 2, False),
    "after the seal": (citi.checkpoints, "write_json", 2, True),
}


@pytest.mark.parametrize("where", CHECKPOINT_WRITES)
def test_case_45_killed_at_any_write_of_a_checkpoint(
    one_stage: Runs, where: str, monkeypatch
) -> None:
    owner, name, count, after = CHECKPOINT_WRITES[where]
    recipe = one_stage.begun(where)
    with monkeypatch.context() as patch:
        _nth_call(patch, owner, name, count, after=after)
        with pytest.raises(Killed):
            train(recipe)
    kept = RunDirectory.of(recipe).path / "checkpoints" / "stage1_rp"
    wanted = 4 if where == "after the seal" else 2
    assert citi.checkpoints.last_complete_checkpoint(kept) == kept / f"checkpoint-{wanted}"
    lines = Lines()
    assert_same_run(train(recipe, observer=lines), one_stage.reference)
    assert f"stage rp goes on after step {wanted}" in lines.lines
    said = "left out 1 half-written checkpoint(s) of stage rp" in lines.lines
    assert said == (wanted == 2)


# The manifest is saved when the run is opened, then for rp, mi (skipped), uco (skipped), adapter.
STAGE_WRITES = {
    "the stage's adapter": (citi.durable.os, "rename", 1, False),
    "between adapter and manifest": (Manifest, "record", 1, False),
    "the manifest": (Manifest, "save", 2, False),
    "after the manifest": (Manifest, "save", 2, True),
    "the final adapter": (Manifest, "record", 4, False),
}


@pytest.mark.parametrize("where", STAGE_WRITES)
def test_case_45_killed_at_any_write_of_a_finished_stage(
    one_stage: Runs, where: str, monkeypatch
) -> None:
    owner, name, count, after = STAGE_WRITES[where]
    recipe = one_stage.begun(where)
    with monkeypatch.context() as patch:
        _nth_call(patch, owner, name, count, after=after)
        with pytest.raises(Killed):
            train(recipe)
    assert_same_run(train(recipe), one_stage.reference)


_KILLED = """
import os, signal, sys
import citi, citi_kernels
sys.path += sys.argv[2:]
from test_run_resume import KillAt
from citi.recipe import load_recipe
from citi.run import train

kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
train(load_recipe(sys.argv[1]), observer=KillAt("mi", 5, kill))
"""


def test_case_45_kill_minus_nine_in_a_process_of_its_own(three_stages: Runs) -> None:
    recipe = three_stages.begun("kill -9")
    run = RunDirectory.of(recipe)
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, str(run.recipe_file), *tests],
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    train(recipe)
    assert json.loads(run.manifest_file.read_text())["phases"]["mi"]["resumed_from"] == 4
    assert_same_run(run, three_stages.reference)


def test_case_45_only_the_first_process_removes_half_a_checkpoint(
    one_stage: Runs, monkeypatch
) -> None:
    """Two processes that remove the same files trip over each other."""
    recipe = one_stage.begun("of two processes")
    half = Path(recipe.output, "checkpoints", "stage1_rp", "checkpoint-2")
    half.mkdir(parents=True)
    second = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    monkeypatch.setattr(citi.stage_training, "this_process", lambda: second)
    with pytest.raises(Killed):
        train(recipe, observer=KillAt("rp", 1))
    assert half.is_dir()


def test_one_checkpoint_is_left_once_the_next_is_whole(one_stage: Runs) -> None:
    recipe = one_stage.begun("with one checkpoint")
    with pytest.raises(Killed):
        train(recipe, observer=KillAt("rp", 5))
    folder = Path(recipe.output, "checkpoints", "stage1_rp")
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]


def test_case_46_killed_between_the_last_checkpoint_and_the_stages_adapter(
    folder: Path, monkeypatch
) -> None:
    """Within a fraction of an epoch: nothing ends the loop there but the number of steps."""
    runs = Runs(folder, "half an epoch", **(ONE_STAGE | {"epochs_rp": 0.5}))

    def kill(model) -> None:
        raise Killed

    recipe = runs.begun("killed at the end")
    with monkeypatch.context() as patch:
        patch.setattr(citi.run, "lower_to_base_dtype", kill)
        with pytest.raises(Killed):
            train(recipe)
    run = train(recipe)
    assert_same_run(run, runs.reference)
    steps = runs.reference.load_manifest().phases["rp"]["steps"]
    facts = run.load_manifest().phases["rp"]
    assert (facts["steps"], facts["resumed_from"]) == (steps, steps)
