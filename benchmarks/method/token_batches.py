"""Micro-batches of a number of tokens: what makes the budgets of unlike data equal.

A tool sample is several times as long as a general one. Rows that trained on equal numbers of
samples would train on unequal numbers of tokens, so optimizer steps are cut by tokens here:

    step k takes samples until the tokens of steps 0 … k are at least (k + 1) · step_tokens
    step_tokens = accumulation · batch_tokens

and all steps together lie above their budget by less than one sample. The samples of a step are
then dealt out to its micro-batches by length, which leaves the step's gradient as it is and spares
padding: of the mix of tool and general data, 2 micro-batches in the order of the samples are 2.45
times the real tokens, 2 by length 1.7.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from citi.data import Collator


def cut_batches(
    lengths: Sequence[int], *, num_steps: int, accumulation: int, batch_tokens: int, seed: int
) -> list[list[int]]:
    """Indices of samples, micro-batch by micro-batch, over as many shuffled passes as it takes.

    Args:
        lengths: Tokens of each sample, none more than `batch_tokens`.
        num_steps: Optimizer steps.
        accumulation: Micro-batches of a step; none is empty.
        batch_tokens: Tokens of a micro-batch, on average.
        seed: Of the passes' orders.
    Returns:
        num_steps · accumulation micro-batches, those of a step the longest samples first.
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
    for step in range(num_steps):
        chosen = []
        while taken < (step + 1) * accumulation * batch_tokens:
            if not order:
                order = list(range(len(lengths)))
                random.Random(f"{seed}/{num_passes}").shuffle(order)
                num_passes += 1
            chosen.append(order.pop())
            taken += lengths[chosen[-1]]
        batches += _by_length(chosen, lengths, accumulation)
    return batches


def _by_length(chosen: list[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The samples of a step, sorted and cut into parts of about equal tokens.

    There are enough of them: more than (parts - 1) · batch_tokens tokens, in samples that are no
    longer than batch_tokens.
    """
    order = sorted(chosen, key=lambda index: (lengths[index], index))
    left = sum(lengths[index] for index in order)
    cut: list[list[int]] = []
    for open_parts in range(parts, 0, -1):
        part = [order.pop()]
        size = lengths[part[0]]
        while len(order) >= open_parts and size + lengths[order[-1]] / 2 <= left / open_parts:
            part.append(order.pop())
            size += lengths[part[-1]]
        left -= size
        cut.append(part)
    return cut


class TokenBatches(Dataset):
    """A data set whose items are whole micro-batches, taken in their order.

    Args:
        items: What `RenderedDataset` gives, by index.
        batches: What `cut_batches` gives, or a part of it.
    """

    shuffle = False  # an optimizer step takes the micro-batches that were cut for it

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
