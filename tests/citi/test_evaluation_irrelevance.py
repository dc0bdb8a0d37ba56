"""Questions that no tool fits: to call nothing there is a figure of its own."""

from __future__ import annotations

import sys

import pytest

import tiny
from citi.data.sample import Message, Sample
from citi.evaluation import EvalResult, comparison_markdown, evaluate
from citi.report import tradeoff

CALL = "API-Request: [f(a='1')]"
GOLD = [{"name": "f", "arguments": {"a": "1"}}]
REPLY = "None of the tools fits."


def question(name: str, reference: str, gold_calls: list[dict]) -> Sample:
    messages = (Message("user", name), Message("assistant", reference))
    return Sample(name, 1, "tool", messages, meta={"gold_calls": gold_calls})


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> EvalResult:
    """Of a model that calls nothing, but for one question that no tool fits."""
    answers = {"needs a call": "I cannot.", "fits none": REPLY, "called all the same": CALL}
    # `citi.evaluation.evaluate` as an attribute is the function, not the module.
    module = sys.modules["citi.evaluation.evaluate"]
    monkeypatch.setattr(
        module, "generate_answers", lambda _, __, samples, **___: [answers[s.id] for s in samples]
    )
    samples = [
        question("needs a call", CALL, GOLD),
        question("fits none", REPLY, []),
        question("called all the same", REPLY, []),
    ]
    return evaluate(tiny.tiny_model(), tiny.tiny_tokenizer(), tool={"api": samples})


def test_a_model_that_calls_nothing_does_not_pass_for_one_that_calls_rightly(
    result: EvalResult,
) -> None:
    figures = result.tool["api"]
    assert (figures["exact"], figures["num_calls"]) == (0.0, 1)
    assert (figures["irrelevance"], figures["num_irrelevant"]) == (0.5, 2)
    assert (figures["rouge_l"], figures["num_responses"]) == (None, 0)
    assert [row["exact"] for row in result.answers["api"]] == [0.0, 1.0, 0.0]


def test_the_tables_show_it(result: EvalResult) -> None:
    markdown = comparison_markdown({"base": result})
    assert "| api · no call where no tool fits | 2 | 50.0% (1/2) |" in markdown
    assert "| api · exact | 1 | 0.0% (0/1) |" in markdown
    page = tradeoff.table({"base": result})
    assert "no call where no tool fits<small>2 questions</small>" in page


def test_results_of_versions_without_the_figure_are_shown(result: EvalResult) -> None:
    content = result.to_json()
    del content["tool"]["api"]["irrelevance"], content["tool"]["api"]["num_irrelevant"]
    earlier = EvalResult.from_json(content)
    assert "no tool fits" not in comparison_markdown({"base": earlier})
    assert "no tool fits" not in tradeoff.table({"base": earlier})
    both = tradeoff.table({"base": earlier, "tuned": result})
    assert "<td>not measured</td>" in both
