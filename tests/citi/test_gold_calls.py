"""The wanted calls of samples, and those of the shared data against their own references."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from citi.data.benchmark_formats import from_bfcl
from citi.data.sample import Message, Sample
from citi.evaluation.tool_calls import gold_calls_of, parse_tool_calls, score_tool_calls

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
# Published with a call outside brackets, or with an object that never closes.
ODD_GOLD = {"api_bank-lv3train-api-515", "api_bank-lv3train-api-517", "toolalpaca-sim-4-10"}


def make_sample(content="", meta=None, tool_calls=None) -> Sample:
    messages = (Message("user", "do it"), Message("assistant", content, tool_calls))
    return Sample("1", 1, "tool", messages, meta=meta or {})


def test_wanted_calls_are_found_wherever_a_sample_keeps_them():
    call = {"name": "f", "arguments": {"a": 1}}
    other = {"name": "g", "arguments": {}}
    possible = [{"f": {"a": [1, 2]}}]
    golden = [{"Action": "f", "Action_Input": '{"a": 1}'}]
    written = "API-Request: [f(a=1)]"
    assert gold_calls_of(make_sample(written, {"possible_answer": possible})) == possible
    assert gold_calls_of(make_sample("", {"golden_answer": golden})) == [call]
    assert gold_calls_of(make_sample("", tool_calls=(call,))) == [call]
    assert gold_calls_of(make_sample(written, {"gold_calls": [call]})) == [call]
    assert gold_calls_of(make_sample(written)) == [call]
    # gold_calls of a whole dialogue: only the last turn counts.
    assert gold_calls_of(make_sample(written, {"gold_calls": [other, call]})) == [call]
    assert gold_calls_of(make_sample("Bye.", {"gold_calls": [other]})) is None
    assert gold_calls_of(make_sample("No API fits.", {"gold_calls": []})) == []
    assert gold_calls_of(make_sample("Hello.")) is None
    assert gold_calls_of(Sample("1", 1, "tool", (Message("user", "?"),))) is None


def shared_rows():
    for path in sorted(SHARED.glob("*/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row["meta"].get("gold_calls") is not None or row["meta"].get("golden_answer"):
                    yield row


def lists_alternatives(row) -> bool:
    """Whether a stored BFCL reference repeats what its objects accept, which no answer should."""
    if not row["meta"].get("possible_answer"):
        return False
    values = [v for call in row["meta"]["gold_calls"] for v in call["arguments"].values()]
    return any(not isinstance(v, str) and "{" in json.dumps(v) for v in values)


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data folder is not beside the repository"
)
def test_every_gold_call_of_the_shared_data_parses_back_and_scores_full():
    wrong, seen = [], 0
    for row in shared_rows():
        messages = [Message(m["role"], m["content"]) for m in row["messages"]]
        last = messages[-1].content
        parsed = parse_tool_calls(last)
        calls = [{"name": c.name, "arguments": c.arguments} for c in parsed.calls]
        stated = row["meta"].get("gold_calls", calls)
        if stated and len(stated) != len(calls):  # gold of the whole dialogue
            texts = [m.content for m in messages if m.role == "assistant"]
            parts = [parse_tool_calls(text).calls for text in texts]
            calls = [{"name": c.name, "arguments": c.arguments} for part in parts for c in part]
        if stated and calls != stated:
            wrong.append((row["id"], calls, stated))
        gold = gold_calls_of(Sample(row["id"], 1, "tool", tuple(messages), meta=row["meta"]))
        score = score_tool_calls(last, gold) if gold is not None else {"exact": 1.0, "format": 1.0}
        right = float(not lists_alternatives(row))
        if score["exact"] != right or score["format"] != float(row["id"] not in ODD_GOLD):
            wrong.append((row["id"], score, gold))
        seen += 1
    assert not wrong, wrong[:5]
    assert seen > 6000


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data folder is not beside the repository"
)
def test_every_bfcl_reference_is_one_of_its_accepted_answers():
    wrong, seen = [], 0
    for row in shared_rows():
        truth = row["meta"].get("possible_answer")
        if not truth:
            continue
        question = {"question": [{"role": "user", "content": "?"}], "function": []}
        calls = from_bfcl({**question, "ground_truth": truth})[0].messages[-1].tool_calls
        text = "\n".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in calls)
        if set(score_tool_calls(text, truth).values()) != {1.0}:
            wrong.append((row["id"], calls, truth))
        seen += 1
    assert not wrong, wrong[:5]
    assert seen > 1000
