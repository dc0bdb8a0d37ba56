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

Gradients that are not asked for are not computed. Two-stage sums, no atomics: repeats are bitwise
equal. With top_k, NaN and inf of a parameter reach the tokens that keep its expert alone, as in the
other backends.

Shapes: T tokens, K in-features, N out-features, E experts, R stacked rank (E·r), G = E + 1 gates,
B segments; P and Z of `skinny_cuda`.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels import environment
from citi_kernels.ops import (
    extended_gemm_cuda,
    molora_linear_cuda_top_k,
    molora_linear_torch,
    routed_gemm_cuda,
)
from citi_kernels.ops import molora_linear_reference as definition
from citi_kernels.ops import skinny_cuda as skinny
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.side_stream import Beside

# of dx, a, b and router
Factors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

MAX_DENSE_RANK = 128
MAX_DENSE_GATES = 64
# below it the extended GEMM has not been timed
MIN_EXTENDED_TOKENS = 512


def refuses(x: Tensor) -> str | None:
    """Why x cannot be taken, or None."""
    if x.dtype == torch.float64:
        return "it computes in fp32, bf16 and fp16, got torch.float64"
    return None


def is_fastest(x_TK: Tensor) -> bool:
    """Whether this backend was faster than Triton on such an x: where it has the extended GEMM.

    Without dropout, with every expert kept. Measured on an H100, bf16, forward and backward: 0.94
    of Triton's time at 8192 x 4096 x 4096, 0.93 at 4096 -> 14336, 0.97 at 2048 tokens.
    """
    return (
        x_TK.device.type == "cuda"
        and x_TK.dtype in (torch.bfloat16, torch.float16)
        and x_TK.shape[0] >= MIN_EXTENDED_TOKENS
        and _has_extended_gemm(x_TK.device.index or 0)
    )


@torch.compiler.assume_constant_result
def _has_extended_gemm(device_index: int) -> bool:
    if not environment.EXTENDED_GEMM:
        return False
    return extended_gemm_cuda.why_not_on(torch.device("cuda", device_index)) is None


def path(num_tokens: int, a_RK: Tensor, dtype: torch.dtype, settings: Settings) -> str:
    """Which of "dense", "grouped" and "library", for x of `dtype`."""
    R, K = a_RK.shape
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
    y_TN, h_TR, probs_TG = _routed(operands._replace(x=x_TK), sizes, settings)
    gate_sums_BG = None
    if settings.segment_ids is not None:
        # a marked probability is below 0 or -0
        gate_TG = probs_TG.clamp_min(0.0) if settings.is_sparse else probs_TG
        gate_sums_BG = definition.sum_over_segments(
            gate_TG, settings.segment_ids, settings.num_segments
        )
    return y_TN, Saved(h_TR, probs_TG, None), gate_sums_BG


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
    if dgate_sums_BG is not None and _needs_rank(needs):
        # the padded row of zeros is the last, where a segment of -1 points
        dgate_TG = F.pad(dgate_sums_BG.float(), (0, 0, 0, 1))[settings.segment_ids]
    is_extended = needs.x and settings.dropout_p == 0 and dy_TN is not None
    is_extended = is_extended and _takes_extended(dy_TN, operands.weight, settings)
    run = _gradients_beside if is_extended else _gradients_in_turn
    dx_TK, da_RK, db_NR, drouter_GK = run(dy_TN, dgate_TG, operands, saved, sizes, settings, needs)
    return gradients._replace(x=dx_TK, a=da_RK, b=db_NR, router=drouter_GK)


def _other_path(
    num_tokens: int, a_RK: Tensor, dtype: torch.dtype, settings: Settings
) -> ModuleType | None:
    others = {"grouped": molora_linear_cuda_top_k, "library": molora_linear_torch}
    return others.get(path(num_tokens, a_RK, dtype, settings))


