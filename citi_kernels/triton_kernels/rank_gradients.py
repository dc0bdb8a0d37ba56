"""Gradients in rank space: from du to dh and dlogits, in one launch.

    dh       = scaling * du ⊙ repeat(gate[1:], r)
    dgate_i  = scaling * <h_i, du_i>  (+ the gradient of the gate sums of the token's segment);
               0 for dropped experts
    dlogits  = gate ⊙ (dgate - <gate, dgate>)

du comes as parts to be summed, or is computed here as dy b in one pass over dy where db is not
needed, or is zero where y took no part in the loss.

Shapes: T tokens, N out-features, R stacked rank (E·r), G gate entries (E + 1), C tiles of N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.triton_kernels.language import cast, dot, is_dropped, repeated_gate
from citi_kernels.triton_kernels.launch import Meta, block_of, launch


@triton.jit
def _rank_gradients_kernel(
    du_ptr,
    dy_ptr,
    b_ptr,
    h_ptr,
    probs_ptr,
    segment_ids_ptr,
    dgate_sums_ptr,
    dh_ptr,
    dlogits_ptr,
    T,
    N,
    R,
    G,
    rank,
    num_parts,
    scaling,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SOURCE: tl.constexpr,
    HAS_GATE_SUMS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    g = tl.arange(0, BLOCK_G).to(tl.int64)
    in_T, in_R, in_G = t < T, r < R, g < G
    in_TR, in_TG = in_T[:, None] & in_R[None, :], in_T[:, None] & in_G[None, :]
    dtype = dh_ptr.dtype.element_ty

    du = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    if SOURCE == "parts":
        row = t
        # unrolled, so that several loads are under way at once
        for _ in tl.range(0, num_parts, loop_unroll_factor=4):
            du += tl.load(du_ptr + row[:, None] * R + r[None, :], mask=in_TR, other=0.0)
            row += T
    elif SOURCE == "dy":
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
            in_N = n < N
            dy = tl.load(
                dy_ptr + t[:, None] * N + n[None, :], mask=in_T[:, None] & in_N[None, :], other=0.0
            )
            b = tl.load(
                b_ptr + n[:, None] * R + r[None, :], mask=in_N[:, None] & in_R[None, :], other=0.0
            )
            du = dot(dy, cast(b, dtype), du)

    marked = tl.load(probs_ptr + t[:, None] * G + g[None, :], mask=in_TG, other=0.0)
    probs, dropped = tl.abs(marked), is_dropped(marked)
    dgate = tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.float32)
    if HAS_GATE_SUMS:
        segment = tl.load(segment_ids_ptr + t, mask=in_T, other=-1)
        dgate = tl.load(
            dgate_sums_ptr + segment[:, None] * G + g[None, :],
            mask=in_TG & (segment >= 0)[:, None],
            other=0.0,
        ).to(tl.float32)
    if SOURCE == "none":
        tl.store(dh_ptr + t[:, None] * R + r[None, :], du.to(dtype), mask=in_TR)
    else:
        h = tl.load(h_ptr + t[:, None] * R + r[None, :], mask=in_TR, other=0.0).to(tl.float32)
        product, expert = h * du, r // rank
        for i in range(G - 1):
            of_i = tl.sum(tl.where((expert == i)[None, :], product, 0.0), axis=1)
            dgate += tl.where((g == i + 1)[None, :], scaling * of_i[:, None], 0.0)
        gate = repeated_gate(probs_ptr, t, r, in_T, in_R, G, rank)
        dh = tl.where(is_dropped(gate), 0.0, du * (scaling * gate))
        tl.store(dh_ptr + t[:, None] * R + r[None, :], cast(dh, dtype), mask=in_TR)
    dgate = tl.where(dropped, 0.0, dgate)
    inner = tl.sum(probs * dgate, axis=1)
    dlogits = probs * (dgate - inner[:, None])
    tl.store(dlogits_ptr + t[:, None] * G + g[None, :], cast(dlogits, dtype), mask=in_TG)


def launch_meta(R: int, G: int, dtype: torch.dtype, source: str, *, has_gate_sums: bool) -> Meta:
    block_R, block_G = block_of(R), block_of(G)
    streams_dy = source == "dy"
    constants = {
        "BLOCK_T": 64 if streams_dy and dtype != torch.float32 else 32,
        "BLOCK_N": 32 if block_R > 64 or dtype == torch.float32 else 128,
        "BLOCK_R": block_R,
        "BLOCK_G": block_G,
        "SOURCE": source,
        "HAS_GATE_SUMS": has_gate_sums,
    }
    return Meta(constants, num_warps=8 if block_R > 64 else 4, num_stages=3 if streams_dy else 1)


def rank_gradients(
    dy_TN: Tensor | None,
    du_CTR: Tensor | None,
    dgate_sums_BG: Tensor | None,
    b_NR: Tensor,
    h_TR: Tensor,
    probs_TG: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """dh (T, R) and dlogits (T, G) in h's dtype; dy None: y took no part in the loss."""
    (T, R), G = h_TR.shape, probs_TG.shape[1]
    source = "none" if dy_TN is None else "dy" if du_CTR is None else "parts"
    has_gate_sums = dgate_sums_BG is not None
    dh_TR, dlogits_TG = torch.empty_like(h_TR), h_TR.new_empty(T, G)
    meta = launch_meta(R, G, h_TR.dtype, source, has_gate_sums=has_gate_sums)
    arguments = {
        "du_ptr": probs_TG if du_CTR is None else du_CTR,
        "dy_ptr": h_TR if dy_TN is None else dy_TN,
        "b_ptr": b_NR,
        "h_ptr": h_TR,
        "probs_ptr": probs_TG,
        "segment_ids_ptr": settings.segment_ids.contiguous() if has_gate_sums else probs_TG,
        "dgate_sums_ptr": dgate_sums_BG if has_gate_sums else probs_TG,
        "dh_ptr": dh_TR,
        "dlogits_ptr": dlogits_TG,
        "T": T,
        "N": b_NR.shape[0],
        "R": R,
        "G": G,
        "rank": R // settings.num_experts,
        "num_parts": 0 if du_CTR is None else du_CTR.shape[0],
        "scaling": settings.scaling,
    }
    launch(_rank_gradients_kernel, (triton.cdiv(T, meta.constants["BLOCK_T"]),), arguments, meta)
    return dh_TR, dlogits_TG
