"""ROUGE-L of a response, as rouge-score computes it."""

from __future__ import annotations

from typing import Any

NO_ROUGE = "ROUGE-L of responses needs rouge-score: pip install 'citi-kernels[eval]'"


def rouge_l(wanted: str, given: str) -> float:
    """F measure of the longest common subsequence of words, 0 to 1, without stemming.

    Args:
        wanted: The reference.
        given: The generated response.
    Raises:
        ImportError: rouge-score is missing; the message has the line that installs it.
    """
    return _scorer().score(wanted, given)["rougeL"].fmeasure


def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(NO_ROUGE) from error
    return RougeScorer(["rougeL"], use_stemmer=False)
