"""ROUGE-L of a response, as rouge-score computes it, in any script."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

NO_ROUGE = "ROUGE-L of responses needs rouge-score: pip install 'citi-kernels[eval]'"

# Chinese characters and kana stand without blanks between words.
_ALONE = re.compile(
    r"[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


class UnicodeWords:
    """Words of any script, for rouge-score, whose own tokenizer keeps a-z and 0-9 alone.

    Lower case; runs of letters, numbers and the marks on them are words, Chinese characters and
    kana words of their own. ASCII text gives the words that rouge-score's own tokenizer gives.
    """

    def tokenize(self, text: str) -> list[str]:
        """The words of `text`, in their order."""
        text = unicodedata.normalize("NFC", text).lower()
        words = "".join(map(_as_word_part, text)).split()
        return [word for word in words if any(map(str.isalnum, word))]


def rouge_l(wanted: str, given: str) -> float:
    """F measure of the longest common subsequence of words, 0 to 1, without stemming.

    Args:
        wanted: The reference.
        given: The generated response.
    Raises:
        ImportError: rouge-score is missing; the message has the line that installs it.
    """
    return _scorer().score(wanted, given)["rougeL"].fmeasure


def _as_word_part(character: str) -> str:
    if _ALONE.match(character):
        return f" {character} "
    return character if unicodedata.category(character)[0] in "LMN" else " "


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(NO_ROUGE) from error
    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=UnicodeWords())