def _routed(
    operands: Operands, sizes: skinny.Sizes, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, N), h (T, R) and probs (T, G)."""
    x_TK, weight_NK, bias_N, a_RK, b_NR, router_GK = operands
    stack_ZK = skinny.stack(a_RK, router_GK, sizes, x_TK.dtype)
    aligned_TK = skinny.aligned(x_TK)
    if _takes_routed(aligned_TK, weight_NK, sizes, settings, bias_N):
        y_TN, h_TR, _, probs_TG = routed_gemm_cuda.routed_linear(
            aligned_TK,
            weight_NK,
            bias_N,
            stack_ZK,
            extended_gemm_cuda.aligned_rows(b_NR.to(x_TK.dtype)),
            sizes,
            settings,
        )
        return y_TN.contiguous(), h_TR, probs_TG
    h_TR, u_TP, probs_TG = skinny.shrink_route(aligned_TK, stack_ZK, sizes, settings)
    if aligned_TK.shape == x_TK.shape:
        # a copy where x lay otherwise: the choice of a GEMM must not depend on that
        x_TK = aligned_TK
    u_TR, b_NR = u_TP[:, : sizes.R], b_NR.to(x_TK.dtype)
    if _takes_extended(x_TK, weight_NK, settings, bias_N):
        b_NR = extended_gemm_cuda.aligned_rows(b_NR)
        y_TN = extended_gemm_cuda.extended_linear(x_TK, weight_NK, bias_N, u_TR, b_NR)
        # its rows lie apart where N is no multiple of 8
        return y_TN.contiguous(), h_TR, probs_TG
    base_TN = None if weight_NK is None else F.linear(x_TK, weight_NK, bias_N)
    y_TN = _add_product(base_TN, u_TR, _finite(b_NR.T, settings))
    if settings.is_sparse and y_TN.numel():
        skinny.add_non_finite_(y_TN, u_TR, b_NR.T, probs_TG, sizes)
    return y_TN, h_TR, probs_TG


def _takes_routed(
    left: Tensor,
    weight_NK: Tensor | None,
    sizes: skinny.Sizes,
    settings: Settings,
    bias_N: Tensor | None = None,
) -> bool:
    """Whether the GEMM that makes its own extension is wanted and possible."""
    if not environment.ROUTED_GEMM or not _takes_extended(left, weight_NK, settings, bias_N):
        return False
    if left.shape[1] not in weight_NK.shape:
        # x or dy was given columns of zeros
        return False
    return routed_gemm_cuda.why_not(left, weight_NK, bias_N, sizes, settings) is None


def _takes_extended(
    left: Tensor, weight_NK: Tensor | None, settings: Settings, bias_N: Tensor | None = None
) -> bool:
    """Whether one GEMM with a longer K is wanted and possible; with top_k see `_finite`."""
    if not environment.EXTENDED_GEMM or weight_NK is None or settings.is_sparse:
        return False
    if left.shape[0] < MIN_EXTENDED_TOKENS:
        return False
    return extended_gemm_cuda.why_not(left, weight_NK, bias_N) is None


def _sizes(num_tokens: int, a_RK: Tensor, settings: Settings) -> skinny.Sizes:
    return skinny.Sizes(num_tokens, settings.num_experts, a_RK.shape[0])


def _in_rows(x_TK: Tensor) -> Tensor:
    """x with rows that lie one by one, maybe apart; so results do not depend on its layout."""
    is_in_rows = x_TK.stride(1) == 1 and x_TK.stride(0) >= x_TK.shape[1]
    return x_TK if is_in_rows else x_TK.contiguous()


def _needs_rank(needs: Needs) -> bool:
    return needs.x or needs.a or needs.router


def _gradients_beside(
    dy_TN: Tensor,
    dgate_TG: Tensor | None,
    operands: Operands,
    saved: Saved,
    sizes: skinny.Sizes,
    settings: Settings,
    needs: Needs,
) -> Factors:
    """dx from one GEMM with a longer K; the other gradients beside it, on a second stream."""
    beside, aligned_TN = Beside(dy_TN.device), skinny.aligned(dy_TN)
    is_routed = _takes_routed(aligned_TN, operands.weight, sizes, settings)
    if is_routed:
        return _gradients_routed(
            aligned_TN, dgate_TG, operands, saved, sizes, settings, needs, beside
        )
    du_CTP = skinny.row_products(aligned_TN, _as_rows(operands.b, aligned_TN, sizes))
    dz_TZ = skinny.rank_gradients(du_CTP, saved.h, saved.probs, dgate_TG, sizes, settings)
    stack_ZK = skinny.stack(operands.a, operands.router, sizes, dz_TZ.dtype)
    db_NR = _up_gradient_beside(aligned_TN, operands, saved, sizes, settings, needs, beside)
    da_RK, drouter_GK = _down_gradients(dz_TZ, operands, sizes, settings, needs, beside)
    with beside:
        dx_TK = extended_gemm_cuda.extended_input_gradient(
            dy_TN, operands.weight, dz_TZ, stack_ZK[:, : operands.a.shape[1]]
        )
    return dx_TK, da_RK, db_NR, drouter_GK


def _gradients_routed(
    dy_TN: Tensor,
    dgate_TG: Tensor | None,
    operands: Operands,
    saved: Saved,
    sizes: skinny.Sizes,
    settings: Settings,
    needs: Needs,
    beside: Beside,
) -> Factors:
    """dx and dz from one GEMM, db beside it; then those of a and router, which need all of dz."""
    stack_ZK = skinny.stack(operands.a, operands.router, sizes, dy_TN.dtype)
    b_NR = extended_gemm_cuda.aligned_rows(operands.b.to(dy_TN.dtype))
    db_NR = _up_gradient_beside(dy_TN, operands, saved, sizes, settings, needs, beside)
    with beside:
        dx_TK, dz_TZ = routed_gemm_cuda.routed_input_gradient(
            dy_TN,
            operands.weight,
            b_NR,
            saved.h,
            saved.probs,
            dgate_TG,
            stack_ZK[:, : operands.a.shape[1]],
            sizes,
            settings,
        )
    da_RK, drouter_GK = _down_gradients(dz_TZ, operands, sizes, settings, needs)
    return dx_TK, da_RK, db_NR, drouter_GK


def _up_gradient_beside(
    dy_TN: Tensor,
    operands: Operands,
    saved: Saved,
    sizes: skinny.Sizes,
    settings: Settings,
    needs: Needs,
    beside: Beside,
) -> Tensor | None:
    """db (N, R), if asked for: launched later."""
    if not needs.b:
        return None
    u_TP = skinny.scaled_ranks(saved.h, saved.probs, sizes, settings, beside)
    parts_CNP, _ = skinny.factor_gradients(dy_TN, u_TP, beside=beside)
    return _sum_up(parts_CNP, operands.b, sizes, beside)


def _gradients_in_turn(
    dy_TN: Tensor | None,
    dgate_TG: Tensor | None,
    operands: Operands,
    saved: Saved,
    sizes: skinny.Sizes,
    settings: Settings,
    needs: Needs,
) -> Factors:
    """dx from a library's product and an update in place."""
    db_NR, du_CTP = _up_gradients(dy_TN, operands.b, saved, sizes, settings, needs)
    if not _needs_rank(needs):
        return None, None, db_NR, None
    dz_TZ = skinny.rank_gradients(du_CTP, saved.h, saved.probs, dgate_TG, sizes, settings)
    da_RK, drouter_GK = _down_gradients(dz_TZ, operands, sizes, settings, needs)
    dx_TK = None
    if needs.x:
        dx_TK = _input_gradient(dy_TN, dz_TZ, operands, saved, sizes, settings)
    return dx_TK, da_RK, db_NR, drouter_GK


