"""Confidence intervals by bootstrap over samples, paired between rows.

An `Estimate` is a figure with its value on each of 2,000 resamples of the samples behind it. All
figures of one set come from the same resamples, whatever the row, so that a difference or a ratio
of two rows is paired by being computed resample by resample. Sets are resampled independently.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure and its bootstrap distribution.

    Attributes:
        value: On the samples as they are.
        draws: On each resample.
    """

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % percentile interval."""
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return float(low), float(high)

    def __add__(self, other: Estimate | float) -> Estimate:
        value, draws = _parts(other)
        return Estimate(self.value + value, self.draws + draws)

    def __sub__(self, other: Estimate | float) -> Estimate:
        value, draws = _parts(other)
        return Estimate(self.value - value, self.draws - draws)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.draws * factor)

    def __truediv__(self, other: Estimate | float) -> Estimate:
        value, draws = _parts(other)
        return Estimate(self.value / value, self.draws / draws)


def mean_estimate(name: str, values: Sequence[float]) -> Estimate:
    """The mean over the samples of set `name`."""
    return ratio_estimate(name, values, [1.0] * len(values))


def ratio_estimate(name: str, above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Σ above / Σ below over the samples of set `name`: nats over tokens.

    Args:
        name: Of the set; sets of one name and length share their resamples.
        above, below: One value a sample.
    Raises:
        ValueError: No samples, or lengths that differ.
    """
    if not above or len(above) != len(below):
        raise ValueError(
            f"{name}: wanted as many values as weights, got {len(above)}, {len(below)}"
        )
    counts = _counts(name, len(above))
    numerator, denominator = np.asarray(above, float), np.asarray(below, float)
    draws = (counts @ numerator) / np.maximum(counts @ denominator, 1e-12)
    return Estimate(float(numerator.sum() / denominator.sum()), draws)


def mean_of(estimates: Sequence[Estimate], weights: Sequence[float] | None = None) -> Estimate:
    """The mean of figures; weighted where `weights` are given."""
    weights = weights or [1.0] * len(estimates)
    total = sum(weights)
    value = sum(e.value * w for e, w in zip(estimates, weights, strict=True)) / total
    draws = sum(e.draws * w for e, w in zip(estimates, weights, strict=True)) / total
    return Estimate(value, draws)


def _parts(other: Estimate | float) -> tuple[float, np.ndarray | float]:
    return (other.value, other.draws) if isinstance(other, Estimate) else (other, other)


@functools.lru_cache(maxsize=64)
def _counts(name: str, num_samples: int) -> np.ndarray:
    """(NUM_RESAMPLES, num_samples): how often each resample takes each sample."""
    generator = np.random.default_rng([zlib.crc32(name.encode()), num_samples])
    even = np.full(num_samples, 1 / num_samples)
    return generator.multinomial(num_samples, even, size=NUM_RESAMPLES).astype(float)
