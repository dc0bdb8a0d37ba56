"""The tables hold the figures, the counts, the changes and the reasons for gaps."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from citi.evaluation import (
    EvalResult,
    comparison_markdown,
    comparison_table,
    mean_relative_change,
)
from citi.evaluation.evaluate import NO_ROUGE


def result(exact, math_nll, chat_nll, *, rouge=0.25, notes=()) -> EvalResult:
    tool = {
        "api": {
            "format": 0.975,
            "name": 0.5,
            "arguments": 0.333,
            "exact": exact,
            "rouge_l": rouge,
            "n": 50,
            "num_calls": 40,
            "num_responses": 10,
        }
    }
    general = {
        "math": {"nll": math_nll, "exact_match": 0.1, "n": 60, "num_tokens": 9, "num_judged": 20},
        "chat[x]": {
            "nll": chat_nll,
            "exact_match": None,
            "n": 30,
            "num_tokens": 9,
            "num_judged": 0,
        },
    }
    return EvalResult(tool, general, notes=notes)


@pytest.fixture
def results():
    return {
        "base": result(0.0, 1.193, 2.0),
        "LoRA": result(0.2, 1.282, 2.5, rouge=None, notes=(NO_ROUGE,)),
        "CITI": result(0.175, 1.2, None),
    }


def rendered(results) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(comparison_table(results))
    return console.file.getvalue()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("│", "|").strip().strip("|┃").split("|")]


def rows(text: str) -> dict[str, list[str]]:
    return {
        cells(line)[0]: cells(line)[1:] for line in text.splitlines() if "|" in line or "│" in line
    }


@pytest.mark.parametrize("render", [rendered, comparison_markdown])
def test_rows_hold_percent_with_counts_and_changes_against_the_first_column(render, results):
    table = rows(render(results))
    assert table["api · format"] == ["40", "97.5% (39/40)", "97.5% (39/40)", "97.5% (39/40)"]
    assert table["api · arguments"] == ["40", "33.3%", "33.3%", "33.3%"]
    assert table["api · exact"] == ["40", "0.0% (0/40)", "20.0% (8/40)", "17.5% (7/40)"]
    assert table["api · ROUGE-L"] == ["10", "25.0%", "-", "25.0%"]
    assert table["math · answer NLL"] == ["60", "1.193", "1.282 (+7.5%)", "1.200 (+0.6%)"]
    assert table["math · exact match"] == ["20", "10.0% (2/20)", "10.0% (2/20)", "10.0% (2/20)"]
    assert table["chat[x] · answer NLL"] == ["30", "2.000", "2.500 (+25.0%)", "-"]
    assert table["mean change of answer NLL"] == ["", "", "+16.2%", "+0.6%"]
    assert "chat[x] · exact match" not in table


@pytest.mark.parametrize("render", [rendered, comparison_markdown])
def test_footnotes_say_what_was_left_out_and_for_which_column(render, results):
    text = " ".join(render(results).split())
    assert "pip install 'citi-kernels[eval]' (LoRA)" in text
    assert "change against base" in text
    only = EvalResult({}, {}, notes=("chat: no samples",))
    text = " ".join(render({"base": only}).split())
    assert text.endswith("chat: no samples")


def test_one_result_alone_has_no_change(results):
    table = rows(comparison_markdown({"base": results["base"]}))
    assert table["math · answer NLL"] == ["60", "1.193"]
    assert "mean change of answer NLL" not in table


def test_sets_that_one_result_lacks_stay_in_the_table(results):
    extra = EvalResult({}, {"code": {"nll": 1.0, "exact_match": None, "n": 5, "num_tokens": 9}})
    table = rows(comparison_markdown({"base": results["base"], "other": extra}))
    assert table["code · answer NLL"] == ["5", "-", "1.000"]
    assert table["api · exact"] == ["40", "0.0% (0/40)", "-"]
    assert table["mean change of answer NLL"] == ["", "", "-"]


def test_mean_relative_change_averages_over_the_sets_both_have(results):
    assert mean_relative_change(results["base"], results["base"]) == 0.0
    expected = ((1.282 / 1.193 - 1) + 0.25) / 2
    assert mean_relative_change(results["base"], results["LoRA"]) == pytest.approx(expected)
    assert mean_relative_change(results["base"], EvalResult({}, {})) is None


def test_a_pipe_in_a_name_does_not_break_the_markdown():
    odd = EvalResult({}, {"a|b": {"nll": 1.0, "exact_match": None, "n": 5, "num_tokens": 9}})
    assert "| a\\|b · answer NLL | 5 | 1.000 |" in comparison_markdown({"base": odd})


def test_no_results_are_refused():
    with pytest.raises(ValueError, match="results: wanted at least one"):
        comparison_table({})
