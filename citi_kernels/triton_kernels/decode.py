"""A whole layer for few tokens in two launches: the weight is read once, by every multiprocessor.

    rows     partial[s] = x [weight; a; router]ᵀ over the s-th part of K, fp32
    finish   h and logits summed over the parts; gate = softmax; y = base + bias + u bᵀ

Or the update alone, added in place to a base product that cuBLAS computed: the same two launches
without the rows of weight. For one block of tokens `shrink_route` would run on one multiprocessor.

Every program of the second launch sums the rank rows itself, which is cheaper than a third launch.
No program waits for another and no result depends on which ran first; a token's result depends
on no other token.

Shapes: T tokens, K in-features, N out-features, R stacked rank (E·r), G gate entries (E + 1),
S parts of K, Z columns of a part: R, G and N, the first two rounded up to a multiple of 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Operands, Settings
from citi_kernels.triton_kernels.dropout import DROPOUT_ARGUMENTS, dropout_of
from citi_kernels.triton_kernels.language import cast, dot, exp, keeps_input
from citi_kernels.triton_kernels.launch import Meta, block_of, launch, num_multiprocessors

MAX_TOKENS = 64
MAX_RANK = 256
_MAX_SPLITS = 8


@triton.jit
def _row_products(
    x_ptr,
    row_ptr,
    partial_ptr,
    first_row,
    num_rows,
    k_first,
    k_end,
    sizes,
    strides,
    dropout,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """Store x times BLOCK_N rows, over K from k_first to k_end; partial_ptr is at row 0."""
    T, K, Z = sizes
    x_stride_t, stride_n, stride_k = strides
    seed_low0, seed_high0, threshold = dropout
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    n = first_row + tl.arange(0, BLOCK_N)
    in_T, in_N = t < T, n < num_rows
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k0 in range(k_first, k_end, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        # K, not k_end: known to divide by 16, so that loads stay wide
        in_K = k < K
        x = tl.load(
            x_ptr + t[:, None] * x_stride_t + k[None, :],
            mask=in_T[:, None] & in_K[None, :],
            other=0.0,
        )
        rows = tl.load(
            row_ptr + n[:, None] * stride_n + k[None, :] * stride_k,
            mask=in_N[:, None] & in_K[None, :],
            other=0.0,
        )
        if HAS_DROPOUT:
            x = tl.where(keeps_input(t, k, seed_low0, seed_high0, threshold), x, 0.0).to(x.dtype)
        acc = dot(x, tl.trans(cast(rows, x.dtype)), acc)
    tl.store(partial_ptr + t[:, None] * Z + n[None, :], acc, mask=in_T[:, None] & in_N[None, :])


@triton.jit(do_not_specialize=("T", *DROPOUT_ARGUMENTS))
def _rows_kernel(
    x_ptr,
    weight_ptr,
    a_ptr,
    router_ptr,
    partial_ptr,
    T,
    K,
    N,
    R,
    G,
    Z,
    first_logit,
    first_base,
    x_stride_t,
    weight_stride_n,
    weight_stride_k,
    seed_low0,
    seed_high0,
    threshold,
    inverse_keep,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_OF_SPLIT: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # one program = one block of rows times one part of K; the few rank rows go first
    program = tl.program_id(0).to(tl.int64)
    tile, split = program // NUM_SPLITS, program % NUM_SPLITS
    partial_ptr += split * T * Z
    k_first = split * K_OF_SPLIT
    k_end = tl.minimum(k_first + K_OF_SPLIT, K)
    sizes = (T, K, Z)
    dropout = (seed_low0, seed_high0, threshold)
    num_a_tiles, num_router_tiles = tl.cdiv(R, BLOCK_RANK), tl.cdiv(G, BLOCK_RANK)
    if tile < num_a_tiles:
        _row_products(
            x_ptr, a_ptr, partial_ptr, tile * BLOCK_RANK, R, k_first, k_end,
            sizes, (x_stride_t, K, 1), dropout, BLOCK_T, BLOCK_RANK, BLOCK_K, HAS_DROPOUT,
        )  # fmt: skip
    elif tile < num_a_tiles + num_router_tiles:
        first_row = (tile - num_a_tiles) * BLOCK_RANK
        _row_products(
            x_ptr, router_ptr, partial_ptr + first_logit, first_row, G, k_first, k_end,
            sizes, (x_stride_t, K, 1), dropout, BLOCK_T, BLOCK_RANK, BLOCK_K, False,
        )  # fmt: skip
    else:
        first_row = (tile - num_a_tiles - num_router_tiles) * BLOCK_N
        strides = (x_stride_t, weight_stride_n, weight_stride_k)
        _row_products(
            x_ptr, weight_ptr, partial_ptr + first_base, first_row, N, k_first, k_end,
            sizes, strides, dropout, BLOCK_T, BLOCK_N, BLOCK_K, False,
        )  # fmt: skip


@triton.jit
def _sum_splits(partial_ptr, t, column, mask, T, Z, NUM_SPLITS: tl.constexpr):
    """[t, column] summed over the parts of K, in their order."""
    total = tl.load(partial_ptr + t[:, None] * Z + column[None, :], mask=mask, other=0.0)
    for _ in tl.static_range(1, NUM_SPLITS):
        t += T
        total += tl.load(partial_ptr + t[:, None] * Z + column[None, :], mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=("T", "inverse_keep"))
def _finish_kernel(
    partial_ptr,
    bias_ptr,
    b_ptr,
    y_ptr,
    h_ptr,
    probs_ptr,
    T,
    N,
    R,
    G,
    Z,
    first_logit,
    first_base,
    rank,
    scaling,
    inverse_keep,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    # one program = all tokens times one block of N; the first also stores h and probs
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.arange(0, BLOCK_G).to(tl.int64)
    in_T, in_N, in_G = t < T, n < N, g < G
    in_TN, in_TG = in_T[:, None] & in_N[None, :], in_T[:, None] & in_G[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    if HAS_WEIGHT:
        acc = _sum_splits(partial_ptr + first_base, t, n, in_TN, T, Z, NUM_SPLITS)
    if ADDS:
        y = tl.load(y_ptr + t[:, None] * N + n[None, :], mask=in_TN, other=0.0)
        acc = y.to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=in_N, other=0.0).to(tl.float32)[None, :]

    logits_ptr = partial_ptr + first_logit
    logits = _sum_splits(logits_ptr, t, g, in_TG, T, Z, NUM_SPLITS)
    logits = tl.where(in_G[None, :], logits, float("-inf"))
    largest = tl.max(logits, axis=1)
    exps = exp(logits - largest[:, None])
    total = tl.sum(exps, axis=1)
    if tile == 0:
        tl.store(
            probs_ptr + t[:, None] * G + g[None, :], tl.div_rn(exps, total[:, None]), mask=in_TG
        )
    for r0 in range(0, R, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        in_R = r < R
        in_TR = in_T[:, None] & in_R[None, :]
        h = _sum_splits(partial_ptr, t, r, in_TR, T, Z, NUM_SPLITS) * inverse_keep
        h = cast(h, dtype)
        # the logit of a row's expert once more, which needs no exchange between threads
        gate = _sum_splits(logits_ptr, t, 1 + r // rank, in_TR, T, Z, NUM_SPLITS)
        gate = tl.div_rn(exp(gate - largest[:, None]), total[:, None])
        u = cast(h.to(tl.float32) * (scaling * gate), dtype)
        b = tl.load(
            b_ptr + n[:, None] * R + r[None, :], mask=in_N[:, None] & in_R[None, :], other=0.0
        )
        acc = dot(u, tl.trans(cast(b, dtype)), acc)
        if tile == 0:
            tl.store(h_ptr + t[:, None] * R + r[None, :], h, mask=in_TR)
    tl.store(y_ptr + t[:, None] * N + n[None, :], cast(acc, dtype), mask=in_TN)


def rows_launch_meta(
    T: int, N: int, K: int, dtype: torch.dtype, *, num_programs: int, has_dropout: bool
) -> Meta:
    """Constants of the first launch; N is 0 without a weight. The parts of K depend on no token."""
    block_K = 64 if dtype == torch.float32 else 128
    block_N, block_T = 64, block_of(T)
    num_blocks = max(1, triton.cdiv(K, block_K))
    # twice as many programs as multiprocessors, so that the memory always has something to fetch
    wanted = triton.cdiv(2 * num_programs, triton.cdiv(N, block_N) + 1)
    blocks_of_split = triton.cdiv(num_blocks, min(wanted, num_blocks, _MAX_SPLITS))
    constants = {
        "BLOCK_T": block_T,
        "BLOCK_N": block_N,
        "BLOCK_RANK": 32,
        "BLOCK_K": block_K,
        "K_OF_SPLIT": blocks_of_split * block_K,
        "NUM_SPLITS": triton.cdiv(num_blocks, blocks_of_split),
        "HAS_DROPOUT": has_dropout,
    }
    return Meta(constants, num_warps=4, num_stages=3 if block_T == 64 else 4)


def finish_launch_meta(
    T: int, R: int, G: int, *, num_splits: int, has_weight: bool, has_bias: bool, adds: bool
) -> Meta:
    constants = {
        "BLOCK_T": block_of(T),
        "BLOCK_N": 32,
        "BLOCK_R": min(block_of(R), 32),
        "BLOCK_G": block_of(G),
        "NUM_SPLITS": num_splits,
        "HAS_WEIGHT": has_weight,
        "HAS_BIAS": has_bias,
        "ADDS": adds,
    }
    return Meta(constants, num_warps=8 if constants["BLOCK_T"] == 64 else 4, num_stages=1)


def takes(x_TK: Tensor, R: int) -> bool:
    """Whether `decode_linear` takes x at this rank, with up to 128 gates and whatever weight."""
    return (
        x_TK.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x_TK.shape[0] <= MAX_TOKENS
        and R <= MAX_RANK
    )


def decode_linear(
    operands: Operands, settings: Settings, *, base_TN: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, N) and h (T, R) in x's dtype, probs (T, G) fp32, for what `takes` takes.

    weight has any strides or is None; rows of x may lie apart; the others are contiguous. With
    base, which holds x weightᵀ + bias, the update is added to it in place, and it is y.
    """
    adds = base_TN is not None
    if adds:
        operands = operands._replace(weight=None, bias=None)
    x_TK, weight_NK, bias_N, _, b_NR, router_GK = operands
    (T, K), (N, R), G = x_TK.shape, b_NR.shape, router_GK.shape[0]
    base_N = 0 if weight_NK is None else N
    rows = rows_launch_meta(
        T,
        base_N,
        K,
        x_TK.dtype,
        num_programs=num_multiprocessors(x_TK.device),
        has_dropout=settings.dropout_p > 0,
    )
    num_splits = rows.constants["NUM_SPLITS"]
    first_logit = triton.cdiv(R, 16) * 16
    first_base = first_logit + triton.cdiv(G, 16) * 16
    width = first_base + triton.cdiv(base_N, 16) * 16
    partial_STZ = x_TK.new_empty(num_splits, T, width, dtype=torch.float32)
    columns = {"Z": width, "first_logit": first_logit, "first_base": first_base}
    dropout = dropout_of(settings)
    _launch_rows(operands, partial_STZ, {**columns, **dropout}, rows, base_N)

    y_TN = base_TN if adds else x_TK.new_empty(T, N)
    h_TR = x_TK.new_empty(T, R)
    probs_TG = x_TK.new_empty(T, G, dtype=torch.float32)
    finish = finish_launch_meta(
        T,
        R,
        G,
        num_splits=num_splits,
        has_weight=weight_NK is not None,
        has_bias=bias_N is not None,
        adds=adds,
    )
    arguments = {
        "partial_ptr": partial_STZ,
        "bias_ptr": x_TK if bias_N is None else bias_N,
        "b_ptr": b_NR,
        "y_ptr": y_TN,
        "h_ptr": h_TR,
        "probs_ptr": probs_TG,
        "T": T,
        "N": N,
        "R": R,
        "G": G,
        **columns,
        "rank": R // settings.num_experts,
        "scaling": settings.scaling,
        "inverse_keep": dropout["inverse_keep"],
    }
    # without a column there still are h and probs to store
    num_tiles = max(1, triton.cdiv(N, finish.constants["BLOCK_N"]))
    launch(_finish_kernel, (num_tiles,), arguments, finish)
    return y_TN, h_TR, probs_TG


