"""Grouped gradient of the input: dx[token] += dh a_e + dlogits router, in place.

One launch per choice, like the expand. The first one holds every token once, so it also carries
the router's part, which else would be a pass over dx of its own.

Shapes: T tokens, K in-features, E experts, r rank, G gate entries (E + 1), S slots (top_k·T).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Operands, Settings
from citi_kernels.ops.molora_linear_top_k import Routing
from citi_kernels.triton_kernels.dropout import DROPOUT_ARGUMENTS, dropout_of
from citi_kernels.triton_kernels.grouped_expand import rank_blocks
from citi_kernels.triton_kernels.grouped_tiles import (
    find_tile,
    load_slots,
    max_tiles,
)
from citi_kernels.triton_kernels.language import cast, dot, keeps_input
from citi_kernels.triton_kernels.launch import Meta, block_of, launch, next_power_of_2


@triton.jit(do_not_specialize=("choice", *DROPOUT_ARGUMENTS))
def _grouped_input_gradient_kernel(
    dx_ptr,
    dh_ptr,
    a_ptr,
    dlogits_ptr,
    router_ptr,
    order_ptr,
    offsets_ptr,
    T,
    K,
    E,
    top_k,
    rank,
    choice,
    dlogits_stride_t,
    seed_low0,
    seed_high0,
    threshold,
    inverse_keep,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_BLOCKS_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    NUM_BLOCKS_G: tl.constexpr,
    TAIL_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_ROUTER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    expert, start, end = find_tile(
        offsets_ptr, tile, E, top_k, choice, choice + 1, BLOCK_S=BLOCK_S, BLOCK_E=BLOCK_E
    )
    if start >= end:
        return
    s = start + tl.arange(0, BLOCK_S)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_S, in_K = s < end, k < K
    _, t = load_slots(order_ptr, s, in_S, T)
    dx_ptrs, in_dx = dx_ptr + t[:, None] * K + k[None, :], in_S[:, None] & in_K[None, :]
    if HAS_BASE:
        dx = tl.load(dx_ptrs, mask=in_dx, other=0.0)
    acc = tl.zeros((BLOCK_S, BLOCK_K), dtype=tl.float32)
    for r0 in range(0, NUM_BLOCKS_R * BLOCK_R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R).to(tl.int64)
        in_R = r < rank
        dh = tl.load(
            dh_ptr + s[:, None] * rank + r[None, :], mask=in_S[:, None] & in_R[None, :], other=0.0
        )
        a = tl.load(
            a_ptr + (expert * rank + r)[:, None] * K + k[None, :],
            mask=in_R[:, None] & in_K[None, :],
            other=0.0,
        )
        acc = dot(dh, cast(a, dh.dtype), acc)
    if HAS_DROPOUT:
        is_kept = keeps_input(t, k, seed_low0, seed_high0, threshold)
        acc = tl.where(is_kept, acc * inverse_keep, 0.0)
    if HAS_ROUTER:
        # whole blocks of the gates, then a narrow one: E + 1 entries never fill a power of 2
        pointers = (dlogits_ptr + t * dlogits_stride_t, router_ptr + k)
        for g0 in range(0, NUM_BLOCKS_G * BLOCK_G, BLOCK_G):
            acc = _add_router(acc, *pointers, g0, in_S, in_K, E + 1, K, BLOCK_G=BLOCK_G)
        if TAIL_G > 0:
            g0 = NUM_BLOCKS_G * BLOCK_G
            acc = _add_router(acc, *pointers, g0, in_S, in_K, E + 1, K, BLOCK_G=TAIL_G)
    if HAS_BASE:
        acc += dx.to(tl.float32)
    tl.store(dx_ptrs, cast(acc, dx_ptr.dtype.element_ty), mask=in_dx)


@triton.jit
def _add_router(acc, dlogits_ptrs, router_ptrs, g0, in_S, in_K, G, K, BLOCK_G: tl.constexpr):
    """acc [S, K] + dlogits router over the gates g0 .. g0 + BLOCK_G - 1."""
    g = g0 + tl.arange(0, BLOCK_G).to(tl.int64)
    in_G = g < G
    dlogits = tl.load(
        dlogits_ptrs[:, None] + g[None, :], mask=in_S[:, None] & in_G[None, :], other=0.0
    )
    router = tl.load(
        router_ptrs[None, :] + g[:, None] * K, mask=in_G[:, None] & in_K[None, :], other=0.0
    )
    return dot(dlogits, cast(router, dlogits.dtype), acc)


def launch_meta(
    rank: int, E: int, dtype: torch.dtype, *, has_base: bool, has_router: bool, has_dropout: bool
) -> Meta:
    is_fp32 = dtype == torch.float32
    block_G = 32 if is_fp32 else 64
    tail_G = (E + 1) % block_G
    constants = {
        "BLOCK_S": 32 if is_fp32 else 64,
        "BLOCK_K": 64 if is_fp32 or has_router else 128,
        **rank_blocks(rank, dtype),
        "BLOCK_G": block_G,
        "NUM_BLOCKS_G": (E + 1) // block_G,
        "TAIL_G": block_of(tail_G) if tail_G else 0,
        "BLOCK_E": next_power_of_2(E),
        "HAS_BASE": has_base,
        "HAS_ROUTER": has_router,
        "HAS_DROPOUT": has_dropout,
    }
    # with both products a narrow tile, which leaves registers for four programs at a time
    return Meta(constants, num_warps=4 if is_fp32 or has_router else 8, num_stages=3)


def grouped_input_gradient_(
    dx_TK: Tensor,
    dh_Sr: Tensor,
    dlogits_TG: Tensor,
    operands: Operands,
    routing: Routing,
    settings: Settings,
    *,
    has_base: bool,
) -> None:
    """Adds both parts to dx, in its dtype; without a base, dx comes unwritten."""
    (T, K), rank, E = dx_TK.shape, dh_Sr.shape[1], settings.num_experts
    for choice in range(settings.top_k):
        meta = launch_meta(
            rank,
            E,
            dh_Sr.dtype,
            has_base=has_base or choice > 0,
            has_router=choice == 0,
            has_dropout=settings.dropout_p > 0,
        )
        arguments = {
            "dx_ptr": dx_TK,
            "dh_ptr": dh_Sr,
            "a_ptr": operands.a,
            "dlogits_ptr": dlogits_TG,
            "router_ptr": operands.router,
            "order_ptr": routing.order,
            "offsets_ptr": routing.offsets,
            "T": T,
            "K": K,
            "E": E,
            "top_k": settings.top_k,
            "rank": rank,
            "choice": choice,
            "dlogits_stride_t": dlogits_TG.stride(0),
            **dropout_of(settings),
        }
        num_tiles = max_tiles(T, E, meta.constants["BLOCK_S"])
        grid = (num_tiles, triton.cdiv(K, meta.constants["BLOCK_K"]))
        launch(_grouped_input_gradient_kernel, grid, arguments, meta)
