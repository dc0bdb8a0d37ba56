"""Shrink and route: h = a x and gate = softmax(router x) of up to three layers in one pass over x.

With top_k < E the probabilities of dropped experts are marked (`language.mark_dropped`).

Shapes: T tokens, K in-features, R stacked rank (E·r), G gate entries (E + 1), L layers on one x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.triton_kernels.dropout import GROUP_DROPOUT_ARGUMENTS, dropout_of_group
from citi_kernels.triton_kernels.language import (
    cast,
    dot,
    exp,
    keeps_input,
    mark_dropped,
    sortable,
)
from citi_kernels.triton_kernels.launch import Meta, block_of, launch
from citi_kernels.triton_kernels.persistent import capability


@triton.jit(do_not_specialize=GROUP_DROPOUT_ARGUMENTS)
def _shrink_route_kernel(
    x_ptr,
    a_ptrs,
    router_ptrs,
    h_ptrs,
    probs_ptrs,
    T,
    K,
    R,
    G,
    x_stride_t,
    top_k,
    seed_low0,
    seed_high0,
    seed_low1,
    seed_high1,
    seed_low2,
    seed_high2,
    threshold,
    inverse_keep,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    RENORMALIZES: tl.constexpr,
):
    # one program = one block of tokens; it reads every a and router whole, from L2
    L: tl.constexpr = len(a_ptrs)
    seeds = ((seed_low0, seed_high0), (seed_low1, seed_high1), (seed_low2, seed_high2))
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    g = tl.arange(0, BLOCK_G).to(tl.int64)
    in_T, in_R, in_G = t < T, r < R, g < G
    h_L, logits_L = (), ()
    for _ in tl.static_range(L):
        h_L = h_L + (tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32),)
        logits_L = logits_L + (tl.zeros((BLOCK_T, BLOCK_G), dtype=tl.float32),)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_K = k < K
        in_RK, in_GK = in_R[:, None] & in_K[None, :], in_G[:, None] & in_K[None, :]
        x = tl.load(
            x_ptr + t[:, None] * x_stride_t + k[None, :],
            mask=in_T[:, None] & in_K[None, :],
            other=0.0,
        )
        next_h_L, next_logits_L = (), ()
        for i in tl.static_range(L):
            a = tl.load(a_ptrs[i] + r[:, None] * K + k[None, :], mask=in_RK, other=0.0)
            router = tl.load(router_ptrs[i] + g[:, None] * K + k[None, :], mask=in_GK, other=0.0)
            x_in = x
            if HAS_DROPOUT:
                kept = keeps_input(t, k, seeds[i][0], seeds[i][1], threshold)
                x_in = tl.where(kept, x, 0.0).to(x.dtype)
            next_h_L = next_h_L + (dot(x_in, tl.trans(cast(a, x.dtype)), h_L[i]),)
            next_logits_L = next_logits_L + (dot(x, tl.trans(cast(router, x.dtype)), logits_L[i]),)
        h_L, logits_L = next_h_L, next_logits_L
    for i in tl.static_range(L):
        h = h_L[i]
        if HAS_DROPOUT:
            h = h * inverse_keep
        h = cast(h, h_ptrs[i].dtype.element_ty)
        tl.store(h_ptrs[i] + t[:, None] * R + r[None, :], h, mask=in_T[:, None] & in_R[None, :])
        probs = _gates(logits_L[i], g, in_G, top_k, IS_SPARSE, RENORMALIZES)
        tl.store(
            probs_ptrs[i] + t[:, None] * G + g[None, :], probs, mask=in_T[:, None] & in_G[None, :]
        )


@triton.jit
def _gates(logits, g, in_G, top_k, IS_SPARSE: tl.constexpr, RENORMALIZES: tl.constexpr):
    """Softmax [T, G]; where experts can be dropped, those but the top_k largest are marked."""
    dropped = (g < 0)[None, :] & (logits < 0)
    if IS_SPARSE:
        # below the image of every logit, -inf included
        taken = -(2**31)
        is_expert = (in_G & (g > 0))[None, :]
        image = tl.where(is_expert, sortable(logits), taken)
        for _ in range(top_k):
            _, chosen = tl.max(image, axis=1, return_indices=True)
            image = tl.where(g[None, :] == chosen[:, None], taken, image)
        dropped = is_expert & (image != taken)
    masked = tl.where(in_G[None, :], logits, float("-inf"))
    if RENORMALIZES:
        masked = tl.where(dropped, float("-inf"), masked)
    exps = exp(masked - tl.max(masked, axis=1)[:, None])
    return mark_dropped(tl.div_rn(exps, tl.sum(exps, axis=1)[:, None]), dropped)


def launch_meta(
    R: int,
    G: int,
    dtype: torch.dtype,
    settings: Settings,
    *,
    num_layers: int = 1,
    architecture: int = 80,
) -> Meta:
    block_R, block_G = block_of(R), block_of(G)
    is_wide = num_layers * (block_R + block_G) > 160
    is_fp32, has_dropout = dtype == torch.float32, settings.dropout_p > 0
    # deep blocks: 35 against 41 us for 8192 x 4096 on an H100; others lack the shared memory
    is_deep = architecture in (90, 100) and num_layers * (block_R + block_G) <= 64
    constants = {
        "BLOCK_T": 32 if is_fp32 else 64,
        "BLOCK_K": 32 if is_wide or is_fp32 else 128 if is_deep and not has_dropout else 64,
        "BLOCK_R": block_R,
        "BLOCK_G": block_G,
        "HAS_DROPOUT": has_dropout,
        "IS_SPARSE": settings.is_sparse,
        "RENORMALIZES": settings.is_sparse and settings.renormalize,
    }
    # the hash of dropout needs a register for every element of x
    return Meta(constants, num_warps=8 if is_wide or has_dropout else 4, num_stages=4)


def shrink_route(
    x_TK: Tensor,
    a_LRK: Sequence[Tensor],
    router_LGK: Sequence[Tensor],
    settings_L: Sequence[Settings],
) -> list[tuple[Tensor, Tensor]]:
    """Per layer h (T, R) in x's dtype and probs (T, G) fp32.

    x has rows of stride 1; a and router of the up to three layers are contiguous and of any dtype.
    """
    (T, K), R, G = x_TK.shape, a_LRK[0].shape[0], router_LGK[0].shape[0]
    outputs = [
        (x_TK.new_empty(T, R), x_TK.new_empty(T, G, dtype=torch.float32)) for _ in settings_L
    ]
    meta = launch_meta(
        R,
        G,
        x_TK.dtype,
        settings_L[0],
        num_layers=len(a_LRK),
        architecture=capability(x_TK.device),
    )
    arguments = {
        "x_ptr": x_TK,
        "a_ptrs": tuple(a_LRK),
        "router_ptrs": tuple(router_LGK),
        "h_ptrs": tuple(h_TR for h_TR, _ in outputs),
        "probs_ptrs": tuple(probs_TG for _, probs_TG in outputs),
        "T": T,
        "K": K,
        "R": R,
        "G": G,
        "x_stride_t": x_TK.stride(0),
        "top_k": settings_L[0].top_k or 0,
        **dropout_of_group(settings_L),
    }
    launch(_shrink_route_kernel, (triton.cdiv(T, meta.constants["BLOCK_T"]),), arguments, meta)
    return outputs