def _launch_rows(
    operands: Operands, partial_STZ: Tensor, columns: dict[str, Any], meta: Meta, base_N: int
) -> None:
    x_TK, weight_NK, _, a_RK, _, router_GK = operands
    R, G = a_RK.shape[0], router_GK.shape[0]
    block_N, block_rank = meta.constants["BLOCK_N"], meta.constants["BLOCK_RANK"]
    num_tiles = (
        triton.cdiv(R, block_rank) + triton.cdiv(G, block_rank) + triton.cdiv(base_N, block_N)
    )
    weight_stride_n, weight_stride_k = (1, 1) if weight_NK is None else weight_NK.stride()
    arguments = {
        "x_ptr": x_TK,
        "weight_ptr": x_TK if weight_NK is None else weight_NK,
        "a_ptr": a_RK,
        "router_ptr": router_GK,
        "partial_ptr": partial_STZ,
        "T": x_TK.shape[0],
        "K": x_TK.shape[1],
        "N": base_N,
        "R": R,
        "G": G,
        "x_stride_t": x_TK.stride(0),
        "weight_stride_n": weight_stride_n,
        "weight_stride_k": weight_stride_k,
        **columns,
    }
    launch(_rows_kernel, (num_tiles * meta.constants["NUM_SPLITS"],), arguments, meta)
