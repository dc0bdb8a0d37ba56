"""What scoring one ability gives: a score per component, and finer ones where asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from citi.components import SkippedModule, split_layer


def _no_batches() -> Tensor:
    return torch.zeros(0, 0, dtype=torch.float64)


@dataclass(frozen=True)
class ComponentScores(Mapping[str, float]):
    """Importance of every component, as a mapping from full module name to a float64.

    Attributes:
        scores: the mapping itself, in the order of the model's modules: sums of the entries.
        estimator: "token", "batch" or "parameter".
        num_samples: sequences with at least one answer token that were scored.
        num_tokens: their real tokens.
        num_answer_tokens: the answer tokens among them that the loss counts.
        num_batches: batches that were scored.
        num_empty_batches: batches skipped because all their labels were masked.
        num_nonfinite_batches: batches skipped because of a NaN or infinite loss or score.
        skipped: modules that are not scored, and components that score 0 because they were not
            used, each with its reason.
        granularity: "component", "row", "column", "head" or "element".
        entries: component name -> its score by rows and columns, (P, Q) fp64 (fp32 or bf16 for
            elements); empty for granularity "component".
        by_batch: (num_batches, components) fp64, what every batch added to the scores, undivided;
            empty for elements. See `citi.importance.stability`.
        batch_counts: (num_batches, 3) int64, samples, tokens and answer tokens of every batch.
    """

    scores: dict[str, float]
    estimator: str
    num_samples: int
    num_tokens: int
    num_answer_tokens: int
    num_batches: int
    num_empty_batches: int
    num_nonfinite_batches: int
    skipped: tuple[SkippedModule, ...]
    granularity: str = "component"
    entries: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    by_batch: Tensor = field(default_factory=_no_batches, compare=False, repr=False)
    batch_counts: Tensor = field(
        default_factory=lambda: torch.zeros(0, 3, dtype=torch.int64), compare=False, repr=False
    )

    def __getitem__(self, name: str) -> float:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def num_skipped_batches(self) -> int:
        """Batches that were not scored, for either reason."""
        return self.num_empty_batches + self.num_nonfinite_batches


def divisors_by_batch(estimator: str, names: Sequence[str], batch_counts: Tensor) -> Tensor:
    """(B, C) fp64: what each batch adds to the divisor of each component's score.

    For `token`, answer tokens in the last decoder layer and predictions elsewhere; 1 for others.
    """
    num_samples, num_tokens, num_answers = batch_counts.double().unbind(1)
    if estimator != "token":
        return torch.ones(len(batch_counts), len(names), dtype=torch.float64)
    layers = [split_layer(name)[0] for name in names]
    last = max((layer for layer in layers if layer is not None), default=None)
    is_last = torch.tensor([layer is not None and layer == last for layer in layers])
    return torch.where(is_last, num_answers[:, None], (num_tokens - num_samples)[:, None])
