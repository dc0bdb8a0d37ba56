"""Grouped shrink: h = a_e x[token], one row per slot.

Shapes: T tokens, K in-features, E experts, r rank, R stacked rank (E·r), S slots (top_k·T).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.molora_linear_top_k import Routing
from citi_kernels.triton_kernels.dropout import DROPOUT_ARGUMENTS, dropout_of
from citi_kernels.triton_kernels.grouped_tiles import (
    find_tile,
    load_slots,
    max_tiles,
)
from citi_kernels.triton_kernels.language import cast, dot, keeps_input
from citi_kernels.triton_kernels.launch import Meta, block_of, launch, next_power_of_2


@triton.jit(do_not_specialize=DROPOUT_ARGUMENTS)
def _grouped_shrink_kernel(
    x_ptr,
    a_ptr,
    order_ptr,
    offsets_ptr,
    h_ptr,
    T,
    K,
    E,
    top_k,
    rank,
    seed_low0,
    seed_high0,
    threshold,
    inverse_keep,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    expert, start, end = find_tile(
        offsets_ptr, tile, E, top_k, 0, top_k, BLOCK_S=BLOCK_S, BLOCK_E=BLOCK_E
    )
    if start >= end:
        return
    s = start + tl.arange(0, BLOCK_S)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_S, in_R = s < end, r < rank
    _, t = load_slots(order_ptr, s, in_S, T)
    acc = tl.zeros((BLOCK_S, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_K = k < K
        x = tl.load(
            x_ptr + t[:, None] * K + k[None, :], mask=in_S[:, None] & in_K[None, :], other=0.0
        )
        a = tl.load(
            a_ptr + (expert * rank + r)[None, :] * K + k[:, None],
            mask=in_K[:, None] & in_R[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            x = tl.where(keeps_input(t, k, seed_low0, seed_high0, threshold), x, 0.0).to(x.dtype)
        acc = dot(x, cast(a, x.dtype), acc)
    if HAS_DROPOUT:
        acc *= inverse_keep
    h = cast(acc, h_ptr.dtype.element_ty)
    tl.store(h_ptr + s[:, None] * rank + r[None, :], h, mask=in_S[:, None] & in_R[None, :])


def launch_meta(rank: int, E: int, dtype: torch.dtype, *, has_dropout: bool) -> Meta:
    constants, num_warps, num_stages = product_tiles(rank, dtype)
    constants |= {"BLOCK_E": next_power_of_2(E), "HAS_DROPOUT": has_dropout}
    constants["BLOCK_K"] = constants.pop("BLOCK_D")
    return Meta(constants, num_warps=num_warps, num_stages=num_stages)


def product_tiles(rank: int, dtype: torch.dtype) -> tuple[dict[str, int], int, int]:
    """Blocks, warps and stages of a product of gathered rows with D columns by (D, r)."""
    if dtype == torch.float32:
        block_R = min(block_of(rank), 64)
        return {"BLOCK_S": 32, "BLOCK_D": 32, "BLOCK_R": block_R}, 4, 3
    block_R = min(block_of(rank), 256)
    block_D = 128 if block_R <= 32 else 64 if block_R <= 128 else 32
    num_warps = 8 if block_R > 128 else 4
    return {"BLOCK_S": 64, "BLOCK_D": block_D, "BLOCK_R": block_R}, num_warps, 4


def grouped_shrink_(
    h_Sr: Tensor, x_TK: Tensor, a_RK: Tensor, routing: Routing, settings: Settings
) -> None:
    """Fills h; x and a contiguous, a of any dtype."""
    (T, K), (num_slots, rank), E = x_TK.shape, h_Sr.shape, settings.num_experts
    meta = launch_meta(rank, E, x_TK.dtype, has_dropout=settings.dropout_p > 0)
    num_tiles = max_tiles(num_slots, E, meta.constants["BLOCK_S"])
    arguments = {
        "x_ptr": x_TK,
        "a_ptr": a_RK,
        "order_ptr": routing.order,
        "offsets_ptr": routing.offsets,
        "h_ptr": h_Sr,
        "T": T,
        "K": K,
        "E": E,
        "top_k": settings.top_k,
        "rank": rank,
        **dropout_of(settings),
    }
    grid = (num_tiles, triton.cdiv(rank, meta.constants["BLOCK_R"]))
    launch(_grouped_shrink_kernel, grid, arguments, meta)
