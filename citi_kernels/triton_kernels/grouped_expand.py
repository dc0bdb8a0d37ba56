"""Grouped expand: y[token] += u b_eᵀ in place, u = scaling * gate * h.

One launch per choice: the slots of one choice hold every token once, so no two programs meet in a
row of y. The first choice can therefore write y where there is no base product to add to.

Shapes: T tokens, N out-features, E experts, r rank, R stacked rank (E·r), G gate entries (E + 1),
S slots (top_k·T).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.molora_linear_top_k import Routing
from citi_kernels.triton_kernels.grouped_tiles import find_tile, load_slots, max_tiles
from citi_kernels.triton_kernels.language import cast, dot
from citi_kernels.triton_kernels.launch import Meta, block_of, launch, next_power_of_2


@triton.jit(do_not_specialize=("choice",))
def _grouped_expand_kernel(
    y_ptr,
    h_ptr,
    probs_ptr,
    b_ptr,
    order_ptr,
    offsets_ptr,
    T,
    N,
    E,
    top_k,
    rank,
    R,
    choice,
    scaling,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_BLOCKS_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_BASE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    expert, start, end = find_tile(
        offsets_ptr, tile, E, top_k, choice, choice + 1, BLOCK_S=BLOCK_S, BLOCK_E=BLOCK_E
    )
    if start >= end:
        return
    s = start + tl.arange(0, BLOCK_S)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_S, in_N = s < end, n < N
    _, t = load_slots(order_ptr, s, in_S, T)
    y_ptrs, in_y = y_ptr + t[:, None] * N + n[None, :], in_S[:, None] & in_N[None, :]
    if HAS_BASE:
        y = tl.load(y_ptrs, mask=in_y, other=0.0)
    acc = tl.zeros((BLOCK_S, BLOCK_N), dtype=tl.float32)
    gate = tl.load(probs_ptr + t * (E + 1) + 1 + expert, mask=in_S, other=0.0)
    for r0 in range(0, NUM_BLOCKS_R * BLOCK_R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        in_R = r < rank
        h = tl.load(
            h_ptr + s[:, None] * rank + r[None, :], mask=in_S[:, None] & in_R[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + n[None, :] * R + (expert * rank + r)[:, None],
            mask=in_R[:, None] & in_N[None, :],
            other=0.0,
        )
        u = cast(h.to(tl.float32) * (scaling * gate)[:, None], h.dtype)
        acc = dot(u, cast(b, h.dtype), acc)
    if HAS_BASE:
        acc += y.to(tl.float32)
    tl.store(y_ptrs, cast(acc, y_ptr.dtype.element_ty), mask=in_y)


def launch_meta(rank: int, E: int, dtype: torch.dtype, *, has_base: bool) -> Meta:
    constants = {
        "BLOCK_S": 32 if dtype == torch.float32 else 64,
        "BLOCK_N": 64 if dtype == torch.float32 else 128,
        **rank_blocks(rank, dtype),
        "BLOCK_E": next_power_of_2(E),
        "HAS_BASE": has_base,
    }
    return Meta(constants, num_warps=4 if dtype == torch.float32 else 8, num_stages=3)


def rank_blocks(rank: int, dtype: torch.dtype) -> dict[str, int]:
    """The blocks that cover the rank in a product over it.

    Their number is a constant, so that one block, the usual case, compiles to no loop.
    """
    block_R = block_of(rank)
    if block_R > (32 if dtype == torch.float32 else 64):
        block_R = 32
    return {"BLOCK_R": block_R, "NUM_BLOCKS_R": triton.cdiv(rank, block_R)}


def grouped_expand_(
    y_TN: Tensor,
    h_Sr: Tensor,
    probs_TG: Tensor,
    b_NR: Tensor,
    routing: Routing,
    settings: Settings,
    *,
    has_base: bool,
) -> None:
    """Adds every slot's update to y, in its dtype; without a base, y comes unwritten."""
    (T, N), rank, E = y_TN.shape, h_Sr.shape[1], settings.num_experts
    for choice in range(settings.top_k):
        meta = launch_meta(rank, E, h_Sr.dtype, has_base=has_base or choice > 0)
        arguments = {
            "y_ptr": y_TN,
            "h_ptr": h_Sr,
            "probs_ptr": probs_TG,
            "b_ptr": b_NR,
            "order_ptr": routing.order,
            "offsets_ptr": routing.offsets,
            "T": T,
            "N": N,
            "E": E,
            "top_k": settings.top_k,
            "rank": rank,
            "R": b_NR.shape[1],
            "choice": choice,
            "scaling": settings.scaling,
        }
        num_tiles = max_tiles(T, E, meta.constants["BLOCK_S"])
        grid = (num_tiles, triton.cdiv(N, meta.constants["BLOCK_N"]))
        launch(_grouped_expand_kernel, grid, arguments, meta)
