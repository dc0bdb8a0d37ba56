"""Backend "native" of the importance ops: C++ for the CPU, in `citi_kernels._C`.

Only `accumulate_row_dots_`. One pass over both matrices, whatever their dtypes and strides: no copy
in fp32, no product in memory. Tokens are cut into parts by the shape alone and summed in a fixed
order, so that neither the number of threads, nor the CPU, nor the strides change a bit.

Shape suffixes: T tokens, F features, S segments, C parts of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import importance_torch


def refuses(x: Tensor) -> str | None:
    """Why x cannot be taken, or None."""
    if not compiled.takes(x):
        return f"it computes in fp32, bf16, fp16 and fp64, got {x.dtype}"
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
    if not compiled.takes(b_TF):
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
