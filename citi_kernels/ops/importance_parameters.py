"""`citi::accumulate_parameter_scores_`: | W ⊙ gᵀx |, reduced tile by tile, never stored.

Shape suffixes: T tokens, K in-features, N out-features, P segments of rows, Q of columns.
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
    check_matrix,
    check_segments,
    check_valid,
)

OP = "accumulate_parameter_scores_"


def accumulate_parameter_scores_(
    scores: Tensor,
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    *,
    valid: Tensor | None = None,
    per_token: bool = False,
    scale: float = 1.0,
    seed: int = 0,
) -> None:
    """Add the importance of a linear component's parameters, summed by rows and columns.

        scores[p, q] += scale · Σ_{i in p, j in q} | W[i, j] · Σ_{t valid} g[t, i] · x[t, j] |
        per_token:      scale · Σ_{i in p, j in q} | W[i, j] | · Σ_{t valid} | g[t, i] · x[t, j] |

    The shape of `scores` says what is summed: (1, 1) the component, (N, 1) every output row,
    (1, K) every input column, (heads, 1) or (1, heads) heads, (P, Q) blocks, (N, K) nothing: every
    element. Only then is there memory of the weight's size, and it is yours.

    Args:
        scores: (P, Q), contiguous, changed in place; P divides N, Q divides K. fp64 or fp32; for
            (N, K) also bf16, which is rounded stochastically, so that small scores are not lost:
            right on average, 2 bytes an element.
        weight: (N, K) floating, any strides.
        x: (T, K) floating, any strides; is cast to g's dtype for the product.
        g: (T, N) floating, any strides, gradient of the output.
        valid: (T,) bool, tokens that count; None counts all. A token that does not count is
            selected away: its NaN stays out of the product.
        per_token: take the absolute value token by token.
        scale: of what is added, such as one over a loss scale.
        seed: of the stochastic rounding; a hash of (seed, i, j) decides, the same on every
            backend. Give another for every batch.

    Products are accumulated in fp32 at least; on a CPU a tile of bf16 inputs is rounded to bf16
    once, as their weight gradient would be. Workspace stays below 64 MiB.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype does not.

    Source: arXiv 2409.13202, eq. 4, for each parameter by itself.
    """
    torch.ops.citi.accumulate_parameter_scores_(scores, weight, x, g, valid, per_token, scale, seed)


@torch.library.custom_op("citi::accumulate_parameter_scores_", mutates_args=("scores",))
def _accumulate_parameter_scores_(
    scores: Tensor,
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    valid: Tensor | None,
    per_token: bool,
    scale: float,
    seed: int,
) -> None:
    _check(scores, weight, x, g, valid)
    if scores.numel() and x.numel() and g.numel():
        backend = backends.find(OP, backends.choose(OP, x))
        backend.accumulate_parameter_scores_(
            scores, weight, x, g, valid, per_token, scale, _spread(seed)
        )


def _spread(seed: int) -> int:
    """A bijection of 64 bits ("splitmix64").

    The hash of rows takes seed ^ i: with seeds that count batches, rows would swap their bits.
    """
    seed = (seed + 0x9E3779B97F4A7C15) % 2**64
    seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    seed = (seed ^ seed >> 27) * 0x94D049BB133111EB % 2**64
    return seed ^ seed >> 31


@_accumulate_parameter_scores_.register_fake
def _(
    scores: Tensor,
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    valid: Tensor | None,
    per_token: bool,
    scale: float,
    seed: int,
) -> None:
    _check(scores, weight, x, g, valid)


def _check(scores: Tensor, weight: Tensor, x: Tensor, g: Tensor, valid: Tensor | None) -> None:
    check_matrix("weight", weight, "(out-features, in-features)")
    check_matrix("x", x, "(tokens, in-features)")
    check_matrix("g", g, "(tokens, out-features)")
    check_equal(
        "weight", tuple(weight.shape), (g.shape[1], x.shape[1]), "(features of g, features of x)"
    )
    check_equal("g", g.shape[0], x.shape[0], "the tokens of x")
    dtypes = (torch.float64, torch.float32)
    if tuple(scores.shape) == tuple(weight.shape):
        dtypes = (*dtypes, torch.bfloat16)
    check_accumulator(scores, dims=2, dtypes=dtypes)
    check_segments("scores", scores.shape[0], weight.shape[0], "rows of weight")
    check_segments("scores", scores.shape[1], weight.shape[1], "columns of weight")
    check_valid(valid, x.shape[0])
    check_device(scores, weight=weight, x=x, g=g, valid=valid)


backends.register(OP, "reference", importance_torch.Definition)
backends.register(OP, "torch", importance_torch)
backends.register(OP, "triton", importance_triton, refuses=importance_triton.refuses)
backends.register(OP, "native", importance_native, refuses=importance_native.refuses)
backends.register(OP, "cuda", importance_cuda, refuses=importance_cuda.refuses)
