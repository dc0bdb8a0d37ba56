"""General answers are judged by their final number or by holding an accepted answer."""

from __future__ import annotations

import pytest

from citi.data.sample import Message, Sample
from citi.evaluation.exact_match import is_right


def make_sample(**meta) -> Sample:
    return Sample("1", 0, "math", (Message("user", "?"), Message("assistant", "!")), meta=meta)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3 + 15 = 18\n#### 18\nThe answer is: 18", True),
        ("The answer is: 18", True),
        ("the answer is $18.00.", True),
        ("The answer is: **18**", True),
        ("#### 18 eggs, from 4 hens", True),
        ("She makes 9 * 2 = 18 dollars", True),
        ("The answer is: 17. Not 18", False),
        ("16 - 3 = 13", False),
        ("The answer is: -18", False),
        ("The answer is: 1,800", False),
        ("eighteen", False),
        ("", False),
    ],
)
def test_arithmetic_is_judged_by_the_final_number(text, right):
    assert is_right(text, make_sample(answer="18")) is right


def test_numbers_compare_by_value():
    assert is_right("The answer is: 1,234,567.50", make_sample(answer="1234567.5"))
    assert is_right("#### -3", make_sample(answer="-3"))
    assert is_right("#### .5", make_sample(answer="0.5"))
    assert is_right("#### 7", make_sample(answer=7))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("It is the Octopussy film.", True),
        ("OCTOPUSSY!", True),
        ("Kamal   Khan plays in it", True),
        ("It is Octopussycat", False),
        ("No idea", False),
        ("", False),
    ],
)
def test_knowledge_is_judged_by_whole_words_of_any_accepted_answer(text, right):
    assert is_right(text, make_sample(answers=["Octopussy", "The Kamal-Khan", "!"])) is right


def test_an_accepted_answer_of_articles_alone_is_never_found():
    assert is_right("the answer", make_sample(answers=["The", ""])) is False


@pytest.mark.parametrize(
    "meta", [{}, {"answers": []}, {"answer": "a story"}, {"test": "assert f()"}]
)
def test_without_something_to_compare_with_there_is_no_verdict(meta):
    assert is_right("18", make_sample(**meta)) is None


@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_what_was_thought_is_not_the_answer(opening):
    thought = f"{opening}The answer is: 17, as Octopussy would say.\n</think>\n\n"
    assert is_right(thought + "It is 18.", make_sample(answer="18"))
    assert not is_right(thought + "It is 18.", make_sample(answer="17"))
    assert not is_right(thought + "Moonraker", make_sample(answers=["Octopussy"]))
    assert is_right(thought + "Moonraker", make_sample(answers=["Moonraker"]))
    assert not is_right("<think>Is it 18", make_sample(answer="18"))
