"""Device code that the kernels share.

The interpreter (TRITON_INTERPRET=1) gets bf16 arithmetic wrong and cuts instead of rounding to
bf16, so there `cast` rounds by hand. Its products are NumPy's, whose sum of a row in fp32 depends
on where the row lies in its tile (OpenBLAS with AVX2), as no GPU's does: there `dot` sums a tile
in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from citi_kernels import environment

INTERPRETS = tl.constexpr(environment.INTERPRETS)


@triton.jit
def dot(left, right, acc):
    """acc + left @ right: fp32 accumulation, no TF32."""
    if INTERPRETS:
        product = tl.dot(left.to(tl.float64), right.to(tl.float64), out_dtype=tl.float64)
        return acc + product.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def cast(value, dtype: tl.constexpr):
    """value in `dtype`, rounded to nearest even."""
    if INTERPRETS:
        if dtype == tl.bfloat16:
            wide = value.to(tl.float32)
            bits = wide.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            rounded = tl.where(wide == wide, rounded, 0x7FC00000)
            return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return value.to(dtype)


@triton.jit
def exp(value):
    """e**value of fp32, to the last bit or two; `tl.exp` on a GPU is 8 times less precise."""
    if INTERPRETS:
        return tl.exp(value)
    return libdevice.exp(value)


@triton.jit
def hash32(x):
    """A bijection of uint32 that spreads every bit ("lowbias32")."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(t, k, seed_low, seed_high):
    """[T, K] uint32, the bits of `counter_hash`."""
    row = hash32(hash32(t.to(tl.uint32) ^ seed_low.to(tl.uint32)) ^ seed_high.to(tl.uint32))
    return hash32(row[:, None] + k.to(tl.uint32)[None, :] * 0x9E3779B9)


@triton.jit
def keeps_input(t, k, seed_low, seed_high, threshold):
    """Whether dropout keeps x[t, k]; as `molora_linear_reference.dropout_keeps` does."""
    return random_bits(t, k, seed_low, seed_high) >= threshold.to(tl.uint32)


@triton.jit
def sortable(logits):
    """int32 in the order in which torch.sort has fp32: NaN the largest, -0 equal to 0."""
    bits = logits.to(tl.int32, bitcast=True)
    image = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    image = tl.where(logits == 0.0, 0, image)
    return tl.where(logits != logits, 0x7FFFFFFF, image)


@triton.jit
def mark_dropped(probs, is_dropped):
    """Probabilities with the sign bit set where the expert is dropped: one tensor says both."""
    bits = probs.to(tl.int32, bitcast=True)
    marked = (bits | -(2**31)).to(tl.float32, bitcast=True)
    return tl.where(is_dropped & (probs == probs), marked, probs)


@triton.jit
def is_dropped(marked):
    """Whether the sign bit is set (also that of -0), and not on a NaN, whose sign means nothing."""
    return (marked.to(tl.int32, bitcast=True) < 0) & (marked == marked)


@triton.jit
def repeated_gate(probs_ptr, t, r, in_T, in_R, G, rank):
    """[T, R] fp32, marked: for every row r of the stacked rank the gate of its expert."""
    gate = 1 + r // rank
    return tl.load(
        probs_ptr + t[:, None] * G + gate[None, :], mask=in_T[:, None] & in_R[None, :], other=0.0
    )


@triton.jit
def scaled_rank(h_ptr, probs_ptr, t, r, in_T, in_R, R, G, rank, scaling):
    """u [T, R] = scaling * h ⊙ repeat(gate[1:], r), in h's dtype; 0 for dropped experts."""
    h = tl.load(h_ptr + t[:, None] * R + r[None, :], mask=in_T[:, None] & in_R[None, :], other=0.0)
    gate = repeated_gate(probs_ptr, t, r, in_T, in_R, G, rank)
    u = tl.where(is_dropped(gate), 0.0, h.to(tl.float32) * (scaling * gate))
    return cast(u, h.dtype)


@triton.jit
def dot_of_kept(left, right, acc, probs_ptr, t, r, in_T, G, rank, IS_SPARSE: tl.constexpr):
    """acc + left [T, R] @ right [R, X], where left is 0 for dropped experts.

    0 * NaN is NaN: where right has a NaN or inf and experts can be dropped, expert by expert, and
    each product reaches the tokens that keep that expert alone.
    """
    if IS_SPARSE:
        wide = tl.abs(right.to(tl.float32))
        is_finite = tl.min(tl.min((wide < float("inf")).to(tl.int32), axis=1), axis=0)
        if is_finite != 0:
            acc = dot(left, right, acc)
        else:
            expert = r // rank
            for i in range(G - 1):
                of_i = tl.where((expert == i)[:, None], right, 0.0).to(right.dtype)
                mine = tl.where((expert == i)[None, :], left, 0.0).to(left.dtype)
                product = dot(mine, of_i, tl.zeros_like(acc))
                gate = tl.load(probs_ptr + t * G + 1 + i, mask=in_T, other=0.0)
                acc += tl.where(is_dropped(gate)[:, None], 0.0, product)
    else:
        acc = dot(left, right, acc)
    return acc
