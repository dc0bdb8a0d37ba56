"""Evaluation data never gets into training or validation, and a planted leak is found."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from method_cases import CITIES, TINY, open_tiny, plain_row, tool_row, write_rows, write_sources

from benchmarks.method.data_sets import EVALUATION, TRAINING, DataFolder, prepare_data
from benchmarks.method.leaks import LeakError, check_leaks, find_leaks, question_key
from citi.data import DataError, read_samples


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    return prepare_data(write_sources(tmp_path / "source"), tmp_path / "data", TINY)


def plant(file: Path, row: dict) -> int:
    """Append a row; returns its line."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
    return len(file.read_text(encoding="utf-8").splitlines())


def first_row(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8").splitlines()[0])


def test_prepared_data_has_no_leak_and_is_the_same_every_time(data, tmp_path: Path) -> None:
    check_leaks(data.path)
    again = prepare_data(tmp_path / "source", tmp_path / "again", TINY)
    assert again.record() == data.record()


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_planted_prompt_is_found_by_file_and_line(data, part: str) -> None:
    asked = data.evaluation()["math"]
    file = data.path / part / "math.jsonl"
    line = plant(file, first_row(asked))
    with pytest.raises(LeakError) as error:
        check_leaks(data.path)
    assert f"{file}:{line}: the prompt of {asked}:1" in str(error.value)


def test_a_planted_question_is_found_in_other_case_and_with_other_instructions(data) -> None:
    asked = first_row(data.evaluation()["nq_open"])["messages"][0]["content"]
    row = plain_row("instruct", asked.upper() + " !!", "Something else.")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    file = data.training()["instruct"]
    line = plant(file, row)
    with pytest.raises(LeakError, match=f"{file}:{line}: the question of"):
        check_leaks(data.path)


def test_a_tool_of_an_unseen_set_is_found_and_one_of_a_seen_set_is_none(data) -> None:
    file = data.training()["api_bank"]
    plant(file, tool_row("Weather", "Bonn, and nothing else"))
    check_leaks(data.path)
    line = plant(file, tool_row("strange_SEAL_tools", "Turin"))
    with pytest.raises(LeakError, match=f"{file}:{line}: the tool of .*seal_tools"):
        check_leaks(data.path)


def test_a_validation_sample_in_training_is_found(data) -> None:
    file = data.training()["code"]
    line = plant(file, first_row(data.validation()["code"]))
    leaks = find_leaks([file], list(data.validation().values()), [])
    assert [(leak.kind, leak.training) for leak in leaks] == [("prompt", f"{file}:{line}")]


def test_the_run_refuses_a_leak_before_anything_is_trained(tmp_path: Path, monkeypatch) -> None:
    open_tiny(tmp_path, tmp_path / "out")
    data = DataFolder(tmp_path / "out" / "data")
    plant(data.training()["math"], first_row(data.evaluation()["math"]))
    monkeypatch.setattr(DataFolder, "record", lambda self: {"sha256": {}})  # leaks come first
    with pytest.raises(LeakError, match="math"):
        open_tiny(tmp_path, tmp_path / "out")


def test_preparing_leaves_out_what_an_evaluation_set_knows(tmp_path: Path) -> None:
    source = write_sources(tmp_path / "source")
    file = source / TRAINING["math"][1]
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    known = plain_row("math", "Dolly of Rome?", "It is.")
    stranger = tool_row("StrangeBfcl", "Kyoto")
    write_rows(file, [known, *rows, known])
    tools = source / TRAINING["api_bank"][1]
    write_rows(tools, [stranger, *[tool_row("Weather", city) for city in CITIES]])
    data = prepare_data(source, tmp_path / "data", TINY)
    check_leaks(data.path)
    left_out = data.record()["left_out"]
    assert left_out["train/math"] + left_out["validation/math"] == 2
    assert left_out["train/api_bank"] + left_out["validation/api_bank"] == 1


def test_samples_of_one_conversation_stay_on_one_side(tmp_path: Path) -> None:
    source = write_sources(tmp_path / "source")
    rows = [plain_row("code", f"code {i // 3}?", f"Answer {i}.") for i in range(33)]
    write_rows(source / TRAINING["code"][1], rows)
    data = prepare_data(source, tmp_path / "data", TINY)
    files = (data.training()["code"], data.validation()["code"], data.evaluation()["code"])
    keys = [{question_key(sample) for sample in read_samples(file)} for file in files]
    assert all(keys)
    assert all(keys[0].isdisjoint(other) for other in keys[1:])
    assert keys[1].isdisjoint(keys[2])


def test_evaluation_rows_stand_in_their_source_as_they_are(data, tmp_path: Path) -> None:
    for each in EVALUATION:
        if each.file:
            file = tmp_path / "source" / each.file
            lines = gzip.decompress(file.read_bytes()).decode().splitlines()
            chosen = data.evaluation()[each.name].read_text().splitlines()
            assert set(chosen) <= set(lines), each.name
            assert len(chosen) == TINY.eval_samples


def test_prepared_files_that_changed_are_refused(data) -> None:
    plant(data.training()["math"], plain_row("math", "Another one?", "Yes."))
    with pytest.raises(DataError, match=r"math\.jsonl changed"):
        data.record()
