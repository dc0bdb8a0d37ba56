"""Up-projection gradients: du = dy b and db = dyᵀ u from one pass over dy.

A program owns a tile of out-features and a share of the tokens: its part of db stays in registers,
its part of du goes to a workspace, summed over the tiles by `rank_gradients`. The parts of db are
summed by `input_gradient`. No atomics: two stages.

Shapes: T tokens, N out-features, R stacked rank (E·r), G gate entries, S shares of the tokens,
C tiles of N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.triton_kernels.language import cast, dot, scaled_rank
from citi_kernels.triton_kernels.launch import Meta, block_of, launch, num_multiprocessors


@triton.jit
def _up_gradients_kernel(
    dy_ptr,
    b_ptr,
    h_ptr,
    probs_ptr,
    du_ptr,
    db_ptr,
    T,
    N,
    R,
    G,
    rank,
    tokens_per_share,
    scaling,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NEEDS_DU: tl.constexpr,
):
    share, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_N, in_R = n < N, r < R
    dtype = dy_ptr.dtype.element_ty
    in_b = in_N[:, None] & in_R[None, :]
    b = cast(tl.load(b_ptr + n[:, None] * R + r[None, :], mask=in_b, other=0.0), dtype)
    db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    start = share * tokens_per_share
    end = tl.minimum(start + tokens_per_share, T)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        in_T = t < end
        dy = tl.load(
            dy_ptr + t[:, None] * N + n[None, :], mask=in_T[:, None] & in_N[None, :], other=0.0
        )
        u = scaled_rank(h_ptr, probs_ptr, t, r, in_T, in_R, R, G, rank, scaling)
        db = dot(tl.trans(dy), u, db)
        if NEEDS_DU:
            du = dot(dy, b, tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32))
            tl.store(
                du_ptr + (tile * T + t[:, None]) * R + r[None, :],
                du,
                mask=in_T[:, None] & in_R[None, :],
            )
    tl.store(db_ptr + (share * N + n[:, None]) * R + r[None, :], db, mask=in_b)


def launch_meta(R: int, dtype: torch.dtype, *, needs_du: bool) -> Meta:
    block_R = block_of(R)
    if dtype == torch.float32:
        block_T, block_N = 32, 32 if block_R <= 32 else 16
    else:
        block_T = 64 if block_R < 256 else 32
        block_N = {16: 256, 32: 256, 64: 128}.get(block_R, 64)
    constants = {
        "BLOCK_T": block_T,
        "BLOCK_N": block_N,
        "BLOCK_R": block_R,
        "NEEDS_DU": needs_du,
    }
    return Meta(constants, num_warps=8, num_stages=3 if block_R <= 64 else 2)


def up_gradients(
    dy_TN: Tensor,
    b_NR: Tensor,
    h_TR: Tensor,
    probs_TG: Tensor,
    settings: Settings,
    *,
    needs_du: bool,
) -> tuple[Tensor | None, Tensor]:
    """Parts of du (C, T, R) or None, and of db (S, N, R), all fp32."""
    (T, N), R, G = dy_TN.shape, h_TR.shape[1], probs_TG.shape[1]
    meta = launch_meta(R, dy_TN.dtype, needs_du=needs_du)
    num_tiles = triton.cdiv(N, meta.constants["BLOCK_N"])
    num_shares, tokens_per_share = shares(
        T, meta.constants["BLOCK_T"], num_tiles, num_multiprocessors(dy_TN.device)
    )
    du_CTR = h_TR.new_empty(num_tiles, T, R, dtype=torch.float32) if needs_du else None
    db_SNR = h_TR.new_empty(num_shares, N, R, dtype=torch.float32)
    arguments = {
        "dy_ptr": dy_TN,
        "b_ptr": b_NR,
        "h_ptr": h_TR,
        "probs_ptr": probs_TG,
        "du_ptr": db_SNR if du_CTR is None else du_CTR,
        "db_ptr": db_SNR,
        "T": T,
        "N": N,
        "R": R,
        "G": G,
        "rank": R // settings.num_experts,
        "tokens_per_share": tokens_per_share,
        "scaling": settings.scaling,
    }
    launch(_up_gradients_kernel, (num_shares, num_tiles), arguments, meta)
    return du_CTR, db_SNR


def shares(T: int, block_T: int, num_tiles: int, num_programs: int) -> tuple[int, int]:
    """How many shares to cut the tokens into, and the tokens of each: about one program each.

    At least one share, so that no token at all gives gradients of zero.
    """
    num_blocks = max(triton.cdiv(T, block_T), 1)
    wanted = max(1, min(num_programs // max(num_tiles, 1), num_blocks))
    per_share = triton.cdiv(num_blocks, wanted)
    return triton.cdiv(num_blocks, per_share), per_share * block_T
