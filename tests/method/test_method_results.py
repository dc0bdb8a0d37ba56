"""Figures, intervals and verdicts of RESULTS.md."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.method import bootstrap, results_table
from benchmarks.method.bootstrap import mean_estimate, mean_of, ratio_estimate
from benchmarks.method.data_sets import EVALUATION
from benchmarks.method.paper import PAPER
from benchmarks.method.results_table import filled_readme, results_markdown
from benchmarks.method.row_config import ROWS, TRIALS, load_row
from benchmarks.method.row_result import RowResult
from benchmarks.method.scale import CPU, SCALES
from benchmarks.method.search_table import search_cells
from benchmarks.method.summary import API_BANK, GENERAL, MixedResultsError, summarise
from benchmarks.method.trade_off_figure import trade_off
from benchmarks.method.verdicts import verdicts

NUM_SAMPLES = 40


def samples(exact: float, change: float) -> dict:
    """Columns with a share of exact calls and an NLL that is `change` above vanilla's."""
    generator = random.Random(0)
    found = {}
    for each in EVALUATION:
        if each.task == "general":
            nll = [round((20 + generator.random()) * (1 + change), 5) for _ in range(NUM_SAMPLES)]
            found[each.name] = {"nll": nll, "tokens": [10] * NUM_SAMPLES}
        elif each.name.startswith("responses"):
            found[each.name] = {"rouge_l": [0.25] * NUM_SAMPLES}
        else:
            right = [float(i < exact * NUM_SAMPLES) for i in range(NUM_SAMPLES)]
            found[each.name] = dict.fromkeys(("format", "name", "arguments", "exact"), right)
            found[each.name]["wanted_calls"] = [1] * NUM_SAMPLES
    return found


def result(name: str, exact: float, change: float, *, seed: int = 0, **values) -> RowResult:
    row = load_row(name)
    settings = {"row": dataclasses.asdict(row) | {"rates": list(row.rates)}, "run_code": False}
    fields = {
        "row": name,
        "title": row.title,
        "description": row.description,
        "scale": "cpu",
        "seed": seed,
        "settings": settings | {"scale": dataclasses.asdict(CPU)},
        "rates": {"learning_rate": 1e-3},
        "search": [],
        "model": "SmolLM2-135M-Instruct",
        "data_sha256": {"train/math": "0" * 64},
        "machine": {"device_name": "a CPU"},
        "steps": {"lora": 48},
        "num_tokens": 123_000,
        "num_answer_tokens": 20_000,
        "train_seconds": 600.0,
        "measure_seconds": 60.0,
        "samples": samples(exact, change),
    }
    return RowResult(**(fields | values))


def good_results() -> list[RowResult]:
    return [
        result("vanilla", 0.0, 0.0),
        result("ft", 0.5, 0.8),
        result("lora", 0.6, 0.2),
        result("lora_dm", 0.4, 0.1),
        result("citi", 0.5, 0.01),
        result("citi", 0.7, 0.03, seed=1),
    ]


def test_the_committed_results_are_what_the_script_writes() -> None:
    written = results_markdown(results_table.RESULTS)
    assert results_table.TARGET.read_text(encoding="utf-8") == written, (
        "run: python -m benchmarks.method.results_table"
    )


def test_the_readme_holds_the_committed_rows() -> None:
    text = results_table.README.read_text(encoding="utf-8")
    assert "<!-- method cpu -->" in text
    assert filled_readme(text, results_table.RESULTS) == text, (
        "run: python -m benchmarks.method.results_table"
    )


def test_the_readmes_table_is_that_of_its_scale(tmp_path: Path) -> None:
    opening, closing = "<!-- method cpu -->\n", "<!-- method end -->\n"
    nothing = filled_readme(f"before\n{opening}old\n{closing}after\n", tmp_path)
    assert nothing == f"before\n{opening}not yet measured\n\n{closing}after\n"
    assert filled_readme(nothing, tmp_path) == nothing


def test_what_has_no_file_is_named_as_not_yet_measured_and_stands_in_no_table(
    tmp_path: Path,
) -> None:
    nothing = results_markdown(tmp_path)
    for scale in SCALES:
        assert f"## Scale {scale}\n\nnot yet measured\n" in nothing
    result("vanilla", 0.0, 0.0).save(tmp_path)
    text = results_markdown(tmp_path)
    missing = ", ".join(load_row(name).title for name in ROWS if name != "vanilla")
    assert f"\nNot yet measured at this scale: {missing}.\n" in text
    for name in ROWS + TRIALS:
        tables = text.count(f"\n| {load_row(name).title} |") - 1  # one says what the row is
        assert tables == (6 if name == "vanilla" else name in PAPER), name
    assert "does not reproduce" not in text


