"""ROUGE-L in any script; on ASCII text it is rouge-score's own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from citi.evaluation.rouge import UnicodeWords, rouge_l

pytest.importorskip("rouge_score")


@pytest.mark.parametrize(
    "text",
    ["今天天气很好", "Сегодня солнечно", "오늘 날씨가 좋다", "आज मौसम अच्छा है", "طقس جميل اليوم"],
)
def test_identical_text_of_any_script_scores_one(text):
    assert rouge_l(text, text) == 1.0
    assert rouge_l(text, "nothing of it") == 0.0


def test_chinese_characters_and_kana_are_words_of_their_own():
    assert UnicodeWords().tokenize("GPT-4は漢字。カナ") == ["gpt", "4", *"は漢字カナ"]
    # 5 characters in common of 6 wanted and 6 given.
    assert rouge_l("今天天气很好", "今天天气很坏") == pytest.approx(5 / 6)


def test_letters_with_marks_stay_in_their_word():
    words = UnicodeWords().tokenize
    assert words("Café naïve हिन्दी don't_stop ❤️") == ["café", "naïve", "हिन्दी", "don", "t", "stop"]
    assert words("Cafe\u0301") == words("Café")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_ascii_text_has_the_words_that_rouge_score_finds(text):
    from rouge_score.tokenizers import DefaultTokenizer

    assert UnicodeWords().tokenize(text) == DefaultTokenizer(use_stemmer=False).tokenize(text)
