"""What arguments of `citi::molora_linear` must be; errors name the argument, wanted and got.

Shapes: T tokens, K in-features, N out-features, E experts, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Operands, Settings

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NUM_DIMS = (2, 2, 1, 2, 2, 2)  # of Operands


def check(operands: Operands, settings: Settings) -> None:
    """What shapes, dtypes and devices must be; runs in the op and in its fake."""
    x, weight, bias, a, b, router = operands
    experts = settings.num_experts
    if experts < 1:
        raise ValueError(f"molora_linear: num_experts: want at least 1, got {experts}")
    device = x.device
    for name, tensor, num_dims in zip(Operands._fields, operands, _NUM_DIMS, strict=True):
        if tensor is None:
            continue
        is_fine = tensor.dtype in FLOATING and tensor.dim() == num_dims and tensor.device == device
        if not is_fine:
            _refuse_tensor(name, tensor, num_dims, x)
    num_in, num_out, stacked = x.shape[1], b.shape[0], a.shape[0]
    if stacked == 0 or stacked % experts:
        raise ValueError(
            f"molora_linear: a: want (num_experts * r, K) with num_experts {experts}, r >= 1, "
            f"got {tuple(a.shape)}"
        )
    _check_shape("a", a, (stacked, num_in), "(E * r, K of x)")
    _check_shape("b", b, (num_out, stacked), "(N, rows of a)")
    _check_shape("router", router, (experts + 1, num_in), "(num_experts + 1, K of x)")
    for name, tensor, shape, words in (
        ("weight", weight, (num_out, num_in), "(rows of b, K of x)"),
        ("bias", bias, (num_out,), "(rows of b,)"),
    ):
        if tensor is None:
            continue
        _check_shape(name, tensor, shape, words)
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"molora_linear: {name}: want the dtype of x, {x.dtype}, got {tensor.dtype}; "
                "cast one of them or run under torch.autocast"
            )
    if bias is not None and weight is None:
        raise ValueError("molora_linear: bias: want None where weight is None, got a tensor")
    _check_options(settings, x.shape[0], device)


def _refuse_tensor(name: str, tensor: Tensor, num_dims: int, x: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"molora_linear: {name}: want one of {', '.join(map(str, FLOATING))}, "
            f"got {tensor.dtype}"
        )
    if tensor.dim() != num_dims:
        raise ValueError(
            f"molora_linear: {name}: want {num_dims} dimensions, got shape {tuple(tensor.shape)}"
        )
    raise ValueError(
        f"molora_linear: {name}: want the device of x, {x.device}, got {tensor.device}"
    )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], words: str) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"molora_linear: {name}: want shape {words} = {shape}, got {tuple(tensor.shape)}"
        )


def _check_options(settings: Settings, num_tokens: int, device: torch.device) -> None:
    top_k, ids, seed = settings.top_k, settings.segment_ids, settings.dropout_seed
    if top_k is not None and not 1 <= top_k <= settings.num_experts:
        raise ValueError(
            f"molora_linear: top_k: want 1 to num_experts = {settings.num_experts} or None, "
            f"got {top_k}"
        )
    if not 0 <= settings.dropout_p < 1:
        raise ValueError(f"molora_linear: dropout_p: want 0 <= p < 1, got {settings.dropout_p}")
    if settings.dropout_p > 0 and seed is None:
        raise ValueError(
            "molora_linear: dropout_seed: want an int64 tensor with dropout_p, got None"
        )
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() or seed.device.type != "cpu"):
        raise ValueError(
            "molora_linear: dropout_seed: want a () int64 tensor on the CPU, got "
            f"{tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    if ids is None:
        return
    if settings.num_segments < 0:
        raise ValueError(
            f"molora_linear: num_segments: want 0 or more, got {settings.num_segments}"
        )
    if ids.dtype != torch.int64:
        raise TypeError(f"molora_linear: segment_ids: want int64, got {ids.dtype}")
    _check_shape("segment_ids", ids, (num_tokens,), "(T,)")
    if ids.device != device:
        raise ValueError(
            f"molora_linear: segment_ids: want the device of x, {device}, got {ids.device}"
        )


def check_values(settings: Settings) -> None:
    """What only values show; on the CPU, where looking does not wait."""
    ids = settings.segment_ids
    if ids is None or ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(each) for each in ids.aminmax())
    if low < -1 or high >= settings.num_segments:
        raise ValueError(
            f"molora_linear: segment_ids: want -1 to num_segments - 1 = "
            f"{settings.num_segments - 1}, got {low} to {high}"
        )


def flat_segment_ids(segment_ids: Tensor, x_shape: torch.Size) -> Tensor:
    # no `in`: dynamo compares tuples of symbolic sizes by identity there
    shape, num_tokens = tuple(segment_ids.shape), math.prod(x_shape[:-1])
    if not (shape == tuple(x_shape[:-1]) or shape == (num_tokens,)):
        raise ValueError(
            f"molora_linear: segment_ids: want shape {tuple(x_shape[:-1])} or ({num_tokens},), "
            f"got {tuple(segment_ids.shape)}"
        )
    return segment_ids if len(shape) == 1 else segment_ids.reshape(-1)
