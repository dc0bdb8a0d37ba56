"""Backend "cuda" of `citi::molora_linear`: CUDA C++ in `citi_kernels._C` around cuBLAS products.

    path      when                                                what runs
    dense     bf16 and fp16, stacked rank up to 128, up to 64     this module; with top_k the gates
              gates                                               of dropped experts are 0
    grouped   bf16 and fp16, top_k < E, wider than that           `molora_linear_cuda_top_k`
    library   fp32; every expert kept, wider than that; no token  the torch backend

fp32 has no tensor cores to gain from, and beyond these widths [a; router] is a matrix of ordinary
size: its copies in L2, not x, would set the time.
Rows that do not begin at 16 bytes, or whose length is no multiple of 8, are copied first: one more
pass over x or dy. A row stride greater than K is taken as it is.

    forward   shrink and route: h, u, gates in one pass over x
              y = x weightᵀ + bias; y += u bᵀ
    backward  up to rank 32, one pass over dy: parts of du = dy b and of db = dyᵀ u; two beyond
              rank space: dz = [dh | dlogits]
              one pass over x: parts of da and drouter
              dx = dy weight; dx += dz [a; router]

On Hopper each product and its update are one GEMM, `extended_gemm_cuda`, from 512 tokens on (fewer
have not been timed) where its `why_not` has nothing against it; not with top_k, nor in a backward
with dropout. CITI_EXTENDED_GEMM=0 turns that off. Then in the backward du has a pass of its own,
and db, da and drouter run beside the GEMM, on the multiprocessors that it leaves free.
From 4096 tokens on that GEMM makes the ranks as well, `routed_gemm_cuda`, and no pass over x comes
before it, none over dy; without dropout. CITI_ROUTED_GEMM=0 turns that off.

Gradients that are not asked for are not computed. Two-stage sums, no atomics: repeats are bitwise
equal. With top_k, NaN and inf of a parameter reach the tokens that keep its expert alone, as in the
other backends.

Shapes: T tokens, K in-features, N out-features, E experts, R stacked rank (E·r), G = E + 1 gates,
B segments; P and Z of `skinny_cuda`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from types import ModuleType

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels import environment
from citi_kernels.ops import (
    extended_gemm_cuda,
    molora_layer_cuda,
    molora_linear_cuda_top_k,
    molora_linear_torch,
    routed_gemm_cuda,
)
from citi_kernels.ops import molora_linear_reference as definition
from citi_kernels.ops import skinny_cuda as skinny
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.molora_linear_cuda_gradients import (
    MIN_EXTENDED_TOKENS,
    MIN_ROUTED_TOKENS,
    add_product,
    finite,
    gradients_beside,
    gradients_in_turn,
    needs_rank,
    takes_extended,
    takes_routed,
)
from citi_kernels.ops.top_k_marks import gates_of_marked

# from where on this backend was faster than Triton's (512 tokens: 1.18 of its time)
MIN_FASTEST_TOKENS = 2048
MAX_DENSE_RANK = 128
MAX_DENSE_GATES = 64


def refuses(x: Tensor) -> str | None:
    """Why x cannot be taken, or None."""
    if x.dtype == torch.float64:
        return "it computes in fp32, bf16 and fp16, got torch.float64"
    return None


def is_fastest(
    x: Tensor,
    stacked_rank: int,
    settings: Settings,
    *,
    has_weight: bool,
    dtype: torch.dtype | None = None,
) -> bool:
    """Whether this backend was faster than Triton on such a layer: where it has the extended GEMM.

    x (..., K), which autocast will bring to `dtype`; None: which stays as it is. Without dropout,
    with every expert kept. Measured on an H100, bf16, forward and backward: 0.90 of Triton's time
    at 8192 x 4096 x 4096 and at 4096 -> 14336, 0.97 at 2048 tokens. Layers on one x save less by
    reading it together in Triton: 75 us of 914 for each but the first (reckoned from single
    kernels, not timed). Without a weight, and on another path, there is no extended GEMM.
    """
    dtype, num_tokens = dtype or x.dtype, math.prod(x.shape[:-1])
    return (
        x.device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and has_weight
        and settings.dropout_p == 0
        and not settings.is_sparse
        and num_tokens >= MIN_FASTEST_TOKENS
        and path(num_tokens, (stacked_rank, x.shape[-1]), dtype, settings) == "dense"
        and _has_extended_gemm(x.device.index or 0)
    )


@torch.compiler.assume_constant_result
def _has_extended_gemm(device_index: int) -> bool:
    if not environment.EXTENDED_GEMM:
        return False
    return extended_gemm_cuda.why_not_on(torch.device("cuda", device_index)) is None


def path(num_tokens: int, a_shape: tuple[int, int], dtype: torch.dtype, settings: Settings) -> str:
    """Which of "dense", "grouped" and "library", for x of `dtype`."""
    R, K = a_shape
    if dtype == torch.float32 or num_tokens == 0 or K == 0:
        return "library"
    if R <= MAX_DENSE_RANK and settings.num_experts + 1 <= MAX_DENSE_GATES:
        return "dense"
    return "grouped" if settings.is_sparse else "library"


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Saved, Tensor | None]:
    """y (T, N), what the backward needs, and the gate sums (B, G) or None."""
    x_TK, a_RK = operands.x, operands.a
    other = _other_path(x_TK.shape[0], a_RK, x_TK.dtype, settings)
    if other is not None:
        return other.forward(operands, settings)
    x_TK, sizes = _in_rows(x_TK), _sizes(x_TK.shape[0], a_RK, settings)
    operands = operands._replace(x=x_TK)
    if molora_layer_cuda.takes(x_TK, operands, settings, MIN_EXTENDED_TOKENS):
        is_routed = molora_layer_cuda.is_routed(sizes, MIN_ROUTED_TOKENS)
        y_TN, h_TR, probs_TG = molora_layer_cuda.forward(
            operands, sizes, settings, is_routed=is_routed
        )
    else:
        y_TN, h_TR, probs_TG = _routed(operands, sizes, settings)
    gate_sums_BG = None
    if settings.segment_ids is not None:
        gate_sums_BG = _sum_gates(gates_of_marked(probs_TG, settings), settings)
    return y_TN, Saved(h_TR, probs_TG, None), gate_sums_BG


def _sum_gates(gate_TG: Tensor, settings: Settings) -> Tensor:
    """(B, G) in an order that repeats: by Triton where it is installed, for PyTorch has to sort.

    That took 265 us of 640 on an H100, for 8192 tokens.
    """
    if gate_TG.is_cuda and _has_triton():
        from citi_kernels.triton_kernels.gate_sums import gate_sums

        return gate_sums(gate_TG, settings)
    return definition.sum_over_segments(gate_TG, settings.segment_ids, settings.num_segments)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def empty_saved(x_TK: Tensor, a_RK: Tensor, settings: Settings) -> Saved:
    """h (T, R), probs (T, G) fp32; on another path, that path's."""
    T = x_TK.shape[0]
    other = _other_path(T, a_RK, x_TK.dtype, settings)
    if other is not None:
        return other.empty_saved(x_TK, a_RK, settings)
    return Saved(
        h=x_TK.new_empty(T, a_RK.shape[0]),
        probs=x_TK.new_empty(T, settings.num_experts + 1, dtype=torch.float32),
        kept=None,
    )


