"""Rows of the comparison, end to end on a tiny model: budgets, resuming, repeating."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from method_cases import TINY, first_rates, open_tiny, without_search

import citi.stage_training
from benchmarks.method import run as run_module
from benchmarks.method.data_sets import EVALUATION
from benchmarks.method.row_config import ROWS, TRIALS, RowConfigError, load_row
from benchmarks.method.row_result import RowResult
from benchmarks.method.run import ComparisonError, run_row, run_rows
from citi.observer import RunObserver
from citi.saved_json import SavedFileError

TRAINED = tuple(name for name in ROWS + TRIALS if name != "vanilla")
MIXED = tuple(name for name in TRAINED if load_row(name).data == "mix")


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class KillAt(RunObserver):
    """Ends the process's work at a step of a stage."""

    def __init__(self, stage: str, step: int) -> None:
        self.place = (stage, step)

    def metrics(self, stage: str, step: int, values) -> None:
        if (stage, step) == self.place:
            raise Killed


@pytest.fixture(scope="module", autouse=True)
def _fast():
    with without_search():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("method")


@pytest.fixture(scope="module")
def comparison(folder):
    return open_tiny(folder, folder / "all")


@pytest.fixture(scope="module")
def results(comparison) -> dict[str, RowResult]:
    return {result.row: result for result in run_rows(comparison, ROWS + TRIALS, num_seeds=1)}


def test_every_row_runs_and_leaves_a_result_that_reads_back_equal(comparison, results) -> None:
    assert tuple(results) == ROWS + TRIALS
    for name, result in results.items():
        file = comparison.result_file(load_row(name), 0)
        assert RowResult.load(file) == result
        assert set(result.samples) == {each.name for each in EVALUATION}
        assert len(result.samples["api_bank_lv1"]["exact"]) == TINY.eval_samples
        assert len(result.samples["math"]["right"]) == TINY.judged_samples
        answers = json.loads((comparison.answers / file.stem / "bfcl.json").read_text())
        assert len(answers) == TINY.eval_samples
        assert all(isinstance(answer, str) for answer in answers.values())
        assert "passes" not in result.samples["mbpp"], "code is run on request only"
    assert not any((comparison.output / "work").iterdir())


def test_every_trained_row_takes_the_same_steps_and_tokens(results) -> None:
    assert results["vanilla"].num_steps == results["vanilla"].num_tokens == 0
    budget = TINY.steps * TINY.accumulation * TINY.batch_tokens
    for name in TRAINED:
        assert results[name].num_steps == TINY.steps, name
        assert 0 <= results[name].num_tokens - budget < TINY.max_length, name
    assert len({results[name].num_tokens for name in MIXED}) == 1, "the same data"
    assert len({results[name].num_answer_tokens for name in MIXED}) == 1


def test_every_trained_row_has_moved_from_vanilla(results) -> None:
    vanilla = results["vanilla"].samples
    for name in TRAINED:
        assert results[name].samples["math"]["nll"] != vanilla["math"]["nll"], name


def test_stages_share_the_steps_as_the_config_says(results) -> None:
    assert results["citi"].steps == {"rp": 1, "mi": 2, "uco": 1}
    assert results["without_molora"].steps == {"lora": 3, "whole": 1}
    assert results["uco"].steps == {"uco": 4}


def test_the_log_of_a_trainer_has_as_many_steps_as_the_result_counts(folder, results) -> None:
    comparison = dataclasses.replace(open_tiny(folder, folder / "counted"), keep_models=True)
    batches = []
    collate = citi.stage_training.CitiTrainer.training_step

    def counted(self, model, inputs, *args, **kwargs):
        batches.append(int(inputs["attention_mask"].sum()))
        return collate(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(citi.stage_training.CitiTrainer, "training_step", counted)
        result = run_row(comparison, first_rates("without_rp"), 0)
    assert len(batches) == TINY.steps * TINY.accumulation
    assert sum(batches) == result.num_tokens == results["without_rp"].num_tokens
    run_folder = comparison.output / "work" / "without_rp_seed0" / "run"
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if "loss" in row] == ["mi"] * 3 + ["uco"]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(folder, results) -> None:
    again = open_tiny(folder, folder / "again")
    assert run_row(again, first_rates("lora"), 0).samples == results["lora"].samples
    other = run_row(again, first_rates("lora"), 1)
    assert other.samples["math"]["nll"] != results["lora"].samples["math"]["nll"]


@pytest.mark.parametrize(
    ("name", "stage", "step"),
    [("ft", "full", 3), ("without_molora", "whole", 1), ("citi", "mi", 2)],
)
def test_a_killed_row_ends_at_the_numbers_of_an_unbroken_one(
    folder, results, name: str, stage: str, step: int
) -> None:
    broken = open_tiny(folder, folder / "broken")
    with pytest.raises(Killed):
        run_row(broken, first_rates(name), 0, observer=KillAt(stage, step))
    assert run_row(broken, first_rates(name), 0).samples == results[name].samples


def test_a_row_that_was_killed_while_measured_is_not_trained_again(folder, results) -> None:
    broken = open_tiny(folder, folder / "measuring")
    measure_sets = run_module.measure_sets

    def killed(measuring, data, target):
        measure_sets(measuring, data, target)
        (target / "dolly.json").unlink()
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "measure_sets", killed)
        with pytest.raises(Killed):
            run_row(broken, first_rates("lora"), 0)
    result = run_row(broken, first_rates("lora"), 0, observer=KillAt("lora", 1))
    assert result.samples == results["lora"].samples


def test_a_finished_row_is_read_and_a_damaged_result_is_refused(comparison, results) -> None:
    assert run_row(comparison, first_rates("ft"), 0) == results["ft"]
    file = comparison.result_file(load_row("rp_mi"), 0)
    whole = file.read_text()
    file.write_text(whole.replace('"nll": [', '"nll": [-1.0, '))
    with pytest.raises(SavedFileError, match="nll"):
        run_row(comparison, first_rates("rp_mi"), 0)
    file.write_text(whole[: len(whole) // 2])
    with pytest.raises(SavedFileError, match="cut short"):
        run_row(comparison, first_rates("rp_mi"), 0)
    file.write_text(whole)


def test_an_output_folder_of_another_scale_is_refused(folder, comparison) -> None:
    other = dataclasses.replace(TINY, steps=8)
    with pytest.raises(ComparisonError, match="steps"):
        open_tiny(folder, comparison.output, other)


def test_a_row_that_is_none_is_named() -> None:
    with pytest.raises(RowConfigError, match="without_rp"):
        load_row("citi2")