def test_questions_that_no_tool_fits_are_counted_apart(tmp_path: Path) -> None:
    """A row that never calls has all of them right, and no call."""
    row = result("vanilla", 0.0, 0.0)
    scores = row.samples["bfcl"]
    scores["wanted_calls"] = [0] * 10 + [2] * 30
    for name in ("format", "name", "arguments", "exact"):
        scores[name] = [1.0] * 9 + [0.0] * 28 + [1.0] * 3
    row.save(tmp_path)
    summary = summarise([row])["vanilla"]
    assert summary.calls(["bfcl"]).value == pytest.approx(3 / 30)
    assert summary.irrelevance(["bfcl", "seal_tools"]).value == pytest.approx(9 / 10)
    assert summary.irrelevance(["seal_tools"]) is None
    low, high = summary.irrelevance(["bfcl"]).interval
    assert low < 0.9 < high
    text = results_markdown(tmp_path)
    assert re.search(r"\| 4\.3% \[[^|]*\| 90\.0% \[", text), "3 of 70 calls; 9 of 10 questions"


def test_the_picture_has_a_point_for_every_row(tmp_path: Path) -> None:
    for each in good_results():
        each.save(tmp_path)
    (picture,) = results_table.draw_pictures(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.name in results_markdown(tmp_path)
    (axes,) = trade_off(summarise(good_results())).axes
    places = {label.get_text(): label.xy for label in axes.texts}
    assert places.keys() == {"vanilla", "FT", "LoRA", "LoRA + DM", "CITI"}
    assert places["CITI"] == pytest.approx((2.0, 60.0))


def test_a_scale_with_vanilla_alone_has_no_picture(tmp_path: Path) -> None:
    result("vanilla", 0.0, 0.0).save(tmp_path)
    assert results_table.draw_pictures(tmp_path) == []
    assert ".png" not in results_markdown(tmp_path)


def test_measured_rows_stand_beside_the_papers_numbers(tmp_path: Path) -> None:
    for each in good_results():
        each.save(tmp_path)
    text = results_markdown(tmp_path)
    assert "| LoRA | 65.98% | 38.62 | +7.2% | 60.00% | 25.00 | +20.0% |" in text
    assert "| CITI | 58.92% | 34.51 | +3.5% | 60.00% | 25.00 | +2.0% |" in text
    assert "50.0% to 70.0%" in text, "single seeds of CITI"
    short = filled_readme("<!-- method cpu -->\n<!-- method end -->", tmp_path)
    assert "| LoRA | 1 | 60.0% [" in short
    assert "| CITI | 2 | 60.0% [" in short
    assert short.count("+2.0% [") == 1
    result("citi_wide", 0.6, 0.02).save(tmp_path)
    assert "| CITI, half of the components | 60.0% [" in results_markdown(tmp_path)
    assert "FT + DM" not in short


def test_a_search_shows_its_best_candidate_and_whether_it_lies_at_the_edge() -> None:
    def tried(*candidates: tuple[float, float, float | None]) -> list[dict]:
        return [
            {
                "rates": {"learning_rate": rate, "uco_learning_rate": other},
                "validation_nll": nll or 0.0,
                "diverged": nll is None,
            }
            for rate, other, nll in candidates
        ]

    inside = tried((1e-3, 1e-3, 2.5), (1e-2, 1e-3, 2.0), (0.1, 3e-3, None))
    rows = summarise([result("citi", 0.5, 0.0, search=inside), result("rp_mi", 0.5, 0.0)])
    assert search_cells(rows) == [
        ["CITI", "CITI", "0.001 / 0.001: 2.500; **0.01 / 0.001: 2.000**; 0.1 / 0.003: diverged",
         "uco_learning_rate"]
    ]  # fmt: skip
    one_edge = [{"rates": {"learning_rate": 1e-3}, "validation_nll": 2.0, "diverged": False}]
    further = [{"rates": {"learning_rate": 1e-2}, "validation_nll": nll, "diverged": False}
               for nll in (2.5, 1.5)]  # fmt: skip
    for search, edge in ((one_edge, "no"), (one_edge + further[:1], "learning_rate")):
        rows = summarise([result("lora", 0.5, 0.0, search=search)])
        assert [line[-1] for line in search_cells(rows)] == [edge]
    shared = [result("citi", 0.5, 0.0, search=inside), result("rp_mi", 0.5, 0.0, search=inside)]
    assert [line[:2] for line in search_cells(summarise(shared))] == [["CITI", "CITI, RP + MI"]]


def test_targets_are_met_missed_or_undecided() -> None:
    rows = summarise(good_results())
    answers = [verdict.answer for verdict in verdicts(rows)]
    assert answers == ["reproduces"] * 7
    worse = [each for each in good_results() if each.row != "citi"]
    worse.append(result("citi", 0.1, 0.15))
    answers = [verdict.answer for verdict in verdicts(summarise(worse))]
    assert answers == ["does not reproduce"] * 7
    near = [each for each in good_results() if each.row != "citi"]
    near.append(result("citi", 0.4, 0.01, samples=_same_calls_elsewhere()))
    assert verdicts(summarise(near))[0].answer == "undecided"
    harmless = [result("vanilla", 0, 0), result("ft", 0.5, -0.1), result("citi", 0.5, 0.0)]
    assert verdicts(summarise(harmless))[1].answer == "no loss to compare with"
    helpless = [result("lora_dm", 0.0, 0.0), result("citi", 0.0, 0.0)]
    assert verdicts(summarise(helpless))[0].answer == "neither makes a right call"
    assert verdicts({})[0].answer == "not yet measured"


def _same_calls_elsewhere() -> dict:
    """As many exact calls as at 0.4, but on other samples."""
    columns = samples(0.4, 0.01)
    for name in API_BANK:
        columns[name] = {key: values[::-1] for key, values in columns[name].items()}
    return columns


def test_results_that_do_not_belong_together_are_refused() -> None:
    vanilla = result("vanilla", 0, 0)
    for other in (
        result("ft", 0.5, 0.1, data_sha256={"train/math": "1" * 64}),
        result("ft", 0.5, 0.1, model="another"),
    ):
        with pytest.raises(MixedResultsError, match="cpu_ft_seed0"):
            summarise([vanilla, other])
    with pytest.raises(MixedResultsError, match="rates"):
        summarise([result("ft", 0, 0), result("ft", 0, 0, seed=1, rates={"learning_rate": 1.0})])


def test_a_mean_and_its_interval_are_those_of_the_sample() -> None:
    values = list(np.random.default_rng(0).normal(size=400))
    estimate = mean_estimate("any", values)
    low, high = estimate.interval
    assert estimate.value == pytest.approx(np.mean(values))
    half = 1.96 * np.std(values) / np.sqrt(len(values))
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert (low + high) / 2 == pytest.approx(estimate.value, abs=half / 5)


def test_figures_of_one_set_are_paired_and_of_two_sets_are_not() -> None:
    values = list(np.random.default_rng(1).normal(size=100))
    ours, theirs = mean_estimate("a", [v + 1 for v in values]), mean_estimate("a", values)
    assert (ours - theirs).interval == pytest.approx((1.0, 1.0))
    other = mean_estimate("b", values)
    assert np.ptp((other - theirs).draws) > 0.1


def test_nats_a_token_weigh_samples_by_their_tokens() -> None:
    estimate = ratio_estimate("a", [2.0, 30.0], [1.0, 10.0])
    assert estimate.value == pytest.approx(32 / 11)
    assert set(np.round(estimate.draws, 6)) == {2.0, round(32 / 11, 6), 3.0}
    pooled = mean_of([mean_estimate("a", [1.0]), mean_estimate("b", [0.0] * 3)], [1.0, 3.0])
    assert pooled.value == 0.25


def test_the_change_is_the_mean_over_sets_of_relative_changes() -> None:
    rows = summarise([result("vanilla", 0, 0), result("ft", 0, 0.5)])
    names = GENERAL["trained"]
    wanted = np.mean([rows["ft"].nll(n).value / rows["vanilla"].nll(n).value - 1 for n in names])
    assert rows["ft"].change(rows["vanilla"], names).value == pytest.approx(wanted)
    assert rows["vanilla"].change(rows["vanilla"], names).interval == (0.0, 0.0)


def test_the_papers_losses_are_those_of_its_scores() -> None:
    vanilla = PAPER["vanilla"]
    assert vanilla.general_loss(vanilla) == 0
    gone = (1 - 26.38 / 79.45) + 1 + (1 - 50.07 / 64.82) + (1 - 33.88 / 80.13)
    assert PAPER["ft"].general_loss(vanilla) == pytest.approx(gone / 4)
    assert PAPER["citi"].general_loss(vanilla) < PAPER["lora"].general_loss(vanilla) / 2


def test_intervals_are_the_same_in_every_process() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    before = mean_estimate("a", values).draws
    bootstrap._counts.cache_clear()  # what another process begins with
    assert np.array_equal(mean_estimate("a", values).draws, before)
