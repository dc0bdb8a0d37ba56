"""Backward of the route with top_k < E: from the gradients of the gates to dlogits, per token.

    dgate   = that of the token's slots + that of its segment's gate sums; 0 where dropped
    dlogits = probs ⊙ (dgate - <probs, dgate>)

Shapes: T tokens, G gate entries (E + 1), B segments, C choices (top_k), Q tiles of the rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Saved, Settings
from citi_kernels.ops.molora_linear_top_k import Routing
from citi_kernels.triton_kernels.language import cast
from citi_kernels.triton_kernels.launch import Meta, launch, next_power_of_2

# rows of dlogits start at multiples of this, so that the products with it load whole vectors
_ALIGNMENT = 16


@triton.jit
def _top_k_route_backward_kernel(
    dgate_ptr,
    probs_ptr,
    pairs_ptr,
    segment_ids_ptr,
    dgate_sums_ptr,
    dlogits_ptr,
    T,
    G,
    top_k,
    num_parts,
    num_slots,
    dlogits_stride_t,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    HAS_GATE_SUMS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    g = tl.arange(0, BLOCK_G)
    in_T, in_G = t < T, g < G
    in_TG = in_T[:, None] & in_G[None, :]
    slot_dgate = tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.float32)
    is_kept = tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.int1) | (g == 0)[None, :]
    flat = t
    for _ in range(top_k):
        expert = tl.load(pairs_ptr + flat, mask=in_T, other=0) // top_k
        of_slot = tl.zeros((BLOCK_T,), dtype=tl.float32)
        part_ptrs = dgate_ptr + flat
        for _ in range(num_parts):
            of_slot += tl.load(part_ptrs, mask=in_T, other=0.0)
            part_ptrs += num_slots
        is_chosen = g[None, :] == expert[:, None] + 1
        slot_dgate = tl.where(is_chosen, of_slot[:, None], slot_dgate)
        is_kept = is_kept | is_chosen
        flat += T

    dgate = slot_dgate
    if HAS_GATE_SUMS:
        segment = tl.load(segment_ids_ptr + t, mask=in_T, other=-1)
        dgate += tl.load(
            dgate_sums_ptr + segment[:, None] * G + g[None, :],
            mask=in_TG & is_kept & (segment >= 0)[:, None],
            other=0.0,
        ).to(tl.float32)
    probs = tl.load(probs_ptr + t[:, None] * G + g[None, :], mask=in_TG, other=0.0)
    inner = tl.sum(probs * dgate, axis=1)
    dlogits = probs * (dgate - inner[:, None])
    if RENORMALIZES:
        dlogits = tl.where(is_kept, dlogits, 0.0)
    tl.store(
        dlogits_ptr + t[:, None] * dlogits_stride_t + g[None, :],
        cast(dlogits, dlogits_ptr.dtype.element_ty),
        mask=in_TG,
    )


def launch_meta(G: int, *, renormalizes: bool, has_gate_sums: bool) -> Meta:
    block_G = next_power_of_2(G)
    constants = {
        "BLOCK_T": max(1, min(64, 4096 // block_G)),
        "BLOCK_G": block_G,
        "RENORMALIZES": renormalizes,
        "HAS_GATE_SUMS": has_gate_sums,
    }
    return Meta(constants, num_stages=1)


def top_k_route_backward(
    dgate_QCT: Tensor | None,
    dgate_sums_BG: Tensor | None,
    saved: Saved,
    routing: Routing,
    settings: Settings,
) -> Tensor:
    """dlogits (T, G) in h's dtype; either gradient may be None."""
    probs_TG, has_gate_sums = saved.probs, dgate_sums_BG is not None
    T, G = probs_TG.shape
    padded_G = triton.cdiv(G, _ALIGNMENT) * _ALIGNMENT
    dlogits_TG = saved.h.new_empty(T, padded_G)[:, :G]
    meta = launch_meta(G, renormalizes=settings.renormalize, has_gate_sums=has_gate_sums)
    arguments = {
        "dgate_ptr": probs_TG if dgate_QCT is None else dgate_QCT,
        "probs_ptr": probs_TG,
        "pairs_ptr": routing.pairs,
        "segment_ids_ptr": settings.segment_ids.contiguous() if has_gate_sums else probs_TG,
        "dgate_sums_ptr": dgate_sums_BG.contiguous() if has_gate_sums else probs_TG,
        "dlogits_ptr": dlogits_TG,
        "T": T,
        "G": G,
        "top_k": settings.top_k,
        "num_parts": 0 if dgate_QCT is None else dgate_QCT.shape[0],
        "num_slots": saved.h.shape[0],
        "dlogits_stride_t": padded_G,
    }
    grid = (triton.cdiv(T, meta.constants["BLOCK_T"]),)
    launch(_top_k_route_backward_kernel, grid, arguments, meta)
    return dlogits_TG
