"""A dense layer of backend "cuda" in one call of C++ a direction; not yet run on a GPU.

    forward    y, h and probs      backward    dx, and da, db and drouter where asked for

The kernels and their order are those of `molora_linear_cuda` where it has the extended or the
routed GEMM, csrc/cuda/layer_plan.h puts them together: from Python, launch by launch, a layer takes
longer than its kernels where there are few tokens. Results are the same to the bit.

Shapes: as in `molora_linear_cuda`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from citi_kernels import compiled, environment
from citi_kernels.ops import extended_gemm_cuda, routed_gemm_cuda, side_stream
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.skinny_cuda import Sizes

NAME = "one_call"  # in CITI_TRIALS
_PARAMETERS = (torch.float32, torch.bfloat16, torch.float16)


def takes(left: Tensor, operands: Operands, settings: Settings, min_tokens: int) -> bool:
    """Whether one call is wanted and can be given these; looks at metadata alone.

    Args:
        left: x (T, K) or dy (T, N).
        operands: of the layer; bias None in the backward.
        settings: of the layer.
        min_tokens: from where on the extended GEMM is taken.
    """
    x, weight, bias, a, b, router = operands
    return (
        NAME in environment.TRIALS
        and environment.EXTENDED_GEMM
        and weight is not None
        and not settings.is_sparse
        and settings.dropout_p == 0
        and left.shape[0] >= min_tokens
        and left.dtype == weight.dtype
        and a.dtype in _PARAMETERS
        and b.dtype in _PARAMETERS
        and router.dtype in _PARAMETERS
        and _lies_in_rows(left)
        and _lies_in_rows(weight)
        and weight.shape[0] % 8 == 0
        and weight.numel() > 0
        and (x is None or x is left or _lies_in_rows(x))
        and (bias is None or (bias.is_contiguous() and bias.data_ptr() % 4 == 0))
        and extended_gemm_cuda.why_not_on(left.device) is None
    )


def forward(
    operands: Operands, sizes: Sizes, settings: Settings, *, is_routed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, N), h (T, R) and probs (T, G), for what `takes` lets through."""
    x_TK, weight_NK, bias_N, a_RK, b_NR, router_GK = operands
    (T, K), N = x_TK.shape, weight_NK.shape[0]
    y_TN, h_TR = x_TK.new_empty(T, N), x_TK.new_empty(T, sizes.R)
    # in half the time of new_empty, where the dtype is another
    probs_TG = torch.empty(T, sizes.G, dtype=torch.float32, device=x_TK.device)
    shape = (*sizes.shape, K, N)
    num_bytes = _forward_bytes(shape, is_routed)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=x_TK.device)
    compiled.extension().layer_forward_cuda(
        shape=shape,
        is_routed=is_routed,
        scaling=settings.scaling,
        x=compiled.matrix(x_TK),
        weight=compiled.matrix(weight_NK),
        bias=compiled.vector(bias_N),
        a=compiled.matrix(a_RK),
        b=compiled.matrix(b_NR),
        router=compiled.matrix(router_GK),
        y=compiled.vector(y_TN),
        h=compiled.vector(h_TR),
        probs=compiled.vector(probs_TG),
        workspace=(workspace.data_ptr(), workspace.numel()),
        **compiled.launch_place(x_TK),
    )
    return y_TN, h_TR, probs_TG


def backward(
    dy_TN: Tensor,
    dgate_TG: Tensor | None,
    operands: Operands,
    saved: Saved,
    sizes: Sizes,
    settings: Settings,
    needs: Needs,
    *,
    is_routed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx (T, K), and da (R, K), db (N, R) and drouter (G, K), None where `needs` says no."""
    x_TK, weight_NK, _, a_RK, b_NR, router_GK = operands
    (T, N), K = dy_TN.shape, weight_NK.shape[1]
    dx_TK = dy_TN.new_empty(T, K)
    wanted = (needs.a, needs.b, needs.router)
    gradients = [
        torch.empty(like.shape, dtype=like.dtype, device=dy_TN.device) if need else None
        for like, need in zip((a_RK, b_NR, router_GK), wanted, strict=True)
    ]
    da_RK, db_NR, drouter_GK = gradients
    shape = (*sizes.shape, K, N)
    num_bytes = _backward_bytes(shape, is_routed, wanted)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=dy_TN.device)
    compiled.extension().layer_backward_cuda(
        shape=shape,
        is_routed=is_routed,
        scaling=settings.scaling,
        dy=compiled.matrix(dy_TN),
        x=compiled.matrix(x_TK) if needs.a or needs.router else None,
        weight=compiled.matrix(weight_NK),
        a=compiled.matrix(a_RK),
        b=compiled.matrix(b_NR),
        router=compiled.matrix(router_GK),
        h=compiled.vector(saved.h),
        probs=compiled.vector(saved.probs),
        dgate=compiled.vector(dgate_TG),
        dx=compiled.vector(dx_TK),
        da=compiled.vector(da_RK),
        db=compiled.vector(db_NR),
        drouter=compiled.vector(drouter_GK),
        workspace=(workspace.data_ptr(), workspace.numel()),
        side=side_stream.handle(dy_TN.device) if any(wanted) else 0,
        **compiled.launch_place(dy_TN),
    )
    return dx_TK, da_RK, db_NR, drouter_GK


def is_routed(sizes: Sizes, min_tokens: int) -> bool:
    """Whether the GEMM makes the ranks as well, where one call is taken."""
    return (
        environment.ROUTED_GEMM and min_tokens <= sizes.T and sizes.Z <= routed_gemm_cuda.MAX_ROWS
    )


def _lies_in_rows(matrix: Tensor) -> bool:
    """Rows of a multiple of 16 bytes, at such multiples."""
    num_columns, (row_stride, column_stride) = matrix.shape[1], matrix.stride()
    return (
        column_stride == 1
        and num_columns % 8 == 0
        and row_stride >= num_columns > 0
        and row_stride % 8 == 0
        and matrix.data_ptr() % 16 == 0
    )


@functools.lru_cache(maxsize=1024)
def _forward_bytes(shape: tuple[int, ...], is_routed: bool) -> int:
    return compiled.extension().layer_forward_bytes(shape=shape, is_routed=is_routed)


@functools.lru_cache(maxsize=1024)
def _backward_bytes(shape: tuple[int, ...], is_routed: bool, needs: tuple[bool, bool, bool]) -> int:
    return compiled.extension().layer_backward_bytes(shape=shape, is_routed=is_routed, needs=needs)
