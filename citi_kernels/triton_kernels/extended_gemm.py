"""The base product with its K dimension longer by the rank: one GEMM for linear layer and update.

    extended_linear           y  = x weightᵀ + bias + u bᵀ,   u = scaling * h ⊙ repeat(gate[1:], r)
    extended_input_gradient   dx = dy weight + keep ⊙ (dh a) / (1 - p) + dlogits router

Persistent: one program a multiprocessor walks over output tiles, in groups that share L2. Large
operands move through tensor descriptors (TMA from sm_90 on). Sums stay in fp32, are rounded once.

Shapes: T tokens, K in-features, N out-features, R stacked rank (E·r), G gate entries (E + 1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.triton_kernels.dropout import DROPOUT_ARGUMENTS, dropout_of
from citi_kernels.triton_kernels.language import cast, dot, keeps_input, scaled_rank
from citi_kernels.triton_kernels.launch import Meta, block_of, num_multiprocessors
from citi_kernels.triton_kernels.persistent import (
    capability,
    halves,
    launch_persistent,
    tile_place,
    weight_block,
    weight_descriptor,
)

MAX_RANK = 256
_DTYPES = (torch.bfloat16, torch.float16)
# bytes; of the start and of every row that a descriptor reads or writes
_ALIGNMENT = 16
_BLOCK_T = 128
_NARROW, _WIDE = 128, 256


@triton.jit
def _block(ptr, row, column, in_rows, in_columns, stride, dtype: tl.constexpr):
    """[row, column] of a contiguous matrix, rounded to `dtype`."""
    block = tl.load(
        ptr + row[:, None] * stride + column[None, :],
        mask=in_rows[:, None] & in_columns[None, :],
        other=0.0,
    )
    return cast(block, dtype)


@triton.jit
def _add_update(acc, t, n, r0, T, N, ranks, dtype: tl.constexpr, BLOCK_R: tl.constexpr):
    """acc [t, n] + u bᵀ, of BLOCK_R rows of the rank from r0 on"""
    h_ptr, probs_ptr, b_ptr, R, G, rank, scaling = ranks
    r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
    u = scaled_rank(h_ptr, probs_ptr, t, r, t < T, r < R, R, G, rank, scaling)
    b = _block(b_ptr, n, r, n < N, r < R, R, dtype)
    return dot(u, tl.trans(b), acc)


@triton.jit(do_not_specialize=("T",))
def _extended_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    probs_ptr,
    b_ptr,
    y_ptr,
    T,
    K,
    N,
    R,
    G,
    rank,
    scaling,
    x_stride_t,
    weight_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_DEEP: tl.constexpr,  # of K
    BLOCK_WIDE: tl.constexpr,  # of N
    BLOCK_R: tl.constexpr,
    NUM_R_BLOCKS: tl.constexpr,
    GROUP_T: tl.constexpr,
    K_IS_CONTIGUOUS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_WIDE // 2
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # a loop known to run is compiled without a second version of everything
    tl.assume(K > 0)
    x_rows = tl.make_tensor_descriptor(x_ptr, [T, K], [x_stride_t, 1], [BLOCK_T, BLOCK_DEEP])
    y_rows = tl.make_tensor_descriptor(y_ptr, [T, N], [N, 1], [BLOCK_T, HALF])
    weight = weight_descriptor(
        weight_ptr, N, K, weight_stride, BLOCK_WIDE, BLOCK_DEEP, K_IS_CONTIGUOUS
    )
    num_rows, num_columns = tl.cdiv(T, BLOCK_T).to(tl.int64), tl.cdiv(N, BLOCK_WIDE).to(tl.int64)
    first_tile = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first_tile, num_rows * num_columns, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile_place(tile, num_rows, num_columns, GROUP_T)
        t0, n0 = (row * BLOCK_T).to(tl.int32), (column * BLOCK_WIDE).to(tl.int32)
        acc = tl.zeros((BLOCK_T, BLOCK_WIDE), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_DEEP):
            w = weight_block(weight, n0, k0, K_IS_CONTIGUOUS)
            acc = dot(x_rows.load([t0, k0]), tl.trans(w), acc)

        t = row * BLOCK_T + tl.arange(0, BLOCK_T)
        n = column * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
        ranks = (h_ptr, probs_ptr, b_ptr, R, G, rank, scaling)
        if FLATTEN:
            for block in tl.static_range(NUM_R_BLOCKS):
                acc = _add_update(acc, t, n, block * BLOCK_R, T, N, ranks, dtype, BLOCK_R)
        else:
            for r0 in range(0, R, BLOCK_R):
                acc = _add_update(acc, t, n, r0, T, N, ranks, dtype, BLOCK_R)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        left, right = halves(acc, BLOCK_T, HALF)
        y_rows.store([t0, n0], cast(left, dtype))
        y_rows.store([t0, n0 + HALF], cast(right, dtype))


@triton.jit
def _add_product(
    acc, left_ptr, right_ptr, t, k, T, K, R, dtype: tl.constexpr, BLOCK_R: tl.constexpr
):
    """acc [t, k] + left [t, R] @ right [R, k]"""
    for r0 in range(0, R, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        left = _block(left_ptr, t, r, t < T, r < R, R, dtype)
        right = _block(right_ptr, r, k, r < R, k < K, K, dtype)
        acc = dot(left, right, acc)
    return acc


@triton.jit(do_not_specialize=("T", *DROPOUT_ARGUMENTS))
def _extended_input_gradient_kernel(
    dy_ptr,
    weight_ptr,
    dh_ptr,
    a_ptr,
    dlogits_ptr,
    router_ptr,
    dx_ptr,
    T,
    K,
    N,
    R,
    G,
    dy_stride_t,
    weight_stride,
    seed_low0,
    seed_high0,
    threshold,
    inverse_keep,
    BLOCK_T: tl.constexpr,
    BLOCK_DEEP: tl.constexpr,  # of N
    BLOCK_WIDE: tl.constexpr,  # of K
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP_T: tl.constexpr,
    K_IS_CONTIGUOUS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    # quarters of a tile with dropout, where a part needs a second accumulator; else halves
    NUM_PARTS: tl.constexpr = 4 if HAS_DROPOUT else 2
    WIDTH: tl.constexpr = BLOCK_WIDE // NUM_PARTS
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    tl.assume(N > 0)
    dy_rows = tl.make_tensor_descriptor(dy_ptr, [T, N], [dy_stride_t, 1], [BLOCK_T, BLOCK_DEEP])
    dx_rows = tl.make_tensor_descriptor(dx_ptr, [T, K], [K, 1], [BLOCK_T, WIDTH])
    weight = weight_descriptor(
        weight_ptr, N, K, weight_stride, BLOCK_DEEP, BLOCK_WIDE, K_IS_CONTIGUOUS
    )
    num_rows, num_columns = tl.cdiv(T, BLOCK_T).to(tl.int64), tl.cdiv(K, BLOCK_WIDE).to(tl.int64)
    first_tile = tl.program_id(0).to(tl.int64)
    # not flattened: ptxas would wait for every single product (warning C7515)
    for tile in range(first_tile, num_rows * num_columns, tl.num_programs(0)):
        row, column = tile_place(tile, num_rows, num_columns, GROUP_T)
        t0, k0 = (row * BLOCK_T).to(tl.int32), (column * BLOCK_WIDE).to(tl.int32)
        acc = tl.zeros((BLOCK_T, BLOCK_WIDE), dtype=tl.float32)
        for n0 in range(0, N, BLOCK_DEEP):
            w = weight_block(weight, n0, k0, K_IS_CONTIGUOUS)
            acc = dot(dy_rows.load([t0, n0]), w, acc)

        t = row * BLOCK_T + tl.arange(0, BLOCK_T)
        k = column * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
        acc = _add_product(acc, dlogits_ptr, router_ptr, t, k, T, K, G, dtype, BLOCK_G)
        if not HAS_DROPOUT:
            acc = _add_product(acc, dh_ptr, a_ptr, t, k, T, K, R, dtype, BLOCK_R)
        parts = halves(acc, BLOCK_T, BLOCK_WIDE // 2)
        if HAS_DROPOUT:
            left, right = parts
            parts = halves(left, BLOCK_T, WIDTH) + halves(right, BLOCK_T, WIDTH)
        for part in tl.static_range(NUM_PARTS):
            first = part * WIDTH
            dx = parts[part]
            if HAS_DROPOUT:
                k = column * BLOCK_WIDE + first + tl.arange(0, WIDTH)
                update = tl.zeros((BLOCK_T, WIDTH), dtype=tl.float32)
                update = _add_product(update, dh_ptr, a_ptr, t, k, T, K, R, dtype, BLOCK_R)
                keeps = keeps_input(t, k, seed_low0, seed_high0, threshold)
                dx += tl.where(keeps, update * inverse_keep, 0.0)
            dx_rows.store([t0, k0 + first], cast(dx, dtype))


def linear_launch_meta(
    T: int, N: int, R: int, *, architecture: int, num_programs: int, **flags: bool
) -> Meta:
    """Constants of the forward; `architecture` is 90 for sm_90."""
    width, is_sm_90 = _tile_width(T, N, architecture, num_programs), architecture // 10 == 9
    # wider blocks of a large rank spill registers beside the accumulator
    block_R = 32 if R <= 32 else 16
    constants = {
        **_tile_constants(width),
        "BLOCK_R": block_R,
        "NUM_R_BLOCKS": triton.cdiv(R, block_R),
        # the next tile's loads start before this one is stored; sm_100 cannot compile it
        "FLATTEN": is_sm_90,
        **flags,
    }
    return Meta(constants, num_warps=8, num_stages=4 if is_sm_90 and width == _NARROW else 3)


def input_gradient_launch_meta(
    T: int, K: int, R: int, G: int, *, architecture: int, num_programs: int, **flags: bool
) -> Meta:
    """Constants of the backward; `architecture` is 90 for sm_90."""
    constants = {
        **_tile_constants(_tile_width(T, K, architecture, num_programs)),
        "BLOCK_R": 16,
        "BLOCK_G": min(block_of(G), 16),
        **flags,
    }
    return Meta(constants, num_warps=8, num_stages=4 if architecture // 10 == 9 else 3)


def _tile_constants(width: int) -> dict[str, int]:
    return {"BLOCK_T": _BLOCK_T, "BLOCK_DEEP": 64, "BLOCK_WIDE": width, "GROUP_T": 8}


def _tile_width(T: int, features: int, architecture: int, num_programs: int) -> int:
    """Output features of a tile: many on sm_90, where they fill the GPU."""
    if architecture // 10 != 9:  # wide ones spill on sm_80 and are untried on sm_100
        return _NARROW
    num_rows = triton.cdiv(T, _BLOCK_T)
    seconds = {
        width: width * triton.cdiv(num_rows * triton.cdiv(features, width), num_programs)
        for width in (_NARROW, _WIDE)
    }
    # a wide tile reads less shared memory per product: taken to save 15 %
    return _WIDE if seconds[_WIDE] <= 1.15 * seconds[_NARROW] else _NARROW


def takes(x_TK: Tensor, weight_NK: Tensor) -> bool:
    """Whether x and weight, or dy (T, N) and weight, suit the kernels; looks at metadata alone."""
    strides = (weight_NK.stride(0), weight_NK.stride(1))
    rows = (x_TK.stride(0), max(strides), *weight_NK.shape)
    return (
        x_TK.dtype in _DTYPES
        and weight_NK.dtype == x_TK.dtype
        and x_TK.numel() > 0
        and weight_NK.numel() > 0
        and x_TK.stride(1) == 1
        and min(strides) == 1
        and x_TK.stride(0) >= x_TK.shape[1]
        and max(strides) >= weight_NK.shape[1 if strides[1] == 1 else 0]
        and all(row * x_TK.element_size() % _ALIGNMENT == 0 for row in rows)
        and all(each.data_ptr() % _ALIGNMENT == 0 for each in (x_TK, weight_NK))
        and capability(x_TK.device) // 10 in (8, 9, 10)
    )


def extended_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    h_TR: Tensor,
    probs_TG: Tensor,
    b_NR: Tensor,
    settings: Settings,
) -> Tensor:
    """y (T, N) = x weightᵀ + bias + u bᵀ, for what `takes` takes.

    h (T, R) in x's dtype, probs (T, G) fp32, bias and b (N, R) of any dtype are contiguous.
    """
    (T, K), (N, R) = x_TK.shape, b_NR.shape
    y_TN = x_TK.new_empty(T, N)
    k_is_contiguous = weight_NK.stride(1) == 1
    meta = linear_launch_meta(
        T,
        N,
        R,
        architecture=capability(x_TK.device),
        num_programs=num_multiprocessors(x_TK.device),
        K_IS_CONTIGUOUS=k_is_contiguous,
        HAS_BIAS=bias_N is not None,
    )
    arguments = {
        "x_ptr": x_TK,
        "weight_ptr": weight_NK,
        "bias_ptr": x_TK if bias_N is None else bias_N,
        "h_ptr": h_TR,
        "probs_ptr": probs_TG,
        "b_ptr": b_NR,
        "y_ptr": y_TN,
        "T": T,
        "K": K,
        "N": N,
        "R": R,
        "G": probs_TG.shape[1],
        "rank": R // settings.num_experts,
        "scaling": settings.scaling,
        "x_stride_t": x_TK.stride(0),
        "weight_stride": weight_NK.stride(0 if k_is_contiguous else 1),
    }
    launch_persistent(_extended_linear_kernel, _num_tiles(y_TN, meta), arguments, meta, x_TK.device)
    return y_TN


def extended_input_gradient(
    dy_TN: Tensor,
    weight_NK: Tensor,
    dh_TR: Tensor,
    a_RK: Tensor,
    dlogits_TG: Tensor,
    router_GK: Tensor,
    settings: Settings,
) -> Tensor:
    """dx (T, K) = dy weight + keep ⊙ (dh a) / (1 - p) + dlogits router, for what `takes` takes.

    dh (T, R) and dlogits (T, G) in dy's dtype, a and router of any dtype, are contiguous.
    """
    (T, N), (R, K) = dy_TN.shape, a_RK.shape
    dx_TK = dy_TN.new_empty(T, K)
    k_is_contiguous = weight_NK.stride(1) == 1
    meta = input_gradient_launch_meta(
        T,
        K,
        R,
        router_GK.shape[0],
        architecture=capability(dy_TN.device),
        num_programs=num_multiprocessors(dy_TN.device),
        K_IS_CONTIGUOUS=k_is_contiguous,
        HAS_DROPOUT=settings.dropout_p > 0,
    )
    arguments = {
        "dy_ptr": dy_TN,
        "weight_ptr": weight_NK,
        "dh_ptr": dh_TR,
        "a_ptr": a_RK,
        "dlogits_ptr": dlogits_TG,
        "router_ptr": router_GK,
        "dx_ptr": dx_TK,
        "T": T,
        "K": K,
        "N": N,
        "R": R,
        "G": router_GK.shape[0],
        "dy_stride_t": dy_TN.stride(0),
        "weight_stride": weight_NK.stride(0 if k_is_contiguous else 1),
        **dropout_of(settings),
    }
    launch_persistent(
        _extended_input_gradient_kernel, _num_tiles(dx_TK, meta), arguments, meta, dy_TN.device
    )
    return dx_TK


def _num_tiles(out: Tensor, meta: Meta) -> int:
    T, features = out.shape
    return triton.cdiv(T, _BLOCK_T) * triton.cdiv(features, meta.constants["BLOCK_WIDE"])
