"""`citi::accumulate_row_dots_`: importance scores that need no weight gradient, in one pass.

Shape suffixes: T tokens, F features, S segments of F / S features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from citi_kernels import backends
from citi_kernels.ops import (
    importance_cuda,
    importance_native,
    importance_torch,
    importance_triton,
)
from citi_kernels.ops.importance_checks import (
    check_accumulator,
    check_device,
    check_equal,
    check_floating,
    check_matrix,
    check_segments,
    check_valid,
)

OP = "accumulate_row_dots_"


def accumulate_row_dots_(
    scores: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    valid: Tensor | None = None,
    offset: Tensor | None = None,
    signed: bool = False,
) -> None:
    """Add the dot products of the rows of two matrices, segment by segment, to `scores`.

        scores[s] += Σ_{t valid} | Σ_{f in segment s} (a[t, f] - offset[f]) · b[t, f] |
        signed:      Σ_{t valid}   Σ_{f in segment s} (a[t, f] - offset[f]) · b[t, f]

    With a linear component's input x and own input gradient dx this is Σ_t | Σ_ij s | for S = 1,
    Σ_t | Σ_i s | for every column at S = K; with its output y, offset b and output gradient g it is
    Σ_t | Σ_j s | for every row at S = N. Signed, they are the sums of W ⊙ ∂L/∂W, over columns or
    rows, without a product of matrices. See `importance_reference` for s.

    Args:
        scores: (S,) fp64 or fp32, contiguous, changed in place; S divides F. Yours to zero.
        a: (T, F) floating, any strides.
        b: (T, F) floating, any strides; may differ from `a` in dtype.
        valid: (T,) bool, tokens that count; None counts all. A token that does not count is
            selected away: its NaN stays out of the sum.
        offset: (F,) floating, the bias that `a` holds and the product does not.
        signed: leave out the absolute value.

    Products and dots are formed in fp32 (fp64 where an input is fp64), sums over tokens in fp64
    for fp64 scores on the CPU and on CUDA. Nothing is synchronised with the host, and no tensor of
    the inputs' size is allocated.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype does not.

    Source: arXiv 2409.13202, eq. 4, by the identities of `importance_reference`.
    """
    torch.ops.citi.accumulate_row_dots_(scores, a, b, valid, offset, signed)


@torch.library.custom_op("citi::accumulate_row_dots_", mutates_args=("scores",))
def _accumulate_row_dots_(
    scores: Tensor,
    a: Tensor,
    b: Tensor,
    valid: Tensor | None,
    offset: Tensor | None,
    signed: bool,
) -> None:
    _check(scores, a, b, valid, offset)
    if scores.numel() and a.numel():
        backend = backends.find(OP, backends.choose(OP, a))
        backend.accumulate_row_dots_(scores, a, b, valid, offset, signed)


@_accumulate_row_dots_.register_fake
def _(
    scores: Tensor,
    a: Tensor,
    b: Tensor,
    valid: Tensor | None,
    offset: Tensor | None,
    signed: bool,
) -> None:
    _check(scores, a, b, valid, offset)


def _check(
    scores: Tensor, a: Tensor, b: Tensor, valid: Tensor | None, offset: Tensor | None
) -> None:
    check_matrix("a", a, "(tokens, features)")
    check_matrix("b", b, "(tokens, features)")
    check_equal("b", tuple(b.shape), tuple(a.shape), "the shape of a")
    check_accumulator(scores, dims=1, dtypes=(torch.float64, torch.float32))
    check_segments("scores", scores.shape[0], a.shape[1], "features")
    check_valid(valid, a.shape[0])
    if offset is not None:
        check_floating("offset", offset)
        check_equal("offset", tuple(offset.shape), (a.shape[1],), "the features of a")
    check_device(scores, a=a, b=b, valid=valid, offset=offset)


backends.register(OP, "reference", importance_torch.Definition)
backends.register(OP, "torch", importance_torch)
backends.register(OP, "triton", importance_triton, refuses=importance_triton.refuses)
backends.register(OP, "native", importance_native, refuses=importance_native.refuses)
backends.register(OP, "cuda", importance_cuda, refuses=importance_cuda.refuses)
