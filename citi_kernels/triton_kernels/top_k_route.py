"""Route with top_k < E: gate = softmax(router x), the experts each token keeps, and their slots.

Shapes: T tokens, K in-features, E experts, G gate entries (E + 1), C choices (top_k), P pairs of
an expert and a choice (E·C), Q blocks of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.molora_linear_top_k import Routing
from citi_kernels.triton_kernels.language import cast, dot, exp, sortable
from citi_kernels.triton_kernels.launch import Meta, block_of, launch
from citi_kernels.triton_kernels.sort_slots import sort_slots_

# below the image of every logit, -inf included
_TAKEN = tl.constexpr(-(2**31))


@triton.jit
def _top_k_route_kernel(
    x_ptr,
    router_ptr,
    probs_ptr,
    gates_ptr,
    pairs_ptr,
    counts_ptr,
    T,
    K,
    E,
    top_k,
    num_blocks,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E).to(tl.int64)
    in_T, in_E = t < T, e < E
    logits, backbone = _logits(
        x_ptr, router_ptr, t, e, in_T, in_E, K, BLOCK_T=BLOCK_T, BLOCK_K=BLOCK_K, BLOCK_E=BLOCK_E
    )

    column = tl.arange(0, BLOCK_E)
    image = tl.where(in_E[None, :], sortable(logits), _TAKEN)
    count_ptrs = counts_ptr + e * top_k * num_blocks + block
    for choice in range(top_k):
        _, expert = tl.max(image, axis=1, return_indices=True)
        pair = expert.to(tl.int64) * top_k + choice
        tl.store(pairs_ptr + t, pair.to(tl.int32), mask=in_T)
        is_chosen = column[None, :] == expert[:, None]
        count = tl.sum((is_chosen & in_T[:, None]).to(tl.int32), axis=0)
        tl.store(count_ptrs, count, mask=in_E)
        image = tl.where(is_chosen, _TAKEN, image)
        pairs_ptr += T
        count_ptrs += num_blocks

    is_kept = (image == _TAKEN) & in_E[None, :]
    if RENORMALIZES:
        logits = tl.where(is_kept, logits, float("-inf"))
    else:
        logits = tl.where(in_E[None, :], logits, float("-inf"))
    largest = tl.maximum(tl.max(logits, axis=1), backbone)
    exps, backbone_exp = exp(logits - largest[:, None]), exp(backbone - largest)
    total = tl.sum(exps, axis=1) + backbone_exp
    probs, backbone = tl.div_rn(exps, total[:, None]), tl.div_rn(backbone_exp, total)

    row, in_TE = t * (E + 1), in_T[:, None] & in_E[None, :]
    tl.store(probs_ptr + row, backbone, mask=in_T)
    tl.store(probs_ptr + row[:, None] + 1 + e[None, :], probs, mask=in_TE)
    if HAS_SEGMENTS:
        tl.store(gates_ptr + row, backbone, mask=in_T)
        gates = tl.where(is_kept, probs, 0.0)
        tl.store(gates_ptr + row[:, None] + 1 + e[None, :], gates, mask=in_TE)


@triton.jit
def _logits(
    x_ptr,
    router_ptr,
    t,
    e,
    in_T,
    in_E,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Logits of the experts [T, E] and of the backbone [T], fp32.

    The backbone has a sum of its own: in the dot, an E that is a power of 2 would double.
    """
    logits = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    backbone = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_K = k < K
        x = tl.load(
            x_ptr + t[:, None] * K + k[None, :], mask=in_T[:, None] & in_K[None, :], other=0.0
        )
        router = tl.load(
            router_ptr + (1 + e)[None, :] * K + k[:, None],
            mask=in_K[:, None] & in_E[None, :],
            other=0.0,
        )
        logits = dot(x, cast(router, x.dtype), logits)
        first = cast(tl.load(router_ptr + k, mask=in_K, other=0.0), x.dtype)
        backbone += tl.sum(x.to(tl.float32) * first.to(tl.float32)[None, :], axis=1)
    return logits, backbone


def launch_meta(E: int, dtype: torch.dtype, *, renormalizes: bool, has_segments: bool) -> Meta:
    block_E = block_of(E)
    is_fp32 = dtype == torch.float32
    constants = {
        "BLOCK_T": 16 if block_E > 256 else 32 if is_fp32 or block_E > 128 else 64,
        "BLOCK_K": 32 if is_fp32 else 64 if block_E > 64 else 128,
        "BLOCK_E": block_E,
        "RENORMALIZES": renormalizes,
        "HAS_SEGMENTS": has_segments,
    }
    return Meta(constants, num_warps=8, num_stages=3)


def top_k_route_(
    probs_TG: Tensor, routing: Routing, x_TK: Tensor, router_GK: Tensor, settings: Settings
) -> Tensor | None:
    """Fills probs (of dropped experts too) and routing; gates (T, G), 0 where dropped, or None.

    Gates are what the gate sums need: None without segments.
    """
    T, K = x_TK.shape
    has_segments = settings.segment_ids is not None
    gate_TG = torch.empty_like(probs_TG) if has_segments else None
    meta = launch_meta(
        settings.num_experts,
        x_TK.dtype,
        renormalizes=settings.renormalize,
        has_segments=has_segments,
    )
    num_blocks = max(triton.cdiv(T, meta.constants["BLOCK_T"]), 1)  # one writes zeros for T = 0
    num_pairs = settings.num_experts * settings.top_k
    counts_PQ = routing.pairs.new_empty(num_pairs, num_blocks)
    arguments = {
        "x_ptr": x_TK,
        "router_ptr": router_GK,
        "probs_ptr": probs_TG,
        "gates_ptr": gate_TG if has_segments else probs_TG,
        "pairs_ptr": routing.pairs,
        "counts_ptr": counts_PQ,
        "T": T,
        "K": K,
        "E": settings.num_experts,
        "top_k": settings.top_k,
        "num_blocks": num_blocks,
    }
    launch(_top_k_route_kernel, (num_blocks,), arguments, meta)
    sort_slots_(routing, counts_PQ, meta.constants["BLOCK_T"])
    return gate_TG