def backward(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
) -> Operands:
    """Gradients, None where `needs` says no; see `molora_linear_torch.backward`."""
    num_tokens = saved.probs.numel() // (settings.num_experts + 1)
    other = _other_path(num_tokens, operands.a, saved.h.dtype, settings)
    if other is not None:
        return other.backward(dy_TN, dgate_sums_BG, operands, saved, settings, needs)
    sizes = _sizes(num_tokens, operands.a, settings)
    operands = operands._replace(x=None if operands.x is None else _in_rows(operands.x))
    dy_TN = None if dy_TN is None else dy_TN.contiguous()
    gradients = Operands(
        x=None,
        weight=dy_TN.T @ operands.x if needs.weight else None,
        bias=dy_TN.sum(0) if needs.bias else None,
        a=None,
        b=None,
        router=None,
    )
    dgate_TG = None
    if dgate_sums_BG is not None and needs_rank(needs):
        # the padded row of zeros is the last, where a segment of -1 points
        dgate_TG = F.pad(dgate_sums_BG.float(), (0, 0, 0, 1))[settings.segment_ids]
    if (
        needs.x
        and dy_TN is not None
        and molora_layer_cuda.takes(dy_TN, operands, settings, MIN_EXTENDED_TOKENS)
    ):
        is_routed = molora_layer_cuda.is_routed(sizes, MIN_ROUTED_TOKENS)
        dx_TK, da_RK, db_NR, drouter_GK = molora_layer_cuda.backward(
            dy_TN, dgate_TG, operands, saved, sizes, settings, needs, is_routed=is_routed
        )
        return gradients._replace(x=dx_TK, a=da_RK, b=db_NR, router=drouter_GK)
    is_extended = needs.x and settings.dropout_p == 0 and dy_TN is not None
    is_extended = is_extended and takes_extended(dy_TN, operands.weight, settings)
    run = gradients_beside if is_extended else gradients_in_turn
    dx_TK, da_RK, db_NR, drouter_GK = run(dy_TN, dgate_TG, operands, saved, sizes, settings, needs)
    return gradients._replace(x=dx_TK, a=da_RK, b=db_NR, router=drouter_GK)


