"""Backend "cuda" of the importance ops: CUDA C++, in `citi_kernels._C`. Not yet run on a GPU.

Only `accumulate_row_dots_`, in fp32, bf16 and fp16; where another input is fp64 or narrower than 16
bits, the torch backend runs. Two kernels, no atomics: the cut of the tokens follows from the shape
alone, so that every GPU sums in the same order.

Shape suffixes: T tokens, F features, S segments, C parts of the tokens.
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
    if a_TF.dtype not in _DTYPES or b_TF.dtype not in _DTYPES:
        importance_torch.accumulate_row_dots_(scores_S, a_TF, b_TF, valid_T, offset_F, signed)
        return
    extension, device = compiled.extension(), a_TF.device
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
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
    )
