"""Backend "cuda" of the importance ops: CUDA C++, in `citi_kernels._C`.

    op                             when                                       what runs
    accumulate_row_dots_           always                                     `row_dots.cu`
    accumulate_parameter_scores_   (1, 1), (P, 1), (1, Q) or (N, K) scores    `parameter_scores.cu`
                                   blocks: more than one segment either way   the torch backend

In fp32, bf16 and fp16; where another input is fp64 or narrower than 16 bits, the torch backend
runs. Each is two kernels, no atomics: the cut of the tokens, or of the weight, follows from the
shape alone, so that every GPU sums in the same order. Scores of elements need no second kernel.

Shape suffixes: T tokens, F features, S segments, C parts of the tokens; K in-features, N
out-features, P segments of rows, Q of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import importance_torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(x: Tensor) -> str | None:
    """Why x cannot be taken, or None."""
    if x.dtype not in _DTYPES:
        return f"it computes in fp32, bf16 and fp16, got {x.dtype}"
    return None


def accumulate_row_dots_(
    scores_S: Tensor,
    a_TF: Tensor,
    b_TF: Tensor,
    valid_T: Tensor | None,
    offset_F: Tensor | None,
    signed: bool,
) -> None:
    """See `importance_row_dots.accumulate_row_dots_`."""
    if not _are_taken(a_TF, b_TF):
        importance_torch.accumulate_row_dots_(scores_S, a_TF, b_TF, valid_T, offset_F, signed)
        return
    extension = compiled.extension()
    (num_tokens, num_features), num_segments = a_TF.shape, scores_S.shape[0]
    num_parts = extension.row_dots_cuda_parts(num_tokens, num_features, num_segments)
    parts_CS = scores_S.new_empty(num_parts, num_segments, dtype=torch.float64)
    # names of ours keep these alive until the launch
    valid_T = None if valid_T is None else valid_T.contiguous()
    offset_F = None if offset_F is None else offset_F.float().contiguous()
    extension.accumulate_row_dots_cuda(
        shape=(num_tokens, num_features),
        scores=compiled.vector(scores_S),
        a=compiled.matrix(a_TF),
        b=compiled.matrix(b_TF),
        valid=compiled.vector(valid_T),
        offset=compiled.vector(offset_F),
        is_signed=signed,
        parts=compiled.vector(parts_CS),
        **compiled.launch_place(a_TF),
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
    are_blocks = min(scores_PQ.shape) > 1 and scores_PQ.shape != weight_NK.shape
    if are_blocks or not _are_taken(weight_NK, x_TK, g_TN):
        importance_torch.accumulate_parameter_scores_(
            scores_PQ, weight_NK, x_TK, g_TN, valid_T, per_token, scale, seed
        )
        return
    extension = compiled.extension()
    shape, scores_shape = (x_TK.shape[0], *weight_NK.shape), tuple(scores_PQ.shape)
    num_parts = extension.parameter_scores_cuda_parts(shape, scores_shape)
    # names of ours keep these alive until the launch
    parts = scores_PQ.new_empty(num_parts, dtype=torch.float32) if num_parts else None
    valid_T = None if valid_T is None else valid_T.contiguous()
    extension.accumulate_parameter_scores_cuda(
        shape=shape,
        scores_shape=scores_shape,
        scores=compiled.vector(scores_PQ),
        weight=compiled.matrix(weight_NK),
        x=compiled.matrix(x_TK),
        g=compiled.matrix(g_TN),
        valid=compiled.vector(valid_T),
        is_per_token=per_token,
        scale=float(scale),
        seed=seed,
        parts=compiled.vector(parts),
        **compiled.launch_place(x_TK),
    )


def _are_taken(*tensors: Tensor) -> bool:
    return all(each.dtype in _DTYPES for each in tensors)
