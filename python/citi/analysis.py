"""Do abilities share components? The paper's overlap of the thirds of the importance ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

THIRDS = ("high", "moderate", "low")


@dataclass(frozen=True)
class ThirdsOverlap:
    """Jaccard indices of every pair of abilities, by third of the ranking.

    Attributes:
        abilities: their names, the order of rows and columns.
        high, moderate, low: (row ability, column ability) -> Jaccard index; symmetric, 1 on the
            diagonal.
        random: third -> the index that two independent random rankings have on average.
    """

    abilities: tuple[str, ...]
    high: dict[tuple[str, str], float]
    moderate: dict[tuple[str, str], float]
    low: dict[tuple[str, str], float]
    random: dict[str, float]


def jaccard_of_thirds(scores_by_ability: Mapping[str, Mapping[str, float]]) -> ThirdsOverlap:
    """Compare abilities by the components in the high, moderate and low third of their ranking.

        J(A, B) = |A and B| / |A or B|

    Args:
        scores_by_ability: ability -> component name -> importance; all of the same components, at
            least three.

    Returns:
        the indices, and what chance would give.

    Raises:
        ValueError: no ability, different components, fewer than three, or a NaN (names it).

    Source: arXiv 2409.13202, section on the importance of components.
    """
    if not scores_by_ability:
        raise ValueError("scores_by_ability must hold at least one ability, got none")
    num_components = len(next(iter(scores_by_ability.values())))
    return ThirdsOverlap(
        abilities=tuple(scores_by_ability),
        **{third: jaccard_matrix(scores_by_ability, third=third) for third in THIRDS},
        random={third: random_jaccard(num_components, third=third) for third in THIRDS},
    )


def jaccard_matrix(
    scores_by_ability: Mapping[str, Mapping[str, float]], *, third: str
) -> dict[tuple[str, str], float]:
    """Jaccard index of one third, "high", "moderate" or "low", for every pair of abilities.

    Arguments and errors as for `jaccard_of_thirds`.
    """
    _check_third(third)
    wanted = None
    members: dict[str, set[str]] = {}
    for ability, scores in scores_by_ability.items():
        wanted = set(scores) if wanted is None else wanted
        if set(scores) != wanted:
            raise ValueError(
                f"scores_by_ability must score the same components, got others for {ability!r}: "
                f"{sorted(set(scores) ^ wanted)[:3]} ..."
            )
        members[ability] = _members(ability, scores, third)
    return {
        (row, column): len(members[row] & members[column]) / len(members[row] | members[column])
        for row in members
        for column in members
    }


def random_jaccard(num_components: int, *, third: str = "high") -> float:
    """Expected Jaccard index of two independent random thirds of `num_components`.

    See `chance_jaccard`. Raises: ValueError for fewer than three components, an unknown third.
    """
    _check_third(third)
    start, end = _bounds(num_components, third)
    return chance_jaccard(num_components, end - start)


def chance_jaccard(num_components: int, num_chosen: int) -> float:
    """Expected Jaccard index of two independent random choices, 1 to all, of the components.

        Σ_i  C(k, i) C(n - k, k - i) / C(n, k) · i / (2k - i)

    with n components and k chosen.
    """
    total = math.comb(num_components, num_chosen)
    return math.fsum(
        math.comb(num_chosen, shared)
        * math.comb(num_components - num_chosen, num_chosen - shared)
        / total
        * (shared / (2 * num_chosen - shared))
        for shared in range(num_chosen + 1)
    )


def _members(ability: str, scores: Mapping[str, float], third: str) -> set[str]:
    for name, score in scores.items():
        if math.isnan(score):
            raise ValueError(f"the {ability} score of {name} must be a number, got {score}")
    order = sorted(scores, key=lambda name: (scores[name], name))
    start, end = _bounds(len(order), third)
    return set(order[start:end])


def _bounds(num_components: int, third: str) -> tuple[int, int]:
    """Slice of the ascending order; the middle takes what three does not divide."""
    size = num_components // 3
    if size == 0:
        raise ValueError(f"thirds need at least three components, got {num_components}")
    return {
        "low": (0, size),
        "moderate": (size, num_components - size),
        "high": (num_components - size, num_components),
    }[third]


def _check_third(third: str) -> None:
    if third not in THIRDS:
        raise ValueError(f"third must be one of {', '.join(THIRDS)}, got {third!r}")
