"""Backend "torch" of the importance ops: blocks that stay in cache, products by the library.

Shape suffixes: T tokens, K in-features, N out-features, F features, S, P, Q segments.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from citi_kernels.ops.counter_hash import hash_of_columns, hash_of_rows
from citi_kernels.ops.importance_reference import parameter_scores_ref, row_dots_ref

# Elements of one block: stays in cache on a CPU, hides launches on a GPU, and what is alive of it
# at once (operands upcast, product, hash) stays below the 64 MiB of workspace that we allow.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_DEVICE = 2**22
_TILE_ELEMENTS = 2**22
_ROUNDED_TILE_ELEMENTS = 2**20


class Definition:
    """Backend "reference": the definitions in fp64."""

    @staticmethod
    def accumulate_row_dots_(scores, a, b, valid, offset, signed):
        added = row_dots_ref(a, b, scores.shape[0], valid=valid, offset=offset, signed=signed)
        scores += added.to(scores.dtype)

    @staticmethod
    def accumulate_parameter_scores_(scores, weight, x, g, valid, per_token, scale, seed):
        shape = tuple(scores.shape)
        added = parameter_scores_ref(weight, x, g, shape, valid=valid, per_token=per_token)
        _add_(scores, added * scale, seed, slice(0, shape[0]), slice(0, shape[1]))


def accumulate_row_dots_(
    scores_S: Tensor,
    a_TF: Tensor,
    b_TF: Tensor,
    valid_T: Tensor | None,
    offset_F: Tensor | None,
    signed: bool,
) -> None:
    """See `importance_row_dots.accumulate_row_dots_`."""
    num_tokens, num_features = a_TF.shape
    num_segments = scores_S.shape[0]
    dtype = _wide_dtype(a_TF, b_TF)
    step = max(1, _BLOCK_ELEMENTS.get(a_TF.device.type, _BLOCK_ELEMENTS_DEVICE) // num_features)
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        a, b = a_TF[rows].to(dtype), b_TF[rows].to(dtype)
        if offset_F is not None:
            a = a - offset_F.to(dtype)
        if num_segments == 1:
            dots_TS = torch.linalg.vecdot(a.contiguous(), b.contiguous())[:, None]
        elif num_segments == num_features:
            dots_TS = a * b
        else:
            segments = (a.shape[0], num_segments, num_features // num_segments)
            dots_TS = torch.linalg.vecdot(a.reshape(segments), b.reshape(segments))
        if not signed:
            dots_TS = dots_TS.abs()
        if valid_T is not None:
            dots_TS = torch.where(valid_T[rows, None], dots_TS, 0)
        scores_S += dots_TS.sum(0, dtype=scores_S.dtype)


def accumulate_parameter_scores_(
    scores_PQ: Tensor,
    weight_NK: Tensor,
    x_TK: Tensor,
    g_TN: Tensor,
    valid_T: Tensor | None,
    per_token: bool,
    scale: float,
    seed: int,
) -> None:
    """See `importance_parameters.accumulate_parameter_scores_`."""
    num_out, num_in = weight_NK.shape
    segments = num_out // scores_PQ.shape[0], num_in // scores_PQ.shape[1]
    dtype = _wide_dtype(weight_NK, g_TN)
    # stochastic rounding makes more passes over a tile
    is_rounded = scores_PQ.dtype == torch.bfloat16
    most = _ROUNDED_TILE_ELEMENTS if is_rounded else _TILE_ELEMENTS
    tiles = gradient_tiles(x_TK, g_TN, valid_T, per_token, segments, most_elements=most)
    for rows, columns, gradient_NK in tiles:
        tile_NK = gradient_NK.to(dtype).mul_(weight_NK[rows, columns]).abs_()
        if scale != 1.0:
            tile_NK *= scale
        _reduce_(scores_PQ, tile_NK, rows, columns, *segments, seed)
        del gradient_NK, tile_NK  # before the next ones are made


def gradient_tiles(
    x_TK: Tensor,
    g_TN: Tensor,
    valid_T: Tensor | None,
    per_token: bool,
    segments: tuple[int, int],
    most_elements: int | None = None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """gᵀx tile by tile: rows, columns, and their part, contiguous, of `_gradient_tile`'s dtype.

    A tile holds whole segments, so many rows and columns, or lies within one, in both directions.
    """
    num_out, num_in = g_TN.shape[1], x_TK.shape[1]
    is_plain = valid_T is None and not per_token and x_TK.dtype == g_TN.dtype
    is_plain = is_plain and x_TK.is_contiguous()
    most, most_columns, most_rows = most_elements or _TILE_ELEMENTS, num_in, num_out
    if not is_plain:
        most_columns = _fitting(_TILE_ELEMENTS, x_TK.shape[0], g_TN.dtype)
    strides = g_TN.stride()
    if valid_T is not None or per_token or 1 not in strides or 0 in strides:
        most_rows = _fitting(_TILE_ELEMENTS, g_TN.shape[0], g_TN.dtype)
    for columns in _row_tiles(num_in, segments[1], min(most_columns, num_in)):
        x = _operand(x_TK[:, columns], valid_T, per_token, g_TN.dtype)
        # at most half of the rows: a small weight never has its whole gradient in memory either
        step = min(most_rows, _fitting(most, x.shape[1], g_TN.dtype), max(1, num_out // 2))
        for rows in _row_tiles(num_out, segments[0], step):
            g_tile = g_TN[:, rows]
            yield rows, columns, _gradient_tile(x, _operand(g_tile, valid_T, per_token, g_TN.dtype))
        del x  # before the next one is copied


def _reduce_(
    scores_PQ: Tensor,
    tile_NK: Tensor,
    rows: slice,
    columns: slice,
    row_segment: int,
    column_segment: int,
    seed: int,
) -> None:
    """Add a tile, which holds whole segments or lies within one, in both directions."""
    into_rows = _segments(rows, row_segment)
    into_columns = _segments(columns, column_segment)
    num_p, num_q = into_rows.stop - into_rows.start, into_columns.stop - into_columns.start
    if tile_NK.shape == (num_p, num_q):
        _add_(scores_PQ, tile_NK, seed, into_rows, into_columns)
        return
    total = scores_PQ.dtype
    if num_p == num_q == 1:
        reduced = tile_NK.sum().to(total)
    elif num_q == tile_NK.shape[1]:
        reduced = tile_NK.unflatten(0, (num_p, -1)).sum(1).to(total)
    else:
        sums_NQ = tile_NK.unflatten(1, (num_q, -1)).sum(2)
        reduced = sums_NQ.unflatten(0, (num_p, -1)).sum(1, dtype=total)
    scores_PQ[into_rows, into_columns] += reduced


def _add_(scores: Tensor, added: Tensor, seed: int, rows: slice, columns: slice) -> None:
    """scores[rows, columns] += added, rounded stochastically where the scores are bf16."""
    part = scores[rows, columns]
    if scores.dtype != torch.bfloat16:
        part += added.to(scores.dtype)
        return
    sum_NK = part.float() + added.float()
    device = scores.device
    i_N = torch.arange(rows.start, rows.start + added.shape[0], device=device)
    j_K = torch.arange(columns.start, columns.start + added.shape[1], device=device)
    bits = (
        hash_of_columns(hash_of_rows(i_N, seed), j_K)
        .bitwise_and_(0xFFFF)
        .add_(sum_NK.view(torch.int32))
    )
    rounded = bits.bitwise_and_(-0x10000).view(torch.float32)
    # adding to the bits of inf or NaN would change what it is
    part.copy_(torch.where(sum_NK.isfinite(), rounded, sum_NK))


def _segments(features: slice, size: int) -> slice:
    return slice(features.start // size, (features.stop - 1) // size + 1)


def _row_tiles(size: int, segment: int, step: int) -> Iterator[slice]:
    """Slices of at most `step`, or few more than wanted: whole segments, or within one."""
    if step >= segment:
        step -= step % segment
        starts = range(0, size, step)
        yield from (slice(start, min(start + step, size)) for start in starts)
        return
    for first in range(0, size, segment):
        for start in range(first, first + segment, step):
            yield slice(start, min(start + step, first + segment))


def _fitting(elements: int, size: int, dtype: torch.dtype) -> int:
    """How many vectors of a size have together as many elements, or half of them in fp64."""
    return max(1, elements * 4 // (max(4, dtype.itemsize) * max(1, size)))


def _operand(part: Tensor, valid_T: Tensor | None, per_token: bool, dtype: torch.dtype) -> Tensor:
    if valid_T is not None:
        # choosing rows makes less work, but a GPU would have to tell the host how many there are
        on_cpu = part.device.type == "cpu"
        part = part[valid_T] if on_cpu else torch.where(valid_T[:, None], part, 0)
    part = part.to(dtype)
    return part.abs() if per_token else part


def _gradient_tile(x: Tensor, g: Tensor) -> Tensor:
    """gᵀx in fp32 at least; in bf16 on a CPU."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(g.T, x, out_dtype=torch.float32)
    if x.dtype != torch.float16:
        return g.T @ x
    tile_NK = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    step = max(1, _TILE_ELEMENTS // max(x.shape[1], g.shape[1]))
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        tile_NK.addmm_(g[rows].float().T, x[rows].float())
    return tile_NK


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