def _up_gradients(
    dy_TN: Tensor | None,
    b_NR: Tensor,
    saved: Saved,
    sizes: skinny.Sizes,
    settings: Settings,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None]:
    """db (N, R) if asked for, and parts of du (C, T, P) if needed and if there is a dy."""
    if dy_TN is None or b_NR.shape[0] == 0:
        return torch.zeros_like(b_NR) if needs.b else None, None
    dy_TN = skinny.aligned(dy_TN)
    db_NR, du_CTP = None, None
    if needs.b:
        u_TP = skinny.scaled_ranks(saved.h, saved.probs, sizes, settings)
        is_shared = sizes.P <= skinny.MAX_RANK_OF_ONE_PASS and _needs_rank(needs)
        rounded_NR = _rounded(b_NR, dy_TN) if is_shared else None
        parts_CNP, du_CTP = skinny.factor_gradients(dy_TN, u_TP, rounded_NR)
        db_NR = _sum_up(parts_CNP, b_NR, sizes)
    if du_CTP is None and _needs_rank(needs):
        du_CTP = skinny.row_products(dy_TN, _as_rows(b_NR, dy_TN, sizes))
    return db_NR, du_CTP


def _rounded(b_NR: Tensor, dy_TN: Tensor) -> Tensor:
    """b in dy's dtype, with rows of zeros where dy was given columns."""
    rounded_NR = b_NR.to(dy_TN.dtype).contiguous()
    missing = dy_TN.shape[1] - b_NR.shape[0]
    return F.pad(rounded_NR, (0, 0, 0, missing)) if missing else rounded_NR


