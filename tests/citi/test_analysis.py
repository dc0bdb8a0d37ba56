"""Overlap of the thirds of two rankings, and what chance would give."""

from __future__ import annotations

import random

import pytest

from citi.analysis import THIRDS, jaccard_matrix, jaccard_of_thirds, random_jaccard


def _ranking(order):
    return {name: float(rank) for rank, name in enumerate(order)}


def test_thirds_are_compared_as_sets():
    overlap = jaccard_of_thirds(
        {
            "tool": _ranking("abcdefghi"),
            "math": _ranking("abdcefghi"),
            "chat": _ranking("ihgfedcba"),
        }
    )
    assert overlap.abilities == ("tool", "math", "chat")
    assert overlap.low["tool", "math"] == pytest.approx(2 / 4)
    assert overlap.moderate["tool", "math"] == pytest.approx(2 / 4)
    assert overlap.high["tool", "math"] == 1
    assert overlap.high["tool", "chat"] == 0
    assert overlap.moderate["tool", "chat"] == 1
    for matrix in (overlap.high, overlap.moderate, overlap.low):
        assert all(matrix[row, column] == matrix[column, row] for row, column in matrix)
        assert all(matrix[name, name] == 1 for name in overlap.abilities)


def test_the_middle_takes_what_three_does_not_divide():
    overlap = jaccard_of_thirds({"a": _ranking("abcdefgh"), "b": _ranking("abdcefgh")})
    assert overlap.low["a", "b"] == 1
    assert overlap.moderate["a", "b"] == 1
    assert overlap.high["a", "b"] == 1
    assert overlap.random["moderate"] > overlap.random["high"] == overlap.random["low"]


def test_ties_are_broken_by_name():
    equal = dict.fromkeys("cabfed", 1.0)
    turned = dict.fromkeys("fedcba", 1.0)
    assert jaccard_matrix({"a": equal, "b": turned}, third="high")["a", "b"] == 1


@pytest.mark.parametrize("number", [3, 7, 30])
@pytest.mark.parametrize("third", THIRDS)
def test_random_expectation_equals_that_of_shuffled_rankings(number, third):
    generator = random.Random(0)
    names = [f"n{index:03}" for index in range(number)]
    rounds, total = 4000, 0.0
    for _ in range(rounds):
        pair = {side: _ranking(generator.sample(names, number)) for side in "ab"}
        total += jaccard_matrix(pair, third=third)["a", "b"]
    assert random_jaccard(number, third=third) == pytest.approx(total / rounds, abs=0.03)


def test_chance_for_llama_3_8b_is_a_fifth():
    assert random_jaccard(224) == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "at least one ability"),
        ({"a": {"x": 1.0, "y": 2.0}}, "at least three components"),
        ({"a": _ranking("abc"), "b": _ranking("abd")}, "others for 'b'"),
        ({"a": {**_ranking("abc"), "b": float("nan")}}, "the a score of b must be a number"),
    ],
)
def test_unusable_scores_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        jaccard_of_thirds(scores)


def test_an_unknown_third_is_named():
    with pytest.raises(ValueError, match="high, moderate, low, got 'top'"):
        jaccard_matrix({"a": _ranking("abc")}, third="top")
