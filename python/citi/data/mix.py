"""The training mix: all of the tool data and a share of each general ability."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from citi.data.sample import Sample


def mix(
    tool: Sequence[Sample],
    general: Mapping[str, Sequence[Sample]],
    *,
    per_general: int | None,
    seed: int,
) -> list[Sample]:
    """The whole tool set and `per_general` samples of each general set, shuffled.

    The choice from one set depends on the seed, the set's name and its samples only, so another
    set may come or go without changing it (arXiv 2409.13202 takes 5,000 of each of four sets).

    Args:
        tool: all of them are taken.
        general: name -> samples.
        per_general: samples of each set, or None for all; a smaller set is taken as a whole.
        seed: the same seed gives the same list, on every machine.
    Returns: a new list.
    """
    if per_general is not None and per_general < 0:
        raise ValueError(f"per_general must be 0 or more, or None for all, got {per_general}")
    mixed = list(tool)
    for name in sorted(general):
        samples = list(general[name])
        count = len(samples) if per_general is None else min(per_general, len(samples))
        mixed += random.Random(f"{seed}/{name}").sample(samples, count)
    random.Random(seed).shuffle(mixed)
    return mixed
