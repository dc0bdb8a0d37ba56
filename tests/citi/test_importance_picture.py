"""The heat map of heads: a row per layer, a column per head, shares of the whole model's total."""

from __future__ import annotations

import pytest
from test_scores import samples

from citi.importance.ability_scores import AbilityScores
from citi.importance.picture import head_grid
from citi.importance.score_components import score_components
from tiny import tiny_model, tiny_tokenizer


def test_every_head_has_a_column_and_the_first_bears_the_projections_name() -> None:
    shares = {
        f"model.layers.{layer}.{path}": [0.01 * (layer + 1) * (head + 1) for head in range(number)]
        for layer in (0, 1)
        for path, number in (("attn.q", 3), ("attn.k", 1), ("attn.o", 3), ("mlp.up", 1))
    }
    rows, columns, percents = head_grid(shares)
    assert rows == ["0", "1"]
    assert columns == ["q", "", "", "k", "o", "", ""], "k has one head, mlp has none"
    assert percents[0] == pytest.approx([1, 2, 3, 1, 1, 2, 3])
    assert percents[1] == pytest.approx([2, 4, 6, 2, 2, 4, 6])


def test_where_no_module_has_two_heads_all_components_are_drawn() -> None:
    shares = {"layers.0.attn.q": [0.25], "layers.0.mlp.up": [0.75]}
    assert head_grid(shares) == (["0"], ["q", "up"], [[25, 75]])


@pytest.fixture(scope="module")
def scores() -> AbilityScores:
    return score_components(
        tiny_model(),
        tiny_tokenizer(),
        tool=samples("tool", 2),
        general={"math": samples("math", 2), "chat": samples("chat", 2)},
        granularity="head",
    )


def test_heads_share_their_components_importance(
    scores: AbilityScores, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr(
        "citi.importance.picture.draw_head_importance", lambda path, panels: drawn.update(panels)
    )
    scores.plot("x.png")
    general = {name: value / 2 for name, value in scores.general_importance.items()}
    for kind, importance in {"tool": scores.tool_importance, "general": general}.items():
        assert list(drawn[kind]) == list(importance)
        for name, share in importance.items():
            assert sum(drawn[kind][name]) == pytest.approx(share, rel=1e-12)
    name = "model.layers.0.self_attn.q_proj"
    entries = scores.tool.entries[name].flatten()
    assert len(drawn["tool"][name]) == 4
    assert drawn["tool"][name][1] / drawn["tool"][name][0] == pytest.approx(
        (entries[1] / entries[0]).item()
    )


def test_the_picture_of_heads_is_another_one_and_is_stable(scores: AbilityScores, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    scores.plot(tmp_path / "a.svg")
    scores.plot(tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert text.count("importance of heads") == 2
