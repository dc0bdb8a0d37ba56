"""What `citi importance` prints: rankings, overlap, stability, and what was left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from importance_command_cases import Folder
from test_command_line import citi

from citi.analysis import THIRDS, jaccard_of_thirds
from citi.importance import ComponentScores
from citi.importance.ability_scores import AbilityScores
from citi.importance.stability import ranking_stability
from citi.importance.totals import ScoreTotals


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("importance summary"))


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than scoring a tiny model."""
    monkeypatch.setattr(AbilityScores, "plot", lambda scores, path: None)


@pytest.fixture(scope="module")
def said(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    output = tmp_path_factory.mktemp("summary") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AbilityScores, "plot", lambda scores, path: None)
        result = citi(*folder.words(output))
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_the_highest_and_the_lowest_components_stand_in_order(
    folder: Folder, said: list[str]
) -> None:
    scores = folder.scores()
    begins = {
        "Tool importance M_h": scores.tool_importance,
        "General importance C_h, mean of 2 abilities": {
            name: value / 2 for name, value in scores.general_importance.items()
        },
    }
    for title, shares in begins.items():
        start = said.index(title)
        rows = [line.split() for line in said[start : start + 26] if "model.layers" in line]
        order = sorted(shares, key=shares.__getitem__, reverse=True)
        wanted = list(enumerate(order, start=1))
        wanted = wanted[:10] + wanted[-10:]
        assert [(int(row[0]), row[1]) for row in rows] == wanted
        for row in rows:
            assert float(row[2]) == pytest.approx(100 * shares[row[1]], rel=6e-3)


def test_the_overlap_is_the_analysis_own(folder: Folder, said: list[str]) -> None:
    overlap = jaccard_of_thirds(folder.scores().abilities)
    rows = {line[:13].strip(): line[13:].split() for line in said if " and " in line[:13]}
    assert set(rows) == {"tool and math", "tool and chat", "math and chat"}
    for pair, values in rows.items():
        key = tuple(pair.split(" and "))
        assert values == [f"{getattr(overlap, third)[key]:.2f}" for third in THIRDS]
    assert [f"{overlap.random[third]:.2f}" for third in THIRDS] == next(
        line.split()[1:] for line in said if line.split()[:1] == ["chance"]
    )


def test_the_stability_is_that_of_the_scores(folder: Folder, said: list[str]) -> None:
    start = said.index("How well two scorings agree on the most important components")
    rows = [line.split() for line in said[start + 1 :] if line.startswith(("tool ", "math "))]
    for name, scores in list(folder.scores().abilities.items())[:2]:
        found = ranking_stability(scores)
        assert [row[1:] for row in rows if row[0] == name] == [
            [str(a.num_batches), *(f"{n:.2f}" for n in (a.mean, a.low, found.chance))]
            for a in found.agreements
        ]
        assert f"{name}: {found.sentence}." in said


def test_counts_and_what_is_not_scored_are_said(folder: Folder, said: list[str]) -> None:
    tool = folder.scores().tool
    assert (
        f"tool: 9 samples, {tool.num_tokens} tokens, {tool.num_answer_tokens} of them answers"
    ) in said
    assert "not scored: lm_head: output head" in said


def test_skipped_batches_and_components_that_score_0_are_said_with_the_reason(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    original = ScoreTotals.scores

    def scores(totals: ScoreTotals, skipped: object) -> ComponentScores:
        totals.num_empty, totals.num_nonfinite = 2, 1
        totals.ran -= {shape.name for shape in totals.shapes[:5]}
        totals.reached -= {totals.shapes[7].name}
        return original(totals, skipped)

    monkeypatch.setattr(ScoreTotals, "scores", scores)
    said = citi(*folder.words(tmp_path / "x", general=[])).stdout.splitlines()
    assert "tool: 2 of 12 batches skipped: no answer tokens" in said
    assert "tool: 1 of 12 batches skipped: a NaN or infinite loss or score" in said
    names = list(folder.scores(general=[]).tool)
    assert (
        f"tool: {', '.join(names[:3])} and 2 more: scores 0: it never ran on these batches"
    ) in said
    assert f"tool: {names[7]}: scores 0: it ran, but no gradient reached it" in said
    assert not [line for line in said if line.startswith("tool: lm_head")]
