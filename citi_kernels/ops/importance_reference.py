"""Importance scores of a frozen linear component, as plain PyTorch in fp64.

For y = x Wᵀ (+ b) with upstream gradient g = ∂L/∂y and this component's own input gradient
dx = g W, what one token, row and column contribute is

    s[t, i, j] = W[i, j] · x[t, j] · g[t, i]

and every score is a sum of | . | over sums of them:

                    token: each token by itself            parameter: all tokens of a batch together
    component       Σ_t | Σ_ij s |                         Σ_ij | Σ_t s |
    rows i          Σ_t | Σ_j s |                          Σ_j | Σ_t s |
    columns j       Σ_t | Σ_i s |                          Σ_i | Σ_t s |
    elements        Σ_t | s |                              | Σ_t s |

The sums over columns, Σ_j s = (W x_t)_i g_ti, over rows, Σ_i s = x_tj dx_tj, and over both,
Σ_ij s = x_t · dx_t, need no weight gradient (arXiv 2409.13202, eq. 4): they are `row_dots_ref`, of
(y - b, g) or of (x, dx). The others are `parameter_scores_ref`.

Shape suffixes: T tokens, K in-features, N out-features, F features, S segments of features, P
segments of rows, Q segments of columns; segments are equal and contiguous.
"""

from __future__ import annotations

from torch import Tensor


def row_dots_ref(
    a: Tensor,
    b: Tensor,
    num_segments: int = 1,
    *,
    valid: Tensor | None = None,
    offset: Tensor | None = None,
    signed: bool = False,
) -> Tensor:
    """(S,) fp64: what `accumulate_row_dots_` adds."""
    a_TF, b_TF = a.double(), b.double()
    if offset is not None:
        a_TF = a_TF - offset.double()
    dots_TS = (a_TF * b_TF).reshape(len(a), num_segments, -1).sum(-1)
    if valid is not None:
        dots_TS = dots_TS[valid]
    return (dots_TS if signed else dots_TS.abs()).sum(0)


def parameter_scores_ref(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    shape: tuple[int, int] = (1, 1),
    *,
    valid: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """(P, Q) fp64: what `accumulate_parameter_scores_` adds, the whole gradient at once."""
    x_TK, g_TN = x.double(), g.double()
    if valid is not None:
        x_TK, g_TN = x_TK[valid], g_TN[valid]
    if per_token:
        x_TK, g_TN = x_TK.abs(), g_TN.abs()
    scores_NK = (weight.double() * (g_TN.T @ x_TK)).abs()
    num_rows, num_columns = shape
    rows = weight.shape[0] // max(num_rows, 1)
    columns = weight.shape[1] // max(num_columns, 1)
    return scores_NK.reshape(num_rows, rows, num_columns, columns).sum((1, 3))
