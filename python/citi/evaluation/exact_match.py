"""Whether a general answer is right: by its final number, or by holding an accepted answer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal

from citi.data.sample import Sample
from citi.evaluation.thoughts import without_thoughts

_SIGN = r"(?:(?<![\w)])-)?\$?"
_NUMBER = rf"{_SIGN}(?:(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"(?:####|[Tt]he (?:final )?answer is:?)[^\d\n.-]{{0,20}}({_NUMBER})")
_ANY = re.compile(_NUMBER)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def is_right(answer: str, sample: Sample) -> bool | None:
    """Judges a generated answer by what the sample's meta holds.

    Args:
        answer: the generated text; thoughts (`<think>...</think>`) in it are not judged.
        sample: `meta.answers` (a list of accepted answers: knowledge) or `meta.answer` (a number:
            arithmetic) says what is right.

    Returns:
        True or False; None where meta holds neither, so that there is nothing to compare with.
    """
    answer = without_thoughts(answer)
    accepted = sample.meta.get("answers")
    if isinstance(accepted, (list, tuple)) and accepted:
        return holds_any(answer, accepted)
    wanted = final_number(str(sample.meta.get("answer", "")))
    return None if wanted is None else final_number(answer) == wanted


def final_number(text: str) -> Decimal | None:
    """The number after the last `####` or "The answer is:", else the last number of the text.

    Thousands separators and dollar signs are dropped; 18 equals 18.00.
    """
    marked = _MARKED.findall(text)
    found = marked or _ANY.findall(text)
    return Decimal(re.sub(r"[$,]", "", found[-1])) if found else None


def holds_any(text: str, accepted: Iterable[object]) -> bool:
    """Whether the text holds one of the accepted answers as whole words.

    Both sides are normalised as SQuAD does: lower case, no punctuation, no articles, single blanks.
    """
    words = f" {_normalised(text)} "
    return any(f" {alias} " in words for alias in map(_normalised, map(str, accepted)) if alias)


def _normalised(text: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in text.lower())
    return " ".join(_ARTICLES.sub(" ", words).split())
