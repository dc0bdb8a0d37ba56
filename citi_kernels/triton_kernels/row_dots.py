"""Row dots: importance scores that need no weight gradient, from one pass over two matrices.

    scores[s] += Σ_{t valid} | Σ_{f in segment s} (a[t, f] - offset[f]) · b[t, f] |

A program owns a tile of the segments and a share of the tokens: dots in fp32, sums over tokens in
the dtype of the scores. `score_sums` adds the shares to the scores. No atomics: two stages.

Shapes: T tokens, F features, S segments of L = F / S features, C shares of the tokens.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.triton_kernels.launch import Meta, launch, next_power_of_2, num_multiprocessors
from citi_kernels.triton_kernels.score_sums import add_score_sums_
from citi_kernels.triton_kernels.up_gradients import shares

# elements of each matrix that a program of 128 threads loads at once; fewer where segments are so
# short that it also keeps about as many sums
_TILE, _TILE_OF_SUMS = 4096, 2048
_MAX_BLOCK_L = 2048
# features side by side in one row: 512 bytes of a 16-bit dtype
_ROW = 256
_MAX_BLOCK_T = 64
# elements of each matrix in flight on one multiprocessor, so that loads hide sums: assumed
_IN_FLIGHT = 16384


@triton.jit
def _row_dots_kernel(
    a_ptr,
    b_ptr,
    valid_ptr,
    offset_ptr,
    parts_ptr,
    T,
    S,
    L,
    a_stride_t,
    a_stride_f,
    b_stride_t,
    b_stride_f,
    offset_stride,
    num_tiles,
    tokens_per_share,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    IS_ONE_CHUNK: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IS_SIGNED: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    share, tile = pid // num_tiles, pid % num_tiles
    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    in_S = s < S
    start = share * tokens_per_share
    end = tl.minimum(start + tokens_per_share, T)
    # a loop of constant bounds that runs once is no loop
    length = BLOCK_L if IS_ONE_CHUNK else L
    total = tl.zeros((BLOCK_T, BLOCK_S), dtype=parts_ptr.dtype.element_ty)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        in_T = t < end
        products = tl.zeros((BLOCK_T, BLOCK_S, BLOCK_L), dtype=tl.float32)
        for l0 in range(0, length, BLOCK_L):
            chunk = l0 + tl.arange(0, BLOCK_L)
            f = (s * L)[:, None] + chunk[None, :]
            in_F = in_S[:, None] & (chunk < L)[None, :]
            inside = in_T[:, None, None] & in_F[None, :, :]
            at_a = (t * a_stride_t)[:, None, None] + (f * a_stride_f)[None, :, :]
            at_b = (t * b_stride_t)[:, None, None] + (f * b_stride_f)[None, :, :]
            a = tl.load(a_ptr + at_a, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + at_b, mask=inside, other=0.0).to(tl.float32)
            if HAS_OFFSET:
                offset = tl.load(offset_ptr + f * offset_stride, mask=in_F, other=0.0)
                a -= offset.to(tl.float32)[None, :, :]
            products += a * b
        dots = tl.sum(products, axis=2)
        if not IS_SIGNED:
            dots = tl.abs(dots)
        counts = in_T
        if HAS_VALID:
            counts = tl.load(valid_ptr + t, mask=in_T, other=0) != 0
        total += tl.where(counts[:, None], dots, 0.0).to(total.dtype)
    tl.store(parts_ptr + share * S + s, tl.sum(total, axis=0), mask=in_S)


def launch_meta(
    S: int, L: int, *, has_valid: bool = False, has_offset: bool = False, is_signed: bool = False
) -> Meta:
    block_L = min(next_power_of_2(L), _MAX_BLOCK_L)
    block_S = max(1, min(_ROW // block_L, next_power_of_2(S)))
    tile = _TILE if block_L >= 8 else _TILE_OF_SUMS
    constants = {
        "BLOCK_T": min(tile // (block_S * block_L), _MAX_BLOCK_T),
        "BLOCK_S": block_S,
        "BLOCK_L": block_L,
        "IS_ONE_CHUNK": block_L >= L,
        "HAS_VALID": has_valid,
        "HAS_OFFSET": has_offset,
        "IS_SIGNED": is_signed,
    }
    return Meta(constants, num_warps=4, num_stages=1)


def accumulate_row_dots_(
    scores_S: Tensor,
    a_TF: Tensor,
    b_TF: Tensor,
    valid_T: Tensor | None,
    offset_F: Tensor | None,
    *,
    is_signed: bool,
) -> None:
    """Adds to the scores, fp64 or fp32; a, b and offset of any strides, valid contiguous."""
    (T, F), S = a_TF.shape, scores_S.shape[0]
    meta = launch_meta(
        S,
        F // S,
        has_valid=valid_T is not None,
        has_offset=offset_F is not None,
        is_signed=is_signed,
    )
    num_tiles = triton.cdiv(S, meta.constants["BLOCK_S"])
    block = [meta.constants[f"BLOCK_{axis}"] for axis in "TSL"]
    num_programs = _IN_FLIGHT // math.prod(block) * num_multiprocessors(a_TF.device)
    num_shares, tokens_per_share = shares(T, block[0], num_tiles, num_programs)
    parts_CS = scores_S.new_empty(num_shares, S)
    arguments = {
        "a_ptr": a_TF,
        "b_ptr": b_TF,
        "valid_ptr": a_TF if valid_T is None else valid_T,
        "offset_ptr": a_TF if offset_F is None else offset_F,
        "parts_ptr": parts_CS,
        "T": T,
        "S": S,
        "L": F // S,
        "a_stride_t": a_TF.stride(0),
        "a_stride_f": a_TF.stride(1),
        "b_stride_t": b_TF.stride(0),
        "b_stride_f": b_TF.stride(1),
        "offset_stride": 1 if offset_F is None else offset_F.stride(0),
        "num_tiles": num_tiles,
        "tokens_per_share": tokens_per_share,
    }
    launch(_row_dots_kernel, (num_shares * num_tiles,), arguments, meta)
    add_score_sums_(scores_S, parts_CS)
