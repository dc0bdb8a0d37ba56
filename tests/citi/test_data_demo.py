"""The data shipped for the demo: what it holds, and that its licences are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import citi.demo
from citi.data import Sample, read_data

FOLDER = Path(citi.demo.__file__).parent / "data"
NUM_RECORDS = {
    "tool_train": 480,
    "tool_eval_lv3": 60,
    "tool_eval_lv1": 60,
    "math_train": 200,
    "math_eval": 60,
    "code_train": 200,
    "code_eval": 60,
    "knowledge_train": 200,
    "knowledge_eval": 100,
    "instruct_train": 200,
    "instruct_eval": 60,
}


@pytest.fixture(scope="module")
def demo() -> dict[str, list[Sample]]:
    return {name: read_data(FOLDER / f"{name}.jsonl.gz")[0] for name in NUM_RECORDS}


def _prompts(samples: list[Sample]) -> set[str]:
    return {
        " ".join(str([(m.role, m.content) for m in sample.messages[:-1]]).lower().split())
        for sample in samples
    }


def test_every_file_is_complete_and_nothing_else_lies_there(demo):
    assert {name: len(samples) for name, samples in demo.items()} == NUM_RECORDS
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {f"{name}.jsonl.gz" for name in NUM_RECORDS} | {"LICENSES.md"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 400_000


def test_the_bytes_are_stable_no_time_and_no_name_in_the_gzip_header():
    for path in FOLDER.glob("*.gz"):
        header = path.read_bytes()[:8]
        assert header[3] == 0, path.name
        assert header[4:8] == b"\0\0\0\0", path.name


def test_every_file_has_a_licence_that_is_neither_share_alike_nor_non_commercial():
    text = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and ".gz" in line]
    licences = {name: row for row in rows for name in re.findall(r"(\w+)\.jsonl\.gz", row)}
    assert set(licences) == set(NUM_RECORDS)
    for row in licences.values():
        assert re.search(r"\| (Apache-2\.0|MIT|CC-BY-4\.0)( \(see the note\))? \|", row)
        assert re.search(r"@[0-9a-f]{40}", row)


def test_tool_records_have_one_call_to_score_and_general_ones_none(demo):
    for name, samples in demo.items():
        tool = name.startswith("tool")
        assert {sample.task_type for sample in samples} == {int(tool)}
        for sample in samples:
            assert sample.messages[-1].role == "assistant"
            assert len(sample.meta.get("gold_calls", ())) == int(tool)
            assert bool(sample.tools) == tool


def test_training_and_evaluation_share_no_prompt_and_level_1_no_tool(demo):
    for ability in ("math", "code", "knowledge", "instruct"):
        assert not _prompts(demo[f"{ability}_train"]) & _prompts(demo[f"{ability}_eval"])
    train = demo["tool_train"]
    called = {
        name: {s.meta["gold_calls"][0]["name"] for s in demo[name]}
        for name in demo
        if "tool" in name
    }
    for name in ("tool_eval_lv1", "tool_eval_lv3"):
        assert not _prompts(train) & _prompts(demo[name])
    assert called["tool_train"] & called["tool_eval_lv3"] == {"ToolSearcher"}
    assert not called["tool_train"] & called["tool_eval_lv1"]


def test_half_of_the_level_3_calls_search_for_a_tool(demo):
    for name in ("tool_train", "tool_eval_lv3"):
        searches = [s.meta["gold_calls"][0]["name"] == "ToolSearcher" for s in demo[name]]
        assert sum(searches) * 2 == len(searches)


def test_general_records_carry_what_scoring_needs(demo):
    for sample in demo["math_eval"]:
        answer = sample.messages[-1].content.rpartition("The answer is: ")[2]
        assert answer.replace(",", "") == sample.meta["answer"]
    for sample in demo["knowledge_eval"]:
        assert sample.meta["answers"][0] == sample.messages[-1].content
        assert 1 <= len(sample.meta["answers"]) <= 12
    for sample in demo["code_eval"]:
        assert sample.messages[-1].content.startswith("```python\n")
        assert sample.meta["test_list"]
