"""How many samples are enough: would a second scoring choose the same components?

B batches scored, C components, R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from citi.analysis import chance_jaccard
from citi.importance.component_scores import ComponentScores, divisors_by_batch
from citi.shares import num_most

MIN_BATCHES = 8
SMALLEST_SCORING = 4
_LOW_QUANTILE = 0.05


@dataclass(frozen=True)
class Agreement:
    """How far pairs of independent scorings of `num_batches` batches choose the same components.

    Attributes:
        num_batches: of one scoring.
        mean: Jaccard index of the two choices, mean over the pairs.
        low: its 5 % quantile: of twenty pairs, one agrees less.
    """

    num_batches: int
    mean: float
    low: float


@dataclass(frozen=True)
class RankingStability:
    """What `ranking_stability` finds.

    Attributes:
        agreements: by growing number of batches; the last is that of all batches.
        chance: the mean index of two random choices.
        share: of the components that is chosen.
        wanted: the mean agreement that counts as enough.
        unit: what a batch is: "samples" if each held one, else "batches".
    """

    agreements: tuple[Agreement, ...]
    chance: float
    share: float
    wanted: float
    unit: str

    @property
    def enough(self) -> int | None:
        """The smallest number of batches whose mean agreement is as wanted; None if none is."""
        return next((a.num_batches for a in self.agreements if a.mean >= self.wanted), None)

    @property
    def sentence(self) -> str:
        """Whether the samples were enough, in one sentence without a full stop."""
        found = {each.num_batches: each.mean for each in self.agreements}
        number = self.enough or self.agreements[-1].num_batches
        verdict = "are enough" if self.enough else "are not enough"
        mean = found[number]
        if not self.enough:
            # Rounded down: what misses the mark must not read as if it had reached it.
            mean = math.floor(100 * mean) / 100
        words = (
            f"{number} {self.unit} {verdict}: two scorings of {number} agree on {mean:.2f} of the "
            f"top {100 * self.share:g} %"
        )
        return words if self.enough else f"{words} ({self.wanted:.2f} wanted); score more samples"


def ranking_stability(
    scores: ComponentScores,
    *,
    share: float = 0.20,
    wanted: float = 0.90,
    num_resamples: int = 200,
    seed: int = 0,
) -> RankingStability:
    """Estimate how well two scorings of n batches agree on the most important components.

        J(n) = mean of |top(S) and top(S')| / |top(S) or top(S')|

    over pairs S, S' of independent bootstrap resamples (n of the scored batches, drawn with
    replacement), for n = 4, 8, 16 … and all batches; top(S) is the share that `citi.make_plan`
    would choose by the scores of S alone, rounding and ties included. The unit is a batch: one
    sample where batches hold one.

    All resamples come from the batches that were scored, which favours agreement: of pure noise,
    two scorings of n out of N batches correlate by n / (N + n) instead of 0. In simulations J is
    too high by less than 0.01 where it is near 0.9, and by up to 0.2 where it is near 0.3.

    Args:
        scores: of one ability, with what every batch added to them.
        share: of all components, chosen by the highest score.
        wanted: the mean agreement that counts as enough.
        num_resamples: pairs for every n.
        seed: of the draws.

    Returns:
        the agreement for every n, what chance gives, and the smallest n that is enough.

    Raises:
        ValueError: element scores, which keep no scores by batch; fewer than eight batches; a share
            that chooses none or all of the components; no resamples.

    Source: ours; the paper scores 3,000 samples and does not say whether fewer would do.
    """
    obstacle = stability_obstacle(scores, share)
    if obstacle is not None:
        raise ValueError(obstacle)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    num_batches, num_components = scores.by_batch.shape
    num_chosen = num_most(num_components, share)
    by_name = sorted(range(num_components), key=list(scores).__getitem__)
    partials_BC = scores.by_batch.double()[:, by_name]
    divisors_BC = divisors_by_batch(scores.estimator, list(scores), scores.batch_counts)[:, by_name]
    generator = torch.Generator().manual_seed(seed)
    agreements = []
    for size in _sizes(num_batches):
        draws = torch.randint(num_batches, (2 * num_resamples, size), generator=generator)
        counts_RB = torch.zeros(2 * num_resamples, num_batches, dtype=torch.float64)
        counts_RB.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
        scores_RC = (counts_RB @ partials_BC) / (counts_RB @ divisors_BC)
        agreements.append(_agreement(size, _top(scores_RC, num_chosen)))
    return RankingStability(
        agreements=tuple(agreements),
        chance=chance_jaccard(num_components, num_chosen),
        share=share,
        wanted=wanted,
        unit="samples" if (scores.batch_counts[:, 0] == 1).all() else "batches",
    )


def stability_obstacle(scores: ComponentScores, share: float = 0.20) -> str | None:
    """Why `ranking_stability` cannot judge these scores; None if it can."""
    num_batches, num_components = len(scores.by_batch), len(scores)
    if scores.granularity == "element":
        return (
            "scores must be of components, rows, columns or heads, got elements, which keep no "
            "scores by batch; score with another granularity"
        )
    if num_batches < MIN_BATCHES:
        return (
            f"scores must hold at least {MIN_BATCHES} scored batches, got {num_batches}; score "
            "more samples"
        )
    if not (0 < share < 1 and 0 < num_most(num_components, share) < num_components):
        return f"share must choose some of {num_components} components, not all, got {share!r}"
    return None


def _sizes(num_batches: int) -> list[int]:
    sizes = []
    size = SMALLEST_SCORING
    while size < num_batches:
        sizes.append(size)
        size *= 2
    return [*sizes, num_batches]


def _top(scores_RC: Tensor, num_chosen: int) -> Tensor:
    """(R, C) bool, the highest of every row; of equals, the later columns."""
    order = scores_RC.argsort(dim=1, stable=True)
    return torch.zeros_like(scores_RC, dtype=torch.bool).scatter_(1, order[:, -num_chosen:], True)


def _agreement(size: int, chosen_RC: Tensor) -> Agreement:
    first, second = chosen_RC.chunk(2)
    indices = (first & second).sum(1).double() / (first | second).sum(1)
    return Agreement(size, indices.mean().item(), indices.quantile(_LOW_QUANTILE).item())