def _as_rows(b_NR: Tensor, dy_TN: Tensor, sizes: skinny.Sizes) -> Tensor:
    """bᵀ (P, N) in dy's dtype, with zeros from R on and where dy was given columns."""
    return skinny.packed((sizes.P, dy_TN.shape[1]), dy_TN.dtype, (b_NR.T, 0))


def _sum_up(
    parts_CNP: Tensor, b_NR: Tensor, sizes: skinny.Sizes, beside: Beside | None = None
) -> Tensor:
    wanted = skinny.Columns(0, sizes.R, b_NR.dtype, is_transposed=False)
    return skinny.sum_parts(parts_CNP, wanted, beside=beside)[0][: b_NR.shape[0]]


def _down_gradients(
    dz_TZ: Tensor,
    operands: Operands,
    sizes: skinny.Sizes,
    settings: Settings,
    needs: Needs,
    beside: Beside | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """da (R, K) and drouter (G, K), each if asked for."""
    if not (needs.a or needs.router):
        return None, None
    x_TK, K = skinny.aligned(operands.x), operands.x.shape[1]
    first, last = 0 if needs.a else sizes.P, sizes.Z if needs.router else sizes.P
    parts_CKV, _ = skinny.factor_gradients(
        x_TK,
        dz_TZ[:, first:last],
        rank_columns=sizes.P if needs.a else 0,
        settings=settings if needs.a else None,
        beside=beside,
    )
    wanted = []
    if needs.a:
        wanted.append(skinny.Columns(0, sizes.R, operands.a.dtype, is_transposed=True))
    if needs.router:
        at, dtype = sizes.P - first, operands.router.dtype
        wanted.append(skinny.Columns(at, sizes.G, dtype, is_transposed=True))
    sums = [each[:, :K] for each in skinny.sum_parts(parts_CKV, *wanted, beside=beside)]
    return sums[0] if needs.a else None, sums[-1] if needs.router else None


def _input_gradient(
    dy_TN: Tensor | None,
    dz_TZ: Tensor,
    operands: Operands,
    saved: Saved,
    sizes: skinny.Sizes,
    settings: Settings,
) -> Tensor:
    """dx = dy weight + dh a + dlogits router; dropout lies over the second term alone."""
    a_RK, K = operands.a, operands.a.shape[1]
    if settings.is_sparse:
        # NaN and inf are those of the rounded numbers
        a_RK = a_RK.to(dz_TZ.dtype)
    stack_ZK = skinny.stack(_finite(a_RK, settings), operands.router, sizes, dz_TZ.dtype)
    has_base = dy_TN is not None and operands.weight is not None
    has_dropout = settings.dropout_p > 0
    if has_dropout:
        # rows as long as those of the stack
        dx_TK = dz_TZ.new_empty(sizes.T, stack_ZK.shape[1])
        if has_base:
            torch.mm(dy_TN, operands.weight, out=dx_TK[:, :K])
        skinny.update_input_gradient_(dx_TK, dz_TZ, stack_ZK, sizes, settings, has_base=has_base)
        dx_TK = dx_TK[:, :K].contiguous()
    else:
        base_TK = dy_TN @ operands.weight if has_base else None
        dx_TK = _add_product(base_TK, dz_TZ, stack_ZK[:, :K])
    if settings.is_sparse:
        skinny.add_non_finite_(
            dx_TK,
            dz_TZ[:, : sizes.R],
            a_RK,
            saved.probs,
            sizes,
            settings if has_dropout else None,
        )
    return dx_TK


def _add_product(sum_TM: Tensor | None, left_TR: Tensor, right_RM: Tensor) -> Tensor:
    """sum + left @ right, in place where there is a sum."""
    return left_TR @ right_RM if sum_TM is None else sum_TM.addmm_(left_TR, right_RM)


def _finite(parameter: Tensor, settings: Settings) -> Tensor:
    """With top_k, without NaN and inf: 0 · NaN would reach tokens that drop the expert."""
    if not settings.is_sparse:
        return parameter
    return parameter.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
