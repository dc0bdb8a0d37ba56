"""Down-projection gradients: da = dhᵀ x and drouter = dlogitsᵀ x from one pass over x.

A program owns a tile of in-features and a share of the tokens; `input_gradient` sums the shares.

Shapes: T tokens, K in-features, R stacked rank (E·r), G gate entries (E + 1), S token shares,
L layers on one x, D rows asked for of each: R, G or R + G.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.triton_kernels.dropout import GROUP_DROPOUT_ARGUMENTS, dropout_of_group
from citi_kernels.triton_kernels.language import dot, keeps_input
from citi_kernels.triton_kernels.launch import Meta, block_of, launch, num_multiprocessors
from citi_kernels.triton_kernels.up_gradients import shares


@triton.jit(do_not_specialize=GROUP_DROPOUT_ARGUMENTS)
def _down_gradients_kernel(
    x_ptr,
    dh_ptrs,
    dlogits_ptrs,
    out_ptrs,
    T,
    K,
    R,
    G,
    D,
    x_stride_t,
    tokens_per_share,
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
    NEEDS_A: tl.constexpr,
    NEEDS_ROUTER: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    L: tl.constexpr = len(dh_ptrs)
    seeds = ((seed_low0, seed_high0), (seed_low1, seed_high1), (seed_low2, seed_high2))
    share, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    g = tl.arange(0, BLOCK_G).to(tl.int64)
    in_K, in_R, in_G = k < K, r < R, g < G
    da_L, drouter_L = (), ()
    for _ in tl.static_range(L):
        da_L = da_L + (tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32),)
        drouter_L = drouter_L + (tl.zeros((BLOCK_K, BLOCK_G), dtype=tl.float32),)
    start = share * tokens_per_share
    end = tl.minimum(start + tokens_per_share, T)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        in_T = t < end
        in_TR, in_TG = in_T[:, None] & in_R[None, :], in_T[:, None] & in_G[None, :]
        x = tl.load(
            x_ptr + t[:, None] * x_stride_t + k[None, :],
            mask=in_T[:, None] & in_K[None, :],
            other=0.0,
        )
        next_da_L, next_drouter_L = (), ()
        for i in tl.static_range(L):
            da, drouter = da_L[i], drouter_L[i]
            if NEEDS_ROUTER:
                at = dlogits_ptrs[i] + t[:, None] * G + g[None, :]
                drouter = dot(tl.trans(x), tl.load(at, mask=in_TG, other=0.0), drouter)
            if NEEDS_A:
                x_in = x
                if HAS_DROPOUT:
                    kept = keeps_input(t, k, seeds[i][0], seeds[i][1], threshold)
                    x_in = tl.where(kept, x, 0.0).to(x.dtype)
                at = dh_ptrs[i] + t[:, None] * R + r[None, :]
                da = dot(tl.trans(x_in), tl.load(at, mask=in_TR, other=0.0), da)
            next_da_L, next_drouter_L = next_da_L + (da,), next_drouter_L + (drouter,)
        da_L, drouter_L = next_da_L, next_drouter_L
    for i in tl.static_range(L):
        row = share * D
        if NEEDS_A:
            da = da_L[i]
            if HAS_DROPOUT:
                da = da * inverse_keep
            at = out_ptrs[i] + (row + r[None, :]) * K + k[:, None]
            tl.store(at, da, mask=in_K[:, None] & in_R[None, :])
            row += R
        if NEEDS_ROUTER:
            at = out_ptrs[i] + (row + g[None, :]) * K + k[:, None]
            tl.store(at, drouter_L[i], mask=in_K[:, None] & in_G[None, :])


def launch_meta(
    R: int,
    G: int,
    dtype: torch.dtype,
    *,
    num_layers: int = 1,
    needs_a: bool = True,
    needs_router: bool = True,
    has_dropout: bool = False,
) -> Meta:
    block_R, block_G = block_of(R) if needs_a else 16, block_of(G) if needs_router else 16
    is_wide = num_layers * (block_R + block_G) > 160
    is_fp32 = dtype == torch.float32
    # Triton 3.6 has ptxas wait after every wgmma of two such products on more rows than a warp
    # group's 64, but not where dropout brings x through registers
    is_one_group = not (is_wide or is_fp32 or has_dropout)
    constants = {
        "BLOCK_T": 32 if is_fp32 else 64,
        "BLOCK_K": 128 if has_dropout and not (is_wide or is_fp32) else 64,
        "BLOCK_R": block_R,
        "BLOCK_G": block_G,
        "NEEDS_A": needs_a,
        "NEEDS_ROUTER": needs_router,
        "HAS_DROPOUT": has_dropout,
    }
    return Meta(constants, num_warps=4 if is_one_group else 8, num_stages=3)


def down_gradients(
    x_TK: Tensor,
    dh_LTR: Sequence[Tensor],
    dlogits_LTG: Sequence[Tensor],
    settings_L: Sequence[Settings],
    *,
    needs_a: bool,
    needs_router: bool,
) -> list[Tensor]:
    """Per layer parts (S, D, K) fp32 of [da; drouter], of the rows asked for."""
    (T, K), R, G = x_TK.shape, dh_LTR[0].shape[1], dlogits_LTG[0].shape[1]
    D = R * needs_a + G * needs_router
    meta = launch_meta(
        R,
        G,
        x_TK.dtype,
        num_layers=len(dh_LTR),
        needs_a=needs_a,
        needs_router=needs_router,
        has_dropout=settings_L[0].dropout_p > 0,
    )
    num_tiles = triton.cdiv(K, meta.constants["BLOCK_K"])
    num_shares, tokens_per_share = shares(
        T, meta.constants["BLOCK_T"], num_tiles, 2 * num_multiprocessors(x_TK.device)
    )
    outputs = [x_TK.new_empty(num_shares, D, K, dtype=torch.float32) for _ in dh_LTR]
    arguments = {
        "x_ptr": x_TK,
        "dh_ptrs": tuple(dh_LTR),
        "dlogits_ptrs": tuple(dlogits_LTG),
        "out_ptrs": tuple(outputs),
        "T": T,
        "K": K,
        "R": R,
        "G": G,
        "D": D,
        "x_stride_t": x_TK.stride(0),
        "tokens_per_share": tokens_per_share,
        **dropout_of_group(settings_L),
    }
    launch(_down_gradients_kernel, (num_shares, num_tiles), arguments, meta)
    return outputs
