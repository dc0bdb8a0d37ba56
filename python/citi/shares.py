"""How many of a ranking a share chooses, as the authors round it."""

from __future__ import annotations

_DIGITS = 9  # what a product of floats is sure of: (1 - 0.9) * 10 is 0.9999999999999998


def num_least(num_ranked: int, share: float) -> int:
    """int(share * n): of the least important."""
    return int(round(share * num_ranked, _DIGITS))


def num_most(num_ranked: int, share: float) -> int:
    """n - int((1 - share) * n): of the most important."""
    return num_ranked - int(round((1 - share) * num_ranked, _DIGITS))
