"""The figures of a row, over its seeds: tool calls, what general ability changed by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.method.bootstrap import Estimate, mean_estimate, mean_of, ratio_estimate
from benchmarks.method.data_sets import EVALUATION
from benchmarks.method.row_result import WANTED_CALLS, RowResult

API_BANK = ("api_bank_lv1", "api_bank_lv3")
RESPONSES = ("responses_lv1", "responses_lv3")
UNSEEN = tuple(each.name for each in EVALUATION if each.group == "unseen")
GENERAL = {
    group: tuple(e.name for e in EVALUATION if e.task == "general" and e.group == group)
    for group in ("trained", "untrained")
}
EVERY_GENERAL = (*GENERAL["trained"], *GENERAL["untrained"])


class MixedResultsError(ValueError):
    """Results that cannot stand in one table; the message names two that differ."""


@dataclass(frozen=True)
class RowSummary:
    """A row's results, one a seed.

    Attributes:
        results: By seed.
    """

    results: tuple[RowResult, ...]

    @property
    def first(self) -> RowResult:
        return self.results[0]

    def has(self, name: str, column: str) -> bool:
        return column in self.first.samples[name]

    def values(self, name: str, column: str) -> list[float]:
        """A column of a set, each sample's mean over the seeds."""
        columns = [result.samples[name][column] for result in self.results]
        return [sum(each) / len(each) for each in zip(*columns, strict=True)]

    def share(self, name: str, column: str) -> Estimate:
        """Mean of a column of a set."""
        return mean_estimate(f"{name}/{column}", self.values(name, column))

    def pooled(self, names: Sequence[str], column: str) -> Estimate:
        """Mean of a column over the samples of several sets."""
        weights = [float(len(self.values(name, column))) for name in names]
        return mean_of([self.share(name, column) for name in names], weights)

    def calls(self, names: Sequence[str], column: str = "exact") -> Estimate:
        """Mean of a score over the samples of several sets that want calls."""
        return self._scores(names, column, lambda wanted: wanted > 0)

    def irrelevance(self, names: Sequence[str]) -> Estimate | None:
        """Share of the questions that no tool fits and that were answered without a call.

        None where the sets have no such question.
        """
        has_any = any(0 in self.values(name, WANTED_CALLS) for name in names)
        return self._scores(names, "exact", lambda wanted: wanted == 0) if has_any else None

    def _scores(
        self, names: Sequence[str], column: str, is_counted: Callable[[float], bool]
    ) -> Estimate:
        """Mean over the samples whose number of wanted calls is counted."""
        estimates, weights = [], []
        for name in names:
            counted = [float(is_counted(each)) for each in self.values(name, WANTED_CALLS)]
            if any(counted):
                pairs = zip(self.values(name, column), counted, strict=True)
                scores = [value * each for value, each in pairs]
                estimates.append(ratio_estimate(f"{name}/{column}", scores, counted))
                weights.append(sum(counted))
        return mean_of(estimates, weights)

    def nll(self, name: str) -> Estimate:
        """Nats a token of a general set's reference answers."""
        return ratio_estimate(name, self.values(name, "nll"), self.values(name, "tokens"))

    def change(self, base: RowSummary, names: Sequence[str]) -> Estimate:
        """Mean over sets of nll(row) / nll(base) - 1; above zero is forgetting."""
        return mean_of([self.nll(name) / base.nll(name) - 1.0 for name in names])

    def seed_range(self, names: Sequence[str]) -> tuple[float, float] | None:
        """The least and the greatest share of exact calls of single seeds; None for one seed."""
        if len(self.results) < 2:
            return None
        values = [RowSummary((each,)).calls(names).value for each in self.results]
        return min(values), max(values)


def summarise(results: Sequence[RowResult]) -> dict[str, RowSummary]:
    """Row → its summary.

    Args:
        results: Of one scale.
    Raises:
        MixedResultsError: They are of different data, models, sizes or configs.
    """
    by_row: dict[str, list[RowResult]] = {}
    for result in sorted(results, key=lambda each: each.seed):
        _check_alike(results[0], result)
        by_row.setdefault(result.row, []).append(result)
    for each in by_row.values():
        _check_seeds(each)
    return {row: RowSummary(tuple(each)) for row, each in by_row.items()}


def _check_alike(first: RowResult, other: RowResult) -> None:
    differing = [
        key for key in ("data_sha256", "model") if getattr(first, key) != getattr(other, key)
    ]
    if first.settings["scale"] != other.settings["scale"]:
        differing.append("scale")
    if differing:
        raise MixedResultsError(
            f"{first.file_name} and {other.file_name} differ in {', '.join(differing)}; "
            "run both again, or keep one of them"
        )


def _check_seeds(results: Sequence[RowResult]) -> None:
    first: Mapping = results[0].settings["row"]
    for other in results[1:]:
        if other.settings["row"] != first or other.rates != results[0].rates:
            raise MixedResultsError(
                f"{results[0].file_name} and {other.file_name} differ in config or rates"
            )
