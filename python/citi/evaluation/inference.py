"""What every measurement of a model shares: its mode, its length limit and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Progress = Callable[[int, int | None, str], None]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module's own mode returns, also on an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd."""
    with evaluation_mode(model), torch.inference_mode():
        yield


def base_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT wrapper; any other model is returned as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go: the device of its first parameter."""
    return next(model.parameters()).device


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first, so that a lack of memory shows at once.

    Raises:
        ValueError: `batch_size` is less than one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(
    rows: Sequence[Sequence[int]], fill: int, *, side: Literal["left", "right"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one batch, filled up to the longest.

    Returns:
        values: (B, S) int64.
        mask: (B, S) int64, 1 on the rows' own entries.
    """
    width = max(len(row) for row in rows)
    values = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask = torch.zeros_like(values)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        values[index, place] = torch.tensor(row, dtype=torch.int64)
        mask[index, place] = 1
    return values, mask
