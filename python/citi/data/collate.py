"""Rendered samples into a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from citi.data.render import IGNORED

_SIDES = ("right", "left")


@dataclass(frozen=True)
class Collator:
    """Pads a list of `RenderedDataset` items to one length.

    Args:
        pad_token_id: fills input_ids; padding is known by attention_mask 0, never by this id.
        padding_side: "right" or "left".
        pad_to_multiple_of: the common length is rounded up to a multiple of it.
    """

    pad_token_id: int
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in _SIDES:
            raise ValueError(f"padding_side must be one of {_SIDES}, got {self.padding_side!r}")
        if self.pad_token_id is None:
            raise ValueError(
                "pad_token_id must be an integer, got None; set tokenizer.pad_token, for example "
                "to tokenizer.eos_token"
            )

    def __call__(self, features: Sequence[dict]) -> dict[str, Tensor]:
        """B samples, S tokens of the longest.

        Returns: input_ids, attention_mask, labels (B, S) int64, labels -100 on padding;
            task_types (B,) int64, 1 = tool, 0 = general.
        """
        length = max(len(feature["input_ids"]) for feature in features)
        step = self.pad_to_multiple_of or 1
        length = -(-length // step) * step
        columns = {
            "input_ids": [self._pad(f["input_ids"], length, self.pad_token_id) for f in features],
            "attention_mask": [self._pad([1] * len(f["input_ids"]), length, 0) for f in features],
            "labels": [self._pad(f["labels"], length, IGNORED) for f in features],
            "task_types": [feature["task_type"] for feature in features],
        }
        return {name: torch.tensor(rows, dtype=torch.int64) for name, rows in columns.items()}

    def _pad(self, row: list[int], length: int, value: int) -> list[int]:
        padding = [value] * (length - len(row))
        return [*padding, *row] if self.padding_side == "left" else [*row, *padding]
