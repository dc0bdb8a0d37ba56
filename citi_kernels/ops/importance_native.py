"""Backend "native" of the importance ops: C++ for the CPU, in `citi_kernels._C`.

    accumulate_row_dots_           one pass over both matrices, whatever their dtypes and strides:
                                   no copy in fp32, no product in memory
    accumulate_parameter_scores_   products by the library, as the torch backend; each tile of them
                                   is multiplied by the weight and reduced in one pass

Tokens, or the rows of a tile, are cut into parts by the shape alone and summed in a fixed order, so
that of these sums neither the number of threads, nor the CPU, nor the strides change a bit. Where
the weight or g is fp64, the torch backend runs.

Shape suffixes: T tokens, F features, S segments, C parts of the tokens; K in-features, N
out-features, P segments of rows, Q of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import importance_torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# of the machine; asked once, where dynamo does not look
_WHY_SLOW = compiled.why_slow()


def refuses(x: Tensor) -> str | None:
    """Why x cannot be taken, or None."""
    if x.dtype not in _DTYPES:
        return f"it computes in fp32, bf16, fp16 and fp64, got {x.dtype}"
    return _WHY_SLOW


def accumulate_row_dots_(
    scores_S: Tensor,
    a_TF: Tensor,
    b_TF: Tensor,
    valid_T: Tensor | None,
    offset_F: Tensor | None,
    signed: bool,
) -> None:
    """See `importance_row_dots.accumulate_row_dots_`."""
    if b_TF.dtype not in _DTYPES:
        importance_torch.accumulate_row_dots_(scores_S, a_TF, b_TF, valid_T, offset_F, signed)
        return
    extension = compiled.extension()
    (num_tokens, num_features), num_segments = a_TF.shape, scores_S.shape[0]
    num_parts = extension.row_dots_parts(num_tokens, num_features, num_segments)
    parts_CS = scores_S.new_empty(num_parts, num_segments, dtype=torch.float64)
    if valid_T is not None:
        valid_T = valid_T.contiguous()
    if offset_F is not None:
        is_double = torch.float64 in (a_TF.dtype, b_TF.dtype)
        offset_F = offset_F.to(torch.float64 if is_double else torch.float32).contiguous()
    extension.accumulate_row_dots(
        shape=(num_tokens, num_features),
        scores=compiled.vector(scores_S),
        a=compiled.matrix(a_TF),
        b=compiled.matrix(b_TF),
        valid=compiled.vector(valid_T),
        offset=compiled.vector(offset_F),
        is_signed=signed,
        parts=compiled.vector(parts_CS),
        num_threads=torch.get_num_threads(),
    )


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
    is_wide = torch.float64 in (weight_NK.dtype, g_TN.dtype)
    if is_wide or not all(each.dtype in _DTYPES for each in (weight_NK, x_TK, g_TN)):
        importance_torch.accumulate_parameter_scores_(
            scores_PQ, weight_NK, x_TK, g_TN, valid_T, per_token, scale, seed
        )
        return
    segments = tuple(scores_PQ.shape)
    lengths = weight_NK.shape[0] // segments[0], weight_NK.shape[1] // segments[1]
    tiles = importance_torch.gradient_tiles(x_TK, g_TN, valid_T, per_token, lengths)
    for rows, columns, gradient in tiles:
        weight = weight_NK[rows, columns]
        _accumulate_score_tile_(
            scores_PQ,
            gradient,
            # rows are read from their first to their last byte
            weight if weight.stride(1) == 1 else weight.contiguous(),
            scale=float(scale),
            seed=seed,
            begin=(rows.start, columns.start),
            segments=segments,
            lengths=lengths,
        )
        del gradient, weight  # before the next ones are made


def _accumulate_score_tile_(
    scores_PQ: Tensor, gradient: Tensor, weight: Tensor, **numbers: object
) -> None:
    extension = compiled.extension()
    sizes = {name: numbers[name] for name in ("begin", "segments", "lengths")}
    num_sums = extension.score_tile_sums(shape=tuple(gradient.shape), **sizes)
    sums = scores_PQ.new_empty(num_sums, dtype=torch.float64) if num_sums else None
    extension.accumulate_score_tile(
        shape=tuple(gradient.shape),
        gradient=compiled.matrix(gradient),
        weight=compiled.matrix(weight),
        scores=compiled.vector(scores_PQ),
        sums=compiled.vector(sums),
        num_threads=torch.get_num_threads(),
        **numbers,
    )
