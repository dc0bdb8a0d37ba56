"""Made calls are compared with the wanted ones: values, alternatives, pairs, scores."""

from __future__ import annotations

import json

import pytest

from citi.evaluation.tool_calls import score_tool_calls

GOLD = [{"name": "f", "arguments": {"a": "1", "b": "New York"}}]


def scores(text: str, gold=None) -> tuple[float, ...]:
    score = score_tool_calls(text, GOLD if gold is None else gold)
    return score["format"], score["name"], score["arguments"], score["exact"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("API-Request: [f(a='1', b='New York')]", (1, 1, 1, 1)),
        ("API-Request: [f(b='New  York ', a=1.0)]", (1, 1, 1, 1)),
        ("API-Request: [f(a='1', b='Boston')]", (1, 1, 0.5, 0)),
        ("API-Request: [f(a='1', b='new york')]", (1, 1, 0.5, 0)),
        ("API-Request: [f(a='1')]", (1, 1, 0.5, 0)),
        ("API-Request: [f(a='1', b='New York', c='more')]", (1, 1, 1, 0)),
        ("API-Request: [g(a='1', b='New York')]", (1, 0, 0, 0)),
        ("API-Request: [f(a='1', b='New York'), g()]", (1, 0, 1, 0)),
        ("API-Request: [f(a='1', b='New York'), f(a='1', b='New York')]", (1, 0, 1, 0)),
        ("API-Request: [f(a='1', b='New York'", (0, 1, 1, 1)),
        ("I cannot do that.", (0, 0, 0, 0)),
        ("", (0, 0, 0, 0)),
    ],
)
def test_scores_of_one_wanted_call(text, expected):
    assert scores(text) == expected


@pytest.mark.parametrize(
    ("wanted", "given", "equal"),
    [
        ("3", 3, True),
        (3, 3.0, True),
        ("3.50", "3.5", True),
        ("007", "7", False),
        ("12345678901234567890", "12345678901234567891", False),
        ("True", True, True),
        (True, 1, False),
        (None, "null", True),
        ("a  b\n c", " a b c", True),
        ('"quoted"', "quoted", True),
        ("Case", "case", False),
        ("['A', 'B']", ["A", "B"], True),
        ('{"k": 1}', "{'k': '1'}", True),
        ([1, 2], [2, 1], False),
        (["A"], "A", False),
        (0.1, "0.1", True),
        ({"k": [2.675]}, "{'k': ['2.675']}", True),
        (1e300, "1e300", True),
        (0.1, "0.1000000000000000055511151231257827", False),
    ],
)
def test_values_are_equal_after_the_documented_steps_only(wanted, given, equal):
    text = "<tool_call>" + json.dumps({"name": "f", "arguments": {"a": given}}) + "</tool_call>"
    assert scores(text, [{"name": "f", "arguments": {"a": wanted}}]) == (1, 1, equal, equal)


def test_parallel_calls_have_no_order_and_pair_with_their_best_match():
    gold = [
        {"name": "f", "arguments": {"a": 1, "b": 1}},
        {"name": "f", "arguments": {"a": 2, "b": 2}},
    ]
    assert scores("[f(a=2, b=2), f(a=1, b=1)]", gold) == (1, 1, 1, 1)
    assert scores("[f(a=2, b=2), f(a=2, b=2)]", gold) == (1, 1, 0.5, 0)
    assert scores("[f(a=2, b=2)]", gold) == (1, 0, 0.5, 0)


def test_a_call_without_arguments_is_right_by_its_name():
    assert scores("[f()]", [{"name": "f", "arguments": {}}]) == (1, 1, 1, 1)
    assert scores("[f(a=1)]", [{"name": "f", "arguments": {}}]) == (1, 1, 1, 0)
    assert scores("[g()]", [{"name": "f", "arguments": {}}]) == (1, 0, 0, 0)


def test_possible_answers_accept_alternatives_and_omissions():
    gold = [{"area": {"base": [10], "unit": ["cm", "units", ""], "tags": [["a", "b"], ["c"]]}}]
    assert scores("[area(base=10, tags=['c'])]", gold) == (1, 1, 1, 1)
    assert scores("[area(base=10, tags=['a', 'b'], unit='units')]", gold) == (1, 1, 1, 1)
    assert scores("[area(base=10, tags=['a', 'b'], unit='m')]", gold) == (1, 1, 2 / 3, 0)
    assert scores("[area(base=10)]", gold) == (1, 1, 0.5, 0)


def test_possible_answers_reach_into_objects():
    gold = [{"update": {"info": [{"name": ["John"], "mail": ["a@b", ""]}], "none": []}}]
    assert scores("[update(info={'name': 'John'})]", gold) == (1, 1, 1, 1)
    assert scores("[update(info={'name': 'John', 'mail': 'a@b'})]", gold) == (1, 1, 1, 1)
    assert scores("[update(info={'name': 'Joe'})]", gold) == (1, 1, 0, 0)
    assert scores("[update(info={'name': 'John', 'age': 3})]", gold) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ({"tags": ["a", "b"]}, {"tags": "a"}),
        ({"tags": ["a", ""]}, {}),
        ([{"tags": ["a", ""]}], [{}]),
        ({"tags": ["a"]}, {"tags": "a"}),
    ],
)
def test_lists_in_ordinary_gold_are_values_and_no_alternatives(wanted, given):
    gold = [{"name": "f", "arguments": {"filter": wanted}}]
    assert scores(f"[f(filter={wanted!r})]", gold) == (1, 1, 1, 1)
    assert scores(f"[f(filter={given!r})]", gold) == (1, 1, 0, 0)


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ({"unit": ["cm", "m"]}, {"unit": "m"}),
        ({"unit": ["cm", ""], "no": [], "n": [1]}, {"n": 1}),
        ([{"unit": ["cm"]}, {"unit": ["m", "mm"]}], [{"unit": "cm"}, {"unit": "mm"}]),
        ({"in": [{"unit": ["cm", "m"]}]}, {"in": {"unit": "m"}}),
    ],
)
def test_a_possible_answers_listing_is_not_itself_a_right_value(wanted, given):
    gold = [{"f": {"a": [wanted]}}]
    assert scores(f"[f(a={given!r})]", gold) == (1, 1, 1, 1)
    assert scores(f"[f(a={json.dumps(given)!r})]", gold) == (1, 1, 1, 1)
    assert scores(f"[f(a={wanted!r})]", gold) == (1, 1, 0, 0)


def test_exactness_pairs_calls_even_where_the_first_choice_blocks():
    gold = [{"f": {"a": [1, 2]}}, {"f": {"a": [1]}}]
    assert scores("[f(a=1), f(a=2)]", gold)[3] == 1
    assert scores("[f(a=2), f(a=2)]", gold)[3] == 0


def test_where_no_call_is_wanted_any_call_is_wrong():
    assert scores("None of the available APIs can do this.", []) == (1, 1, 1, 1)
    assert scores("API-Request: [f()]", []) == (0, 0, 0, 0)


@pytest.mark.parametrize("entry", [{}, {"name": "f"}, {"f": {"a": 1}}, {"a": {}, "b": {}}])
def test_unknown_gold_is_refused_with_both_wanted_forms(entry):
    with pytest.raises(ValueError, match=r"gold: wanted .*'arguments'.* got"):
        score_tool_calls("[f()]", [entry])
