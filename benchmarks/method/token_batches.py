"""Micro-batches of a number of tokens: what makes the budgets of unlike data equal.

A tool sample is several times as long as a general one. Rows that trained on equal numbers of
samples would train on unequal numbers of tokens, so micro-batches are cut by tokens here:

    batch k takes samples until the tokens of batches 0 … k are at least (k + 1) · batch_tokens

No batch is empty while batch_tokens is at least the longest sample, and all batches together lie
above their budget by less than one sample.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from citi.data import Collator


def cut_batches(
    lengths: Sequence[int], *, num_batches: int, batch_tokens: int, seed: int
) -> list[list[int]]:
    """Indices of samples, batch by batch, over as many shuffled passes as it takes.

    Args:
        lengths: Tokens of each sample, none more than `batch_tokens`.
        num_batches: How many.
        batch_tokens: Tokens of a batch, on average.
        seed: Of the passes' orders.
    Raises:
        ValueError: No sample, or one that is longer than `batch_tokens`.
    """
    if not lengths or max(lengths) > batch_tokens:
        longest = max(lengths, default=0)
        raise ValueError(
            f"lengths: wanted samples of at most batch_tokens ({batch_tokens}) tokens, got "
            f"{len(lengths)}, the longest of {longest}"
        )
    batches: list[list[int]] = []
    taken, num_passes, order = 0, 0, []
    while len(batches) < num_batches:
        batch = []
        while taken < (len(batches) + 1) * batch_tokens:
            if not order:
                order = list(range(len(lengths)))
                random.Random(f"{seed}/{num_passes}").shuffle(order)
                num_passes += 1
            batch.append(order.pop())
            taken += lengths[batch[-1]]
        batches.append(batch)
    return batches


class TokenBatches(Dataset):
    """A data set whose items are whole micro-batches.

    Args:
        items: What `RenderedDataset` gives, by index.
        batches: What `cut_batches` gives, or a part of it.
    """

    def __init__(self, items: Sequence[Mapping], batches: Sequence[Sequence[int]]) -> None:
        self._items = items
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[Mapping]:
        return [self._items[each] for each in self._batches[index]]

    @property
    def num_tokens(self) -> int:
        return sum(len(item["input_ids"]) for batch in self for item in batch)

    @property
    def num_answer_tokens(self) -> int:
        return sum(label >= 0 for batch in self for item in batch for label in item["labels"])

    def __iter__(self):
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class BatchCollator:
    """Pads the one micro-batch that a step of the data loader fetches."""

    pad_token_id: int

    def __call__(self, batches: Sequence[Sequence[dict]]) -> dict[str, Tensor]:
        """Raises: ValueError unless the loader's batch size is 1."""
        if len(batches) != 1:
            raise ValueError(f"batch_size: wanted 1 with TokenBatches, got {len(batches)}")
        return Collator(self.pad_token_id)(batches[0])


def stage_steps(shares: Mapping[str, float], steps: int) -> dict[str, range]:
    """Stage → its optimizer steps, in proportion to the shares; together all of `steps`.

    Raises:
        ValueError: A stage would get none.
    """
    total, done, ranges, start = sum(shares.values()), 0.0, {}, 0
    for name, share in shares.items():
        done += share
        end = round(steps * done / total)
        ranges[name] = range(start, end)
        start = end
    if any(not steps_of for steps_of in ranges.values()):
        raise ValueError(f"steps: {steps} are too few for stages of shares {dict(shares)}")
    return ranges
