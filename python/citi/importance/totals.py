"""What has been summed so far over the batches of one ability: fp64, on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from citi.components import SkippedModule
from citi.importance.component_scores import ComponentScores, divisors_by_batch
from citi.importance.granularity import ScoredComponent


class BatchCounts(NamedTuple):
    """What one micro-batch holds: sequences that count, their tokens, and their answer tokens."""

    num_samples: int
    num_tokens: int
    num_answers: int


class ScoreTotals:
    """The accumulators of one scoring pass, and what can be done with them: add, save, join.

    Args:
        shapes: of the scores, from `score_shapes`.
        estimator, granularity: of the pass.
        element_dtype: of the element buffers, fp32 or bf16.
    """

    def __init__(
        self,
        shapes: Sequence[ScoredComponent],
        estimator: str,
        granularity: str,
        element_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shapes, self.estimator, self.granularity = list(shapes), estimator, granularity
        self.element_dtype = element_dtype
        self.sizes = [1 if each.by == "elements" else each.num_entries for each in self.shapes]
        self.sums = torch.zeros(sum(self.sizes), dtype=torch.float64)
        self.elements: dict[str, Tensor] = {}
        self.by_batch: list[Tensor] = []
        self.counts: list[BatchCounts] = []
        self.num_empty = self.num_nonfinite = 0
        self.is_whole = True
        self.ran: set[str] = set()
        self.reached: set[str] = set()

    @property
    def num_seen(self) -> int:
        """Batches that were looked at, scored or not."""
        return len(self.counts) + self.num_empty + self.num_nonfinite

    @property
    def num_tokens(self) -> int:
        return sum(counts.num_tokens for counts in self.counts)

    def element_buffer(self, scored: ScoredComponent, device: torch.device) -> Tensor:
        """Where this component's elements are summed; zeros at first."""
        if scored.name not in self.elements:
            self.elements[scored.name] = torch.zeros(scored.shape, dtype=self.element_dtype)
        # Moved once; a buffer that was read from a file starts on the host.
        self.elements[scored.name] = self.elements[scored.name].to(device)
        self.is_whole = False
        return self.elements[scored.name]

    def add(self, partials: Tensor, counts: BatchCounts) -> None:
        """One batch's partial scores, (sum of sizes,) fp64 on the host, none negative."""
        self.is_whole = False
        self.sums = self.sums + partials  # not in place: it may be an inference tensor
        of_components = [part.sum() for part in partials.split(self.sizes)]
        self.by_batch.append(torch.stack(of_components))
        self.counts.append(counts)
        self.is_whole = True

    def add_nonfinite(self) -> None:
        """One batch that is skipped."""
        self.num_nonfinite += 1
        self.is_whole = True

    def joined(self, group: torch.distributed.ProcessGroup | None) -> ScoreTotals:
        """Those of all processes of the group, added in the order of ranks: the same on each."""
        mine = {
            "sums": self.sums,
            "by_batch": self.by_batch,
            "counts": self.counts,
            "skipped": (self.num_empty, self.num_nonfinite),
            "used": (self.ran, self.reached),
        }
        theirs: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(theirs, mine, group=group)
        whole = ScoreTotals(self.shapes, self.estimator, self.granularity, self.element_dtype)
        for each in theirs:
            whole.sums += each["sums"]
            whole.by_batch += each["by_batch"]
            whole.counts += [BatchCounts(*counts) for counts in each["counts"]]
            whole.num_empty += each["skipped"][0]
            whole.num_nonfinite += each["skipped"][1]
            whole.ran |= each["used"][0]
            whole.reached |= each["used"][1]
        whole.elements = self._joined_elements(group)
        return whole

    def _joined_elements(self, group: torch.distributed.ProcessGroup | None) -> dict[str, Tensor]:
        if self.granularity != "element":
            return {}
        # NCCL adds on its own device alone, gloo on the CPU.
        is_nccl = torch.distributed.get_backend(group) == "nccl"
        device = torch.accelerator.current_accelerator() if is_nccl else torch.device("cpu")
        joined = {}
        for scored in self.shapes:
            total = torch.zeros(scored.shape, dtype=torch.float32, device=device)
            if scored.name in self.elements:
                total.copy_(self.elements[scored.name])
            torch.distributed.all_reduce(total, group=group)
            joined[scored.name] = total.to(self.element_dtype)
        return joined

    def scores(self, skipped: Sequence[SkippedModule]) -> ComponentScores:
        """The scores, divided as their estimator says.

        Raises: ValueError if no batch was scored.
        """
        if not self.counts:
            raise ValueError(
                "batches must hold at least one that can be scored, got "
                f"{self.num_empty} without answer tokens (labels all -100) and "
                f"{self.num_nonfinite} with a NaN or infinite loss or score"
            )
        counts = torch.tensor(self.counts, dtype=torch.int64)
        divided = self._divided(counts)
        is_element = self.granularity == "element"
        num_samples, num_tokens, num_answers = counts.sum(0).tolist()
        return ComponentScores(
            scores={name: _total(entries) for name, entries in divided.items()},
            estimator=self.estimator,
            num_samples=num_samples,
            num_tokens=num_tokens,
            num_answer_tokens=num_answers,
            num_batches=len(self.counts),
            num_empty_batches=self.num_empty,
            num_nonfinite_batches=self.num_nonfinite,
            skipped=(*skipped, *self._unused()),
            granularity=self.granularity,
            entries={} if self.granularity == "component" else divided,
            by_batch=torch.zeros(0, 0) if is_element else torch.stack(self.by_batch),
            batch_counts=counts,
        )

    def _by_name(self) -> dict[str, Tensor]:
        if self.granularity == "element":
            return {each.name: self._elements_of(each) for each in self.shapes}
        parts = zip(self.shapes, self.sums.split(self.sizes), strict=True)
        return {scored.name: part.view(scored.shape) for scored, part in parts}

    def _elements_of(self, scored: ScoredComponent) -> Tensor:
        if scored.name not in self.elements:
            return torch.zeros(scored.shape, dtype=self.element_dtype)
        return self.elements[scored.name].cpu()

    def _divided(self, counts: Tensor) -> dict[str, Tensor]:
        by_name = self._by_name()
        if self.estimator != "token":
            return {name: entries.clone() for name, entries in by_name.items()}
        divisors = divisors_by_batch(self.estimator, list(by_name), counts).sum(0).tolist()
        pairs = zip(by_name.items(), divisors, strict=True)
        return {name: entries / divisor for (name, entries), divisor in pairs}

    def _unused(self) -> Iterator[SkippedModule]:
        for scored in self.shapes:
            if scored.name not in self.ran:
                yield SkippedModule(scored.name, "scores 0: it never ran on these batches")
            elif scored.name not in self.reached:
                yield SkippedModule(scored.name, "scores 0: it ran, but no gradient reached it")

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All of it, as JSON types and as tensors."""
        described = {
            "num_empty": self.num_empty,
            "num_nonfinite": self.num_nonfinite,
            "ran": sorted(self.ran),
            "reached": sorted(self.reached),
        }
        num_components = len(self.shapes)
        by_batch = torch.stack(self.by_batch) if self.by_batch else torch.zeros(0, num_components)
        tensors = {
            "sums": self.sums,
            "by_batch": by_batch.double(),
            "counts": torch.tensor(self.counts, dtype=torch.int64).view(-1, 3),
        }
        return described, tensors | {f"elements.{k}": v.cpu() for k, v in self.elements.items()}

    def restore(self, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`. Raises: KeyError, ValueError for a state of something else."""
        if tensors["sums"].shape != self.sums.shape:
            raise ValueError(
                f"sums must have {len(self.sums)} entries, got {tuple(tensors['sums'].shape)}"
            )
        self.sums = tensors["sums"].clone()
        self.by_batch = list(tensors["by_batch"])
        self.counts = [BatchCounts(*row) for row in tensors["counts"].tolist()]
        self.num_empty, self.num_nonfinite = described["num_empty"], described["num_nonfinite"]
        self.ran, self.reached = set(described["ran"]), set(described["reached"])
        self.elements = {
            key.removeprefix("elements."): tensor.clone()
            for key, tensor in tensors.items()
            if key.startswith("elements.")
        }


def _total(entries: Tensor) -> float:
    """In fp64: a lone entry is handed out as it is."""
    return entries.sum(dtype=torch.float64).item()
