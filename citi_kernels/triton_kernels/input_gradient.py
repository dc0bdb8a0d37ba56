"""Input gradient: the sum over layers of dh a + dlogits router; and sums over parts.

One launch does both: the programs that sum the parts of db, da and drouter come first, each other
one owns a tile of dx.

Shapes: T tokens, K in-features, R stacked rank (E·r), G gate entries (E + 1), S parts, L layers on
one x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.triton_kernels.dropout import GROUP_DROPOUT_ARGUMENTS, dropout_of_group
from citi_kernels.triton_kernels.language import cast, dot, dot_of_kept, keeps_input
from citi_kernels.triton_kernels.launch import Meta, block_of, launch

_BLOCK_SUM = 1024


class Parts(NamedTuple):
    """parts[s, first : first + size of out], summed over s, goes to out."""

    parts: Tensor  # (S, M) fp32, contiguous; M may be several dimensions
    first: int
    out: Tensor  # contiguous, any dtype


@triton.jit(do_not_specialize=GROUP_DROPOUT_ARGUMENTS)
def _input_gradient_kernel(
    dx_ptr,
    dh_ptrs,
    dlogits_ptrs,
    a_ptrs,
    router_ptrs,
    probs_ptrs,
    parts_ptrs,
    out_ptrs,
    nums_parts,
    part_strides,
    firsts,
    sizes,
    ends,
    T,
    K,
    R,
    G,
    rank,
    num_tiles_k,
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
    BLOCK_SUM: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    IS_SPARSE: tl.constexpr,
    NUM_SUMS: tl.constexpr,
):
    L: tl.constexpr = len(dh_ptrs)
    pid = tl.program_id(0).to(tl.int64)
    # sum j owns the programs from ends[j] to ends[j + 1]; the tiles of dx follow the last sum
    for j in tl.static_range(NUM_SUMS):
        if (pid >= ends[j]) & (pid < ends[j + 1]):
            i = (pid - ends[j]) * BLOCK_SUM + tl.arange(0, BLOCK_SUM)
            inside = i < sizes[j]
            total = tl.zeros((BLOCK_SUM,), dtype=tl.float32)
            at = parts_ptrs[j] + firsts[j] + i
            for _ in tl.range(0, nums_parts[j], loop_unroll_factor=4):
                total += tl.load(at, mask=inside, other=0.0)
                at += part_strides[j]
            tl.store(out_ptrs[j] + i, cast(total, out_ptrs[j].dtype.element_ty), mask=inside)
    if pid >= ends[NUM_SUMS]:
        seeds = ((seed_low0, seed_high0), (seed_low1, seed_high1), (seed_low2, seed_high2))
        tile = pid - ends[NUM_SUMS]
        t = (tile // num_tiles_k) * BLOCK_T + tl.arange(0, BLOCK_T)
        k = (tile % num_tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
        r = tl.arange(0, BLOCK_R).to(tl.int64)
        g = tl.arange(0, BLOCK_G).to(tl.int64)
        in_T, in_K, in_R, in_G = t < T, k < K, r < R, g < G
        in_TR, in_TG = in_T[:, None] & in_R[None, :], in_T[:, None] & in_G[None, :]
        in_RK, in_GK = in_R[:, None] & in_K[None, :], in_G[:, None] & in_K[None, :]
        update = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
        for i in tl.static_range(L):
            dh = tl.load(dh_ptrs[i] + t[:, None] * R + r[None, :], mask=in_TR, other=0.0)
            a = cast(
                tl.load(a_ptrs[i] + r[:, None] * K + k[None, :], mask=in_RK, other=0.0), dh.dtype
            )
            through_a = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
            if not HAS_DROPOUT:
                through_a = update
            through_a = dot_of_kept(dh, a, through_a, probs_ptrs[i], t, r, in_T, G, rank, IS_SPARSE)
            if HAS_DROPOUT:
                kept = keeps_input(t, k, seeds[i][0], seeds[i][1], threshold)
                update += tl.where(kept, through_a * inverse_keep, 0.0)
            else:
                update = through_a
            dlogits = tl.load(dlogits_ptrs[i] + t[:, None] * G + g[None, :], mask=in_TG, other=0.0)
            router = tl.load(router_ptrs[i] + g[:, None] * K + k[None, :], mask=in_GK, other=0.0)
            update = dot(dlogits, cast(router, dh.dtype), update)
        dx_ptrs, in_dx = dx_ptr + t[:, None] * K + k[None, :], in_T[:, None] & in_K[None, :]
        tl.store(dx_ptrs, cast(update, dx_ptr.dtype.element_ty), mask=in_dx)


def launch_meta(
    R: int,
    G: int,
    dtype: torch.dtype,
    settings: Settings,
    *,
    num_layers: int,
    num_sums: int,
) -> Meta:
    block_R, block_G = block_of(R), block_of(G)
    is_heavy = block_R + block_G > 64 or dtype == torch.float32
    constants = {
        "BLOCK_T": 32 if dtype == torch.float32 else 64,
        "BLOCK_K": 64 if is_heavy else 128,
        "BLOCK_R": block_R,
        "BLOCK_G": block_G,
        "BLOCK_SUM": _BLOCK_SUM,
        "HAS_DROPOUT": settings.dropout_p > 0,
        "IS_SPARSE": settings.is_sparse,
        "NUM_SUMS": num_sums,
    }
    needs_registers = is_heavy or settings.is_sparse or num_layers > 1
    return Meta(constants, num_warps=8 if needs_registers else 4, num_stages=1)


def input_gradient_(
    dx_TK: Tensor | None,
    dh_LTR: Sequence[Tensor],
    dlogits_LTG: Sequence[Tensor],
    a_LRK: Sequence[Tensor],
    router_LGK: Sequence[Tensor],
    probs_LTG: Sequence[Tensor],
    sums: Sequence[Parts],
    settings_L: Sequence[Settings],
) -> None:
    """Writes the update to dx and fills the `out` of every sum.

    dx None: the sums alone. Up to three layers.
    """
    (R, K), G, T = a_LRK[0].shape, router_LGK[0].shape[0], dh_LTR[0].shape[0]
    meta = launch_meta(
        R,
        G,
        dh_LTR[0].dtype,
        settings_L[0],
        num_layers=len(dh_LTR),
        num_sums=len(sums),
    )
    num_tiles_k = triton.cdiv(K, meta.constants["BLOCK_K"])
    num_tiles = 0 if dx_TK is None else triton.cdiv(T, meta.constants["BLOCK_T"]) * num_tiles_k
    ends = [0]
    for each in sums:
        ends.append(ends[-1] + triton.cdiv(each.out.numel(), _BLOCK_SUM))
    arguments = {
        "dx_ptr": dh_LTR[0] if dx_TK is None else dx_TK,
        "dh_ptrs": tuple(dh_LTR),
        "dlogits_ptrs": tuple(dlogits_LTG),
        "a_ptrs": tuple(a_LRK),
        "router_ptrs": tuple(router_LGK),
        "probs_ptrs": tuple(probs_LTG),
        "parts_ptrs": tuple(each.parts for each in sums),
        "out_ptrs": tuple(each.out for each in sums),
        "nums_parts": tuple(each.parts.shape[0] for each in sums),
        "part_strides": tuple(each.parts.stride(0) for each in sums),
        "firsts": tuple(each.first for each in sums),
        "sizes": tuple(each.out.numel() for each in sums),
        "ends": tuple(ends),
        "T": T,
        "K": K,
        "R": R,
        "G": G,
        "rank": R // settings_L[0].num_experts,
        "num_tiles_k": num_tiles_k,
        **dropout_of_group(settings_L),
    }
    launch(_input_gradient_kernel, (ends[-1] + num_tiles,), arguments, meta)
