"""Grouped gradients in rank space: from dy to dh and the slots' part of dgate, in one launch.

    du    = b_eᵀ dy[token]
    dgate = scaling * <h, du>
    dh    = scaling * gate * du

Shapes: T tokens, N out-features, E experts, r rank, R stacked rank (E·r), S slots (top_k·T),
C choices (top_k), Q tiles of the rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Saved, Settings
from citi_kernels.ops.molora_linear_top_k import Routing
from citi_kernels.triton_kernels.grouped_shrink import product_tiles
from citi_kernels.triton_kernels.grouped_tiles import find_tile, load_slots, max_tiles
from citi_kernels.triton_kernels.language import cast, dot
from citi_kernels.triton_kernels.launch import Meta, launch, next_power_of_2


@triton.jit
def _grouped_rank_gradients_kernel(
    dy_ptr,
    b_ptr,
    h_ptr,
    probs_ptr,
    order_ptr,
    offsets_ptr,
    dh_ptr,
    dgate_ptr,
    T,
    N,
    E,
    top_k,
    rank,
    R,
    num_slots,
    scaling,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile, rank_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    expert, start, end = find_tile(
        offsets_ptr, tile, E, top_k, 0, top_k, BLOCK_S=BLOCK_S, BLOCK_E=BLOCK_E
    )
    if start >= end:
        return
    s = start + tl.arange(0, BLOCK_S)
    r = rank_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    in_S, in_R = s < end, r < rank
    flat, t = load_slots(order_ptr, s, in_S, T)
    du = tl.zeros((BLOCK_S, BLOCK_R), dtype=tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        in_N = n < N
        dy = tl.load(
            dy_ptr + t[:, None] * N + n[None, :], mask=in_S[:, None] & in_N[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + n[:, None] * R + (expert * rank + r)[None, :],
            mask=in_N[:, None] & in_R[None, :],
            other=0.0,
        )
        du = dot(dy, cast(b, dy.dtype), du)

    offset_Sr, in_Sr = s[:, None] * rank + r[None, :], in_S[:, None] & in_R[None, :]
    h = tl.load(h_ptr + offset_Sr, mask=in_Sr, other=0.0).to(tl.float32)
    dgate = scaling * tl.sum(h * du, axis=1)
    tl.store(dgate_ptr + rank_tile * num_slots + flat, dgate, mask=in_S)
    gate = tl.load(probs_ptr + t * (E + 1) + 1 + expert, mask=in_S, other=0.0)
    dh = cast(du * (scaling * gate)[:, None], dh_ptr.dtype.element_ty)
    tl.store(dh_ptr + offset_Sr, dh, mask=in_Sr)


def launch_meta(rank: int, E: int, dtype: torch.dtype) -> Meta:
    constants, num_warps, num_stages = product_tiles(rank, dtype)
    constants["BLOCK_E"] = next_power_of_2(E)
    constants["BLOCK_N"] = constants.pop("BLOCK_D")
    return Meta(constants, num_warps=num_warps, num_stages=num_stages)


def grouped_rank_gradients(
    dy_TN: Tensor, b_NR: Tensor, saved: Saved, routing: Routing, settings: Settings
) -> tuple[Tensor, Tensor]:
    """dh (S, r) in h's dtype, and parts of dgate (Q, C, T), fp32, to be summed over Q."""
    (T, N), (num_slots, rank), E = dy_TN.shape, saved.h.shape, settings.num_experts
    meta = launch_meta(rank, E, dy_TN.dtype)
    num_rank_tiles = triton.cdiv(rank, meta.constants["BLOCK_R"])
    dh_Sr = torch.empty_like(saved.h)
    dgate_QCT = saved.probs.new_empty(num_rank_tiles, settings.top_k, T)
    arguments = {
        "dy_ptr": dy_TN,
        "b_ptr": b_NR,
        "h_ptr": saved.h,
        "probs_ptr": saved.probs,
        "order_ptr": routing.order,
        "offsets_ptr": routing.offsets,
        "dh_ptr": dh_Sr,
        "dgate_ptr": dgate_QCT,
        "T": T,
        "N": N,
        "E": E,
        "top_k": settings.top_k,
        "rank": rank,
        "R": b_NR.shape[1],
        "num_slots": num_slots,
        "scaling": settings.scaling,
    }
    grid = (max_tiles(num_slots, E, meta.constants["BLOCK_S"]), num_rank_tiles)
    launch(_grouped_rank_gradients_kernel, grid, arguments, meta)
    return dh_Sr, dgate_QCT
