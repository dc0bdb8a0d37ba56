"""Grouped gradients of a and b: products over the slots of one expert.

    db_e = Σ dy[token] uᵀ,  u = scaling * gate * h          da_e = Σ dh x[token]ᵀ

Both sum rows of D features against rows of the rank, so that one kernel serves them. A program
owns a tile of one expert's gradient and all of its slots; an expert without a token gets zeros.

Shapes: T tokens, K in-features, N out-features, D either, E experts, r rank, R stacked rank (E·r),
S slots (top_k·T).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Saved, Settings
from citi_kernels.ops.molora_linear_top_k import Routing
from citi_kernels.triton_kernels.dropout import DROPOUT_ARGUMENTS, dropout_of
from citi_kernels.triton_kernels.grouped_tiles import (
    load_slots,
)
from citi_kernels.triton_kernels.language import cast, dot, keeps_input
from citi_kernels.triton_kernels.launch import Meta, block_of, launch


@triton.jit(do_not_specialize=DROPOUT_ARGUMENTS)
def _grouped_parameter_gradient_kernel(
    rows_ptr,
    ranks_ptr,
    probs_ptr,
    order_ptr,
    offsets_ptr,
    out_ptr,
    T,
    D,
    G,
    top_k,
    rank,
    out_stride_d,
    out_stride_r,
    scaling,
    seed_low0,
    seed_high0,
    threshold,
    inverse_keep,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_SCALED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_D, in_R = d < D, r < rank
    start = tl.load(offsets_ptr + expert * top_k).to(tl.int64)
    end = tl.load(offsets_ptr + (expert + 1) * top_k).to(tl.int64)
    acc = tl.zeros((BLOCK_D, BLOCK_R), dtype=tl.float32)
    for s0 in range(start, end, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        in_S = s < end
        _, t = load_slots(order_ptr, s, in_S, T)
        rows = tl.load(
            rows_ptr + t[:, None] * D + d[None, :], mask=in_S[:, None] & in_D[None, :], other=0.0
        )
        ranks = tl.load(
            ranks_ptr + s[:, None] * rank + r[None, :],
            mask=in_S[:, None] & in_R[None, :],
            other=0.0,
        )
        if IS_SCALED:
            gate = tl.load(probs_ptr + t * G + 1 + expert, mask=in_S, other=0.0)
            ranks = cast(ranks.to(tl.float32) * (scaling * gate)[:, None], rows.dtype)
        if HAS_DROPOUT:
            is_kept = keeps_input(t, d, seed_low0, seed_high0, threshold)
            rows = tl.where(is_kept, rows, 0.0).to(rows.dtype)
        acc = dot(tl.trans(rows), ranks, acc)
    if HAS_DROPOUT:
        acc *= inverse_keep
    tl.store(
        out_ptr + d[:, None] * out_stride_d + (expert * rank + r)[None, :] * out_stride_r,
        cast(acc, out_ptr.dtype.element_ty),
        mask=in_D[:, None] & in_R[None, :],
    )


def launch_meta(rank: int, dtype: torch.dtype, *, is_scaled: bool, has_dropout: bool) -> Meta:
    block_R = min(block_of(rank), 64 if dtype == torch.float32 else 256)
    if dtype == torch.float32:
        block_S, block_D, num_warps = 16, 64, 8 if block_R > 32 else 4
    else:
        block_S, block_D, num_warps = 64, 128 if block_R <= 128 else 64, 8 if block_R > 64 else 4
    constants = {
        "BLOCK_S": block_S,
        "BLOCK_D": block_D,
        "BLOCK_R": block_R,
        "IS_SCALED": is_scaled,
        "HAS_DROPOUT": has_dropout,
    }
    return Meta(constants, num_warps=num_warps, num_stages=3)


def a_gradient(
    x_TK: Tensor, dh_Sr: Tensor, a_RK: Tensor, saved: Saved, routing: Routing, settings: Settings
) -> Tensor:
    """da (R, K) in a's dtype."""
    da_RK = torch.empty_like(a_RK)
    arguments = {"scaling": 1.0, **dropout_of(settings)}
    has_dropout = settings.dropout_p > 0
    meta = launch_meta(dh_Sr.shape[1], x_TK.dtype, is_scaled=False, has_dropout=has_dropout)
    _launch(x_TK, dh_Sr, da_RK.T, saved, routing, settings, arguments, meta)
    return da_RK


def b_gradient(
    dy_TN: Tensor, b_NR: Tensor, saved: Saved, routing: Routing, settings: Settings
) -> Tensor:
    """db (N, R) in b's dtype."""
    db_NR = torch.empty_like(b_NR)
    arguments = {"scaling": settings.scaling, **dict.fromkeys(DROPOUT_ARGUMENTS, 0)}
    arguments["inverse_keep"] = 1.0
    meta = launch_meta(saved.h.shape[1], dy_TN.dtype, is_scaled=True, has_dropout=False)
    _launch(dy_TN, saved.h, db_NR, saved, routing, settings, arguments, meta)
    return db_NR


def _launch(
    rows_TD: Tensor,
    ranks_Sr: Tensor,
    out_DR: Tensor,
    saved: Saved,
    routing: Routing,
    settings: Settings,
    arguments: dict[str, float],
    meta: Meta,
) -> None:
    (T, D), rank, E = rows_TD.shape, ranks_Sr.shape[1], settings.num_experts
    arguments |= {
        "rows_ptr": rows_TD,
        "ranks_ptr": ranks_Sr,
        "probs_ptr": saved.probs,
        "order_ptr": routing.order,
        "offsets_ptr": routing.offsets,
        "out_ptr": out_DR,
        "T": T,
        "D": D,
        "G": E + 1,
        "top_k": settings.top_k,
        "rank": rank,
        "out_stride_d": out_DR.stride(0),
        "out_stride_r": out_DR.stride(1),
    }
    grid = (
        triton.cdiv(D, meta.constants["BLOCK_D"]),
        E,
        triton.cdiv(rank, meta.constants["BLOCK_R"]),
    )
    launch(_grouped_parameter_gradient_kernel, grid, arguments, meta)
