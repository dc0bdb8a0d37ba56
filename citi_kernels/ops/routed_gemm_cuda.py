"""The base product that makes its own extension, in CUDA C++ for Hopper: no pass over x or dy.

    routed_linear           z = x stackᵀ;  probs = softmax(z[P:]),  h = z[:R]
                            u = scaling * h ⊙ repeat(probs[1:], r)
                            y = x weightᵀ + bias + u bᵀ
    routed_input_gradient   du = dy b;  dh = scaling * du ⊙ repeat(probs[1:], r)
                            dlogits = probs ⊙ (dgate - <probs, dgate>)
                              with dgate_i = scaling * <h_i, du_i>, plus what comes in
                            dz = [dh | dlogits];  dx = dy weight + dz stack

The kernel of `extended_gemm_cuda`, whose tiles of the first columns come first and also multiply
by `stack` or b; all others wait for u or dz of their rows before they end. Every expert is kept,
and there is no dropout. Launched together (cooperatively), so that nobody waits in vain.

Shapes: T tokens, K in-features, N out-features, E experts, R stacked rank (E·r), G gates (E + 1);
P and Z as in `skinny_cuda`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from citi_kernels import compiled, environment
from citi_kernels.ops import extended_gemm_cuda
from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.skinny_cuda import Sizes

MAX_ROWS = 64
# of the output, that one counter stands for
_ROWS_OF_COUNT = 128


def why_not(
    left: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    sizes: Sizes,
    settings: Settings,
) -> str | None:
    """Why the kernel cannot be given these, or None; looks at metadata alone.

    Args:
        left: x (T, K) or dy (T, N).
        weight_NK: (N, K), contiguous in K.
        bias_N: of a linear layer.
        sizes: of the layer.
        settings: of the layer.
    """
    if settings.is_sparse:
        return "it keeps every expert"
    if settings.dropout_p > 0:
        return "it has no dropout"
    if sizes.Z > MAX_ROWS:
        return f"ranks and gates must be at most {MAX_ROWS} together, got {sizes.Z}"
    return extended_gemm_cuda.why_not(left, weight_NK, bias_N)


def routed_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    stack_ZK: Tensor,
    b_NR: Tensor,
    sizes: Sizes,
    settings: Settings,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, N), h (T, R), u (T, P), zeros from R on, and probs (T, G); where `why_not` is None.

    Args:
        x_TK: (T, K); with weight and bias as `why_not` takes them.
        weight_NK: (N, K).
        bias_N: (N,), or none.
        stack_ZK: [a; router] as `skinny_cuda.stack` gives it, its first K columns.
        b_NR: (N, R), in rows as `extended_gemm_cuda.aligned_rows` gives them; columns beyond R
            are not read.
        sizes: of the layer.
        settings: of the layer.
        counts: zeros, `num_counts` of them in int32; made here where there are none.

    Raises:
        ValueError: an argument does not fit the others.
    """
    T, N = x_TK.shape[0], weight_NK.shape[0]
    y_TN = extended_gemm_cuda.aligned_empty(x_TK, N)
    h_TR, u_TP = x_TK.new_empty(T, sizes.R), x_TK.new_empty(T, sizes.P)
    probs_TG = x_TK.new_empty(T, sizes.G, dtype=torch.float32)
    counts = _counts(x_TK) if counts is None else counts  # alive until the launch
    compiled.extension().routed_linear_cuda(
        shape=(*sizes.shape, x_TK.shape[1], N),
        x=compiled.matrix(x_TK),
        weight=compiled.matrix(weight_NK),
        bias=compiled.vector(bias_N),
        stack=compiled.matrix(stack_ZK),
        b=compiled.matrix(b_NR),
        y=compiled.matrix(y_TN),
        h=compiled.vector(h_TR),
        u=compiled.vector(u_TP),
        probs=compiled.vector(probs_TG),
        counts=compiled.indices(counts),
        scaling=settings.scaling,
        order=_order(),
        **compiled.launch_place(x_TK),
    )
    return y_TN, h_TR, u_TP, probs_TG


def routed_input_gradient(
    dy_TN: Tensor,
    weight_NK: Tensor,
    b_NR: Tensor,
    h_TR: Tensor,
    probs_TG: Tensor,
    dgate_TG: Tensor | None,
    stack_ZK: Tensor,
    sizes: Sizes,
    settings: Settings,
    counts: Tensor | None = None,
    dz_TZ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx (T, K) and dz (T, Z), as `skinny_cuda.rank_gradients` has it; where `why_not` is None.

    Args:
        dy_TN: (T, N); with weight as `why_not` takes them.
        weight_NK: (N, K).
        b_NR: as in `routed_linear`.
        h_TR: of `routed_linear`.
        probs_TG: of `routed_linear`.
        dgate_TG: (T, G) fp32, gradients of the gates from elsewhere, or none.
        stack_ZK: as in `routed_linear`.
        sizes: of the layer.
        settings: of the layer.
        counts: as in `routed_linear`; each is 2 when dz of its rows is there.
        dz_TZ: memory for dz, or none.

    Raises:
        ValueError: an argument does not fit the others.
    """
    T, N = dy_TN.shape
    dx_TK = extended_gemm_cuda.aligned_empty(dy_TN, weight_NK.shape[1])
    dz_TZ = dy_TN.new_empty(T, sizes.Z) if dz_TZ is None else dz_TZ
    counts = _counts(dy_TN) if counts is None else counts  # alive until the launch
    compiled.extension().routed_input_gradient_cuda(
        shape=(*sizes.shape, weight_NK.shape[1], N),
        dy=compiled.matrix(dy_TN),
        weight=compiled.matrix(weight_NK),
        b=compiled.matrix(b_NR),
        h=compiled.vector(h_TR),
        probs=compiled.vector(probs_TG),
        dgate=compiled.vector(dgate_TG),
        stack=compiled.matrix(stack_ZK),
        dx=compiled.matrix(dx_TK),
        dz=compiled.vector(dz_TZ),
        counts=compiled.indices(counts),
        scaling=settings.scaling,
        order=_order(),
        fits_narrow="fit_narrow" in environment.TRIALS,
        **compiled.launch_place(dy_TN),
    )
    return dx_TK, dz_TZ


def _counts(left: Tensor) -> Tensor:
    """Zeros of this very call, so that streams and graphs share none."""
    return left.new_zeros(num_counts(left.shape[0]), dtype=torch.int32)


def num_counts(num_tokens: int) -> int:
    """Counts of a GEMM over so many rows."""
    return -(-num_tokens // _ROWS_OF_COUNT)


def _order() -> tuple[int, bool]:
    """Tiles of rows that go through all columns together, 0 by default; whether L2 keeps weight."""
    groups = [int(each[6:]) for each in environment.TRIALS if each.startswith("group_")]
    return (groups[0] if groups else 0), "keep_weight" in environment.TRIALS
