"""Second stage of the importance scores: partial sums of programs, summed in a fixed order.

    scores[s] += Σ_c Σ_{l < L} parts[c, s * L + l]

Shapes: C parts, S segments of L sums each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.triton_kernels.launch import Meta, launch, next_power_of_2

_BLOCK = 1024
_WIDEST = 64


@triton.jit
def _score_sums_kernel(
    parts_ptr,
    scores_ptr,
    num_summands,
    S,
    L,
    part_stride,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_S = s < S
    dtype = scores_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_S), dtype=dtype)
    for m0 in range(0, num_summands, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        at = (m // L * part_stride + m % L)[:, None] + (s * L)[None, :]
        inside = (m < num_summands)[:, None] & in_S[None, :]
        total += tl.load(parts_ptr + at, mask=inside, other=0.0).to(dtype)
    before = tl.load(scores_ptr + s, mask=in_S, other=0.0)
    tl.store(scores_ptr + s, before + tl.sum(total, axis=0), mask=in_S)


def launch_meta(S: int, L: int) -> Meta:
    """Short segments lie side by side in a program; a long one has it to itself."""
    block_S = max(1, min(_WIDEST // next_power_of_2(L), next_power_of_2(S)))
    return Meta({"BLOCK_S": block_S, "BLOCK_M": _BLOCK // block_S})


def add_score_sums_(scores_S: Tensor, parts_CM: Tensor) -> None:
    """Adds parts (C, S·L), fp32 or fp64, to the scores in their dtype; both contiguous."""
    num_parts, num_sums = parts_CM.shape
    S = scores_S.numel()
    L = num_sums // S
    meta = launch_meta(S, L)
    arguments = {
        "parts_ptr": parts_CM,
        "scores_ptr": scores_S,
        "num_summands": num_parts * L,
        "S": S,
        "L": L,
        "part_stride": num_sums,
    }
    launch(_score_sums_kernel, (triton.cdiv(S, meta.constants["BLOCK_S"]),), arguments, meta)
