"""Backend "triton" of the importance ops: which kernels run.

    op                             when                                           what runs
    accumulate_row_dots_           always                                         `row_dots`
    accumulate_parameter_scores_   (1, 1), (P, 1), (1, Q) or (N, K) scores        `parameter_scores`
                                   blocks: more than one segment either way       the torch backend

Each is one pass over the activations and a small second stage for its sums; scores of elements need
no second stage. Where an input besides the first is fp64 or narrower than 16 bits, the torch
backend runs: the kernels compute in fp32, bf16 and fp16.

The kernels are imported when they first run, so that this module needs no Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    from citi_kernels.triton_kernels import row_dots

    if not _are_taken(a_TF, b_TF):
        importance_torch.accumulate_row_dots_(scores_S, a_TF, b_TF, valid_T, offset_F, signed)
        return
    valid_T = None if valid_T is None else valid_T.contiguous()
    row_dots.accumulate_row_dots_(scores_S, a_TF, b_TF, valid_T, offset_F, is_signed=signed)


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
    from citi_kernels.triton_kernels import parameter_scores

    granularity = parameter_scores.granularity_of(scores_PQ, weight_NK)
    if granularity is None or not _are_taken(weight_NK, x_TK, g_TN):
        importance_torch.accumulate_parameter_scores_(
            scores_PQ, weight_NK, x_TK, g_TN, valid_T, per_token, scale, seed
        )
        return
    parameter_scores.accumulate_parameter_scores_(
        scores_PQ,
        weight_NK,
        x_TK,
        g_TN,
        None if valid_T is None else valid_T.contiguous(),
        is_per_token=per_token,
        scale=scale,
        seed=seed,
    )


def _are_taken(*tensors: Tensor) -> bool:
    return all(each.dtype in _DTYPES for each in tensors)
