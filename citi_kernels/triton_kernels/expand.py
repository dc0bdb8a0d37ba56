"""Expand: y += u bᵀ in place, u = scaling * h ⊙ repeat(gate[1:], r); and the gate sums.

One launch does both, so that a layer's forward is shrink, base product, expand.

Shapes: T tokens, N out-features, R stacked rank (E·r), G gate entries (E + 1), B segments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.triton_kernels.language import cast, dot_of_kept, is_dropped, scaled_rank
from citi_kernels.triton_kernels.launch import Meta, block_of, launch, next_power_of_2


@triton.jit
def _expand_kernel(
    y_ptr,
    h_ptr,
    probs_ptr,
    b_ptr,
    segment_ids_ptr,
    gate_sums_ptr,
    T,
    N,
    R,
    G,
    rank,
    num_segments,
    num_tiles_n,
    scaling,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    HAS_BASE: tl.constexpr,
    IS_SPARSE: tl.constexpr,
):
    # the first num_segments programs sum gates, being the longest; the others each own a tile of y
    pid = tl.program_id(0).to(tl.int64)
    if pid < num_segments:
        _sum_gates(
            probs_ptr, segment_ids_ptr, gate_sums_ptr, pid, T, G, BLOCK_T=BLOCK_SUM, BLOCK_G=BLOCK_G
        )
    else:
        tile = pid - num_segments
        t = (tile // num_tiles_n) * BLOCK_T + tl.arange(0, BLOCK_T)
        n = (tile % num_tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R).to(tl.int64)
        in_T, in_N, in_R = t < T, n < N, r < R
        u = scaled_rank(h_ptr, probs_ptr, t, r, in_T, in_R, R, G, rank, scaling)
        b = tl.load(
            b_ptr + n[:, None] * R + r[None, :], mask=in_N[:, None] & in_R[None, :], other=0.0
        )
        update = dot_of_kept(
            u,
            tl.trans(cast(b, u.dtype)),
            tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32),
            probs_ptr,
            t,
            r,
            in_T,
            G,
            rank,
            IS_SPARSE,
        )
        y_ptrs, in_y = y_ptr + t[:, None] * N + n[None, :], in_T[:, None] & in_N[None, :]
        if HAS_BASE:
            update += tl.load(y_ptrs, mask=in_y, other=0.0).to(tl.float32)
        tl.store(y_ptrs, cast(update, y_ptr.dtype.element_ty), mask=in_y)


@triton.jit
def _sum_gates(
    probs_ptr,
    segment_ids_ptr,
    gate_sums_ptr,
    segment,
    T,
    G,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    g = tl.arange(0, BLOCK_G)
    in_G = g < G
    acc = tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.float32)
    for t0 in range(0, T, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
        mine = tl.load(segment_ids_ptr + t, mask=t < T, other=-1) == segment
        gates = tl.load(
            probs_ptr + t[:, None] * G + g[None, :], mask=mine[:, None] & in_G[None, :], other=0.0
        )
        acc += tl.where(is_dropped(gates), 0.0, gates)
    tl.store(gate_sums_ptr + segment * G + g, tl.sum(acc, axis=0), mask=in_G)


def launch_meta(
    R: int, G: int, dtype: torch.dtype, *, has_base: bool, is_sparse: bool = False
) -> Meta:
    block_R = block_of(R)
    is_heavy = block_R > 64 or dtype == torch.float32
    constants = {
        "BLOCK_T": 32 if dtype == torch.float32 else 64,
        "BLOCK_N": 64 if is_heavy else 128,
        "BLOCK_R": block_R,
        # few steps of many tokens: a program that sums gates walks over all of them
        "BLOCK_G": next_power_of_2(G),
        "BLOCK_SUM": max(16, 4096 // next_power_of_2(G)),
        "HAS_BASE": has_base,
        "IS_SPARSE": is_sparse,
    }
    return Meta(constants, num_warps=8 if is_heavy or is_sparse else 4, num_stages=1)


def expand_(
    y_TN: Tensor,
    h_TR: Tensor,
    probs_TG: Tensor,
    b_NR: Tensor,
    settings: Settings,
    *,
    has_base: bool,
) -> Tensor | None:
    """Adds the update to y in place (without a base: writes it); the gate sums (B, G) or None."""
    T, N = y_TN.shape
    R, G = h_TR.shape[1], probs_TG.shape[1]
    meta = launch_meta(R, G, y_TN.dtype, has_base=has_base, is_sparse=settings.is_sparse)
    segment_ids_T, gate_sums_BG = settings.segment_ids, None
    num_segments = 0 if segment_ids_T is None else settings.num_segments
    if segment_ids_T is not None:
        gate_sums_BG = probs_TG.new_empty(num_segments, G)
    num_tiles_n = triton.cdiv(N, meta.constants["BLOCK_N"])
    num_tiles = triton.cdiv(T, meta.constants["BLOCK_T"]) * num_tiles_n
    arguments = {
        "y_ptr": y_TN,
        "h_ptr": h_TR,
        "probs_ptr": probs_TG,
        "b_ptr": b_NR,
        "segment_ids_ptr": h_TR if segment_ids_T is None else segment_ids_T.contiguous(),
        "gate_sums_ptr": probs_TG if gate_sums_BG is None else gate_sums_BG,
        "T": T,
        "N": N,
        "R": R,
        "G": G,
        "rank": R // settings.num_experts,
        "num_segments": num_segments,
        "num_tiles_n": num_tiles_n,
        "scaling": settings.scaling,
    }
    launch(_expand_kernel, (num_segments + num_tiles,), arguments, meta)
    return gate_sums_BG
