"""Parameter scores: | W ⊙ gᵀx |, one tile of gᵀx at a time, multiplied by W and reduced in place.

    scores += scale · | W[i, j] · Σ_{t valid} g[t, i] · x[t, j] |        per_token: of |g|, |x|, |W|

A program owns a tile of the weight and passes over all tokens: the absolute value needs the whole
sum, so tokens are not split, and a small weight is cut into smaller tiles instead. Elements go
straight into the scores; sums of a tile's rows, columns or both go to a workspace that `score_sums`
adds to the scores. No atomics.

Shapes: T tokens, K in-features, N out-features, P segments of rows, Q of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.counter_hash import as_int32
from citi_kernels.triton_kernels.language import INTERPRETS, cast, dot, random_bits
from citi_kernels.triton_kernels.launch import Meta, launch, num_multiprocessors
from citi_kernels.triton_kernels.persistent import tile_place
from citi_kernels.triton_kernels.score_sums import add_score_sums_

# (BLOCK_N, BLOCK_K, warps, time of an element over that of the first); times: not yet measured
_TILES_16_BIT = ((128, 256, 8, 1.0), (128, 128, 8, 1.1), (128, 64, 8, 1.4))
_TILES_32_BIT = ((64, 64, 4, 1.0),)


@triton.jit(do_not_specialize=("seed_low", "seed_high"))
def _parameter_scores_kernel(
    g_ptr,
    x_ptr,
    weight_ptr,
    valid_ptr,
    out_ptr,
    T,
    N,
    K,
    g_stride_t,
    g_stride_n,
    x_stride_t,
    x_stride_k,
    weight_stride_n,
    weight_stride_k,
    num_tiles_n,
    num_tiles_k,
    scale,
    seed_low,
    seed_high,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    GRANULARITY: tl.constexpr,
    HAS_VALID: tl.constexpr,
    IS_PER_TOKEN: tl.constexpr,
    IS_FP32: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    tile_n, tile_k = tile_place(tile, num_tiles_n, num_tiles_k, GROUP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    in_N, in_K = n < N, k < K
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for t0 in range(0, T, BLOCK_T):
        if IS_FP32:
            # one chain of additions over all tokens would lose the last bits
            if t0 % 128 == 0:
                total += acc
                acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
        counts = t < T
        if HAS_VALID:
            counts = tl.load(valid_ptr + t, mask=counts, other=0) != 0
        # what does not count is not loaded: its NaN stays out of the product
        at_g = (t * g_stride_t)[:, None] + (n * g_stride_n)[None, :]
        g = tl.load(g_ptr + at_g, mask=counts[:, None] & in_N[None, :], other=0.0)
        at_x = (t * x_stride_t)[:, None] + (k * x_stride_k)[None, :]
        x = tl.load(x_ptr + at_x, mask=counts[:, None] & in_K[None, :], other=0.0)
        x = cast(x, g.dtype)
        if IS_PER_TOKEN:
            g, x = _magnitude(g), _magnitude(x)
        acc = dot(tl.trans(g), x, acc)
    if IS_FP32:
        acc += total
    inside = in_N[:, None] & in_K[None, :]
    at_weight = (n * weight_stride_n)[:, None] + (k * weight_stride_k)[None, :]
    weight = tl.load(weight_ptr + at_weight, mask=inside, other=0.0).to(tl.float32)
    scores = tl.abs(acc * weight) * scale
    # beyond the edge a factor of 0 may have met inf, so that is selected away
    if GRANULARITY == "elements":
        _add_elements(out_ptr, scores, n, k, inside, K, seed_low, seed_high)
    elif GRANULARITY == "rows":
        sums_N = tl.sum(tl.where(in_K[None, :], scores, 0.0), axis=1)
        tl.store(out_ptr + tile_k * N + n, sums_N, mask=in_N)
    elif GRANULARITY == "columns":
        sums_K = tl.sum(tl.where(in_N[:, None], scores, 0.0), axis=0)
        tl.store(out_ptr + tile_n * K + k, sums_K, mask=in_K)
    else:
        tl.store(out_ptr + tile, tl.sum(tl.where(inside, scores, 0.0)))


@triton.jit
def _magnitude(value):
    if INTERPRETS:
        return tl.abs(value.to(tl.float32)).to(value.dtype)
    return tl.abs(value)


@triton.jit
def _add_elements(scores_ptr, added, n, k, inside, K, seed_low, seed_high):
    """scores[n, k] += added; bf16 is rounded as `importance_torch` does, bit by bit."""
    at = scores_ptr + n[:, None] * K + k[None, :]
    before = tl.load(at, mask=inside, other=0.0)
    if scores_ptr.dtype.element_ty == tl.bfloat16:
        total = before.to(tl.float32) + added
        bits = random_bits(n, k, seed_low, seed_high) & 0xFFFF
        bits = (bits + total.to(tl.uint32, bitcast=True)) & 0xFFFF0000
        # adding to the bits of inf or NaN would change what it is
        is_finite = tl.abs(total) < float("inf")
        total = tl.where(is_finite, bits.to(tl.float32, bitcast=True), total)
        tl.store(at, cast(total, tl.bfloat16), mask=inside)
    else:
        tl.store(at, before + added.to(before.dtype), mask=inside)


def launch_meta(
    N: int,
    K: int,
    dtype: torch.dtype,
    scores_dtype: torch.dtype,
    granularity: str,
    num_programs: int,
    *,
    is_demanding: bool = False,
    has_valid: bool = False,
    is_per_token: bool = False,
) -> Meta:
    """The tiles whose waves over the multiprocessors take the least time; large ones on a tie.

    is_demanding: x or weight is fp32 where g, of `dtype`, is not, or x or g has no contiguous rows.
    """

    def time(tile: tuple[int, int, int, float]) -> float:
        block_N, block_K, _, time_of_element = tile
        num_tiles = triton.cdiv(N, block_N) * triton.cdiv(K, block_K)
        return triton.cdiv(num_tiles, num_programs) * block_N * block_K * time_of_element

    is_fp32 = dtype == torch.float32
    tiles = _TILES_32_BIT if is_fp32 else _TILES_16_BIT
    # the larger would spill, or need more shared memory than there is
    if not is_fp32 and granularity == "elements" and scores_dtype == torch.float64:
        tiles = tiles[2:]
    elif not is_fp32 and (is_demanding or is_per_token or granularity == "elements"):
        tiles = tiles[1:]
    block_N, block_K, num_warps, _ = min(tiles, key=time)
    constants = {
        "BLOCK_T": 32 if is_fp32 else 64,
        "BLOCK_N": block_N,
        "BLOCK_K": block_K,
        "GROUP": 8,
        "GRANULARITY": granularity,
        "HAS_VALID": has_valid,
        "IS_PER_TOKEN": is_per_token,
        "IS_FP32": is_fp32,
    }
    return Meta(constants, num_warps=num_warps, num_stages=3)


def granularity_of(scores_PQ: Tensor, weight_NK: Tensor) -> str | None:
    """What the shape of the scores asks for; None where the kernel cannot reduce to it."""
    if scores_PQ.shape == weight_NK.shape:
        return "elements"
    if scores_PQ.numel() == 1:
        return "component"
    if scores_PQ.shape[1] == 1:
        return "rows"
    return "columns" if scores_PQ.shape[0] == 1 else None


def accumulate_parameter_scores_(
    scores_PQ: Tensor,
    weight_NK: Tensor,
    x_TK: Tensor,
    g_TN: Tensor,
    valid_T: Tensor | None,
    *,
    is_per_token: bool,
    scale: float,
    seed: int,
) -> None:
    """Adds to the scores, contiguous; all but valid, which is contiguous, of any strides."""
    (T, K), N = x_TK.shape, g_TN.shape[1]
    granularity = granularity_of(scores_PQ, weight_NK)
    meta = launch_meta(
        N,
        K,
        g_TN.dtype,
        scores_PQ.dtype,
        granularity,
        num_multiprocessors(x_TK.device),
        is_demanding=torch.float32 in (x_TK.dtype, weight_NK.dtype)
        or not (x_TK.stride(1) == g_TN.stride(1) == 1),
        has_valid=valid_T is not None,
        is_per_token=is_per_token,
    )
    num_tiles_n = triton.cdiv(N, meta.constants["BLOCK_N"])
    num_tiles_k = triton.cdiv(K, meta.constants["BLOCK_K"])
    out = scores_PQ
    if granularity != "elements":
        sizes = {
            "rows": (num_tiles_k, N),
            "columns": (num_tiles_n, K),
            "component": (1, num_tiles_n * num_tiles_k),
        }
        out = scores_PQ.new_empty(sizes[granularity], dtype=torch.float32)
    arguments = {
        "g_ptr": g_TN,
        "x_ptr": x_TK,
        "weight_ptr": weight_NK,
        "valid_ptr": g_TN if valid_T is None else valid_T,
        "out_ptr": out,
        "T": T,
        "N": N,
        "K": K,
        "g_stride_t": g_TN.stride(0),
        "g_stride_n": g_TN.stride(1),
        "x_stride_t": x_TK.stride(0),
        "x_stride_k": x_TK.stride(1),
        "weight_stride_n": weight_NK.stride(0),
        "weight_stride_k": weight_NK.stride(1),
        "num_tiles_n": num_tiles_n,
        "num_tiles_k": num_tiles_k,
        "scale": float(scale),
        "seed_low": as_int32(seed),
        "seed_high": as_int32(seed >> 32),
    }
    launch(_parameter_scores_kernel, (num_tiles_n * num_tiles_k,), arguments, meta)
    if granularity != "elements":
        add_score_sums_(scores_PQ, out)
