"""What the importance ops ask of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got {tensor.dtype}")


def check_matrix(name: str, tensor: Tensor, what: str) -> None:
    check_floating(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} must be a matrix {what}, got shape {tuple(tensor.shape)}; "
            "reshape it to (-1, features)"
        )


def check_equal(name: str, got: object, wanted: object, what: str) -> None:
    if got != wanted:
        raise ValueError(f"{name} must match {what}, {wanted}, got {got}")


def check_accumulator(scores: Tensor, *, dims: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if scores.dtype not in dtypes:
        raise TypeError(
            f"scores must be one of {', '.join(map(str, dtypes))} in this shape "
            f"{tuple(scores.shape)}, got {scores.dtype}"
        )
    if scores.dim() != dims or not scores.is_contiguous():
        raise ValueError(
            f"scores must be contiguous with {dims} dimension(s), got shape "
            f"{tuple(scores.shape)} with strides {scores.stride()}"
        )


def check_segments(name: str, number: int, size: int, what: str) -> None:
    if number < 1 or size % number:
        raise ValueError(
            f"{name} must have a number of entries that divides the {size} {what}, got {number}"
        )


def check_valid(valid: Tensor | None, num_tokens: int) -> None:
    if valid is None:
        return
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    check_equal("valid", tuple(valid.shape), (num_tokens,), "one entry per token")


def check_device(scores: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != scores.device:
            raise ValueError(
                f"{name} must be on the device of scores, {scores.device}, got {tensor.device}"
            )