def _other_path(
    num_tokens: int, a_RK: Tensor, dtype: torch.dtype, settings: Settings
) -> ModuleType | None:
    others = {"grouped": molora_linear_cuda_top_k, "library": molora_linear_torch}
    return others.get(path(num_tokens, a_RK.shape, dtype, settings))


def _routed(
    operands: Operands, sizes: skinny.Sizes, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, N), h (T, R) and probs (T, G)."""
    x_TK, weight_NK, bias_N, a_RK, b_NR, router_GK = operands
    aligned_TK = skinny.aligned(x_TK)
    # else x was given columns of zeros, which weight does not have
    is_as_wide = aligned_TK.shape == x_TK.shape
    is_routed = is_as_wide and takes_routed(aligned_TK, weight_NK, sizes, settings, bias_N)
    counts = None
    if is_routed and "zeros_in_pack" in environment.TRIALS:
        counts = x_TK.new_empty(routed_gemm_cuda.num_counts(sizes.T), dtype=torch.int32)
    stack_ZK = skinny.stack(a_RK, router_GK, sizes, x_TK.dtype, counts)
    if is_routed:
        y_TN, h_TR, _, probs_TG = routed_gemm_cuda.routed_linear(
            aligned_TK,
            weight_NK,
            bias_N,
            stack_ZK,
            extended_gemm_cuda.aligned_rows(b_NR.to(x_TK.dtype)),
            sizes,
            settings,
            counts,
        )
        return y_TN.contiguous(), h_TR, probs_TG
    h_TR, u_TP, probs_TG = skinny.shrink_route(aligned_TK, stack_ZK, sizes, settings)
    if is_as_wide:
        # a copy where x lay otherwise: the choice of a GEMM must not depend on that
        x_TK = aligned_TK
    u_TR, b_NR = u_TP[:, : sizes.R], b_NR.to(x_TK.dtype)
    if takes_extended(x_TK, weight_NK, settings, bias_N):
        b_NR = extended_gemm_cuda.aligned_rows(b_NR)
        y_TN = extended_gemm_cuda.extended_linear(x_TK, weight_NK, bias_N, u_TR, b_NR)
        # its rows lie apart where N is no multiple of 8
        return y_TN.contiguous(), h_TR, probs_TG
    base_TN = None if weight_NK is None else F.linear(x_TK, weight_NK, bias_N)
    y_TN = add_product(base_TN, u_TR, finite(b_NR.T, settings))
    if settings.is_sparse and y_TN.numel():
        skinny.add_non_finite_(y_TN, u_TR, b_NR.T, probs_TG, sizes)
    return y_TN, h_TR, probs_TG


def _sizes(num_tokens: int, a_RK: Tensor, settings: Settings) -> skinny.Sizes:
    return skinny.Sizes(num_tokens, settings.num_experts, a_RK.shape[0])


def _in_rows(x_TK: Tensor) -> Tensor:
    """x with rows that lie one by one, maybe apart; so results do not depend on its layout."""
    is_in_rows = x_TK.stride(1) == 1 and x_TK.stride(0) >= x_TK.shape[1]
    return x_TK if is_in_rows else x_TK.contiguous()
