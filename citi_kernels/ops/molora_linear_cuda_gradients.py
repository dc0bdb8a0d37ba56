"""Gradients of the dense path of backend "cuda", and which GEMM it takes; see `molora_linear_cuda`.

    routed    dx and dz from one GEMM, db beside it; then those of a and router
    beside    du, dz; dx from one GEMM with a longer K, all other gradients beside it
    in turn   every pass after the other, dx from a library's product and an update in place

Shapes: as in `molora_linear_cuda`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels import environment
from citi_kernels.ops import extended_gemm_cuda, routed_gemm_cuda
from citi_kernels.ops import skinny_cuda as skinny
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.side_stream import Beside

# of dx, a, b and router
Factors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# below it the extended GEMM has not been timed
MIN_EXTENDED_TOKENS = 512
# from where on the routed GEMM was the faster, by measurement (2048 tokens: not yet)
MIN_ROUTED_TOKENS = 4096


def takes_routed(
    left: Tensor,
    weight_NK: Tensor | None,
    sizes: skinny.Sizes,
    settings: Settings,
    bias_N: Tensor | None = None,
) -> bool:
    """Whether the GEMM that makes its own extension is wanted and possible."""
    if not environment.ROUTED_GEMM or left.shape[0] < MIN_ROUTED_TOKENS:
        return False
    if not takes_extended(left, weight_NK, settings, bias_N):
        return False
    return routed_gemm_cuda.why_not(left, weight_NK, bias_N, sizes, settings) is None


def takes_extended(
    left: Tensor, weight_NK: Tensor | None, settings: Settings, bias_N: Tensor | None = None
) -> bool:
    """Whether one GEMM with a longer K is wanted and possible; with top_k see `finite`."""
    if not environment.EXTENDED_GEMM or weight_NK is None or settings.is_sparse:
        return False
    if left.shape[0] < MIN_EXTENDED_TOKENS:
        return False
    return extended_gemm_cuda.why_not(left, weight_NK, bias_N) is None


def gradients_beside(
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
    # not where dy was given columns of zeros, which weight does not have
    is_as_wide = aligned_TN.shape == dy_TN.shape
    if is_as_wide and takes_routed(aligned_TN, operands.weight, sizes, settings):
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
    early = _early_down_gradients(dy_TN, operands, sizes, needs)
    cleared = early.numbers if "zeros_in_pack" in environment.TRIALS else None
    if cleared is None:
        early.numbers.zero_()
    stack_ZK = skinny.stack(operands.a, operands.router, sizes, dy_TN.dtype, cleared)
    b_NR = extended_gemm_cuda.aligned_rows(operands.b.to(dy_TN.dtype))
    db_NR = _up_gradient_beside(dy_TN, operands, saved, sizes, settings, needs, beside)
    dz_TZ, parts_CKV = dy_TN.new_empty(sizes.T, sizes.Z), None
    if early.done.numel():
        parts_CKV = _down_parts(dz_TZ, operands, sizes, settings, needs, beside, early)
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
            early.counts,
            dz_TZ,
        )
    if parts_CKV is None:
        da_RK, drouter_GK = _down_gradients(dz_TZ, operands, sizes, settings, needs)
    else:
        early.rest()
        da_RK, drouter_GK = _down_sums(parts_CKV, operands, sizes, needs)
    return dx_TK, da_RK, db_NR, drouter_GK


def _early_down_gradients(
    dy_TN: Tensor, operands: Operands, sizes: skinny.Sizes, needs: Needs
) -> skinny.Early:
    """Numbers of the GEMM's counts, and of the blocks that begin beside it, none by default."""
    num_parts = 0
    if "down_beside" in environment.TRIALS and (needs.a or needs.router):
        first, last = _columns_of_down(sizes, needs)
        num_inputs = skinny.padded(operands.x.shape[1])
        num_parts = skinny.num_parts(sizes.T, num_inputs, last - first)
    num_counts = routed_gemm_cuda.num_counts(sizes.T)
    numbers = dy_TN.new_empty(num_counts + num_parts, dtype=torch.int32)
    return skinny.Early(numbers, numbers[:num_counts], numbers[num_counts:])


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


def gradients_in_turn(
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
    if not needs_rank(needs):
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
        is_shared = sizes.P <= skinny.MAX_RANK_OF_ONE_PASS and needs_rank(needs)
        rounded_NR = _rounded(b_NR, dy_TN) if is_shared else None
        parts_CNP, du_CTP = skinny.factor_gradients(dy_TN, u_TP, rounded_NR)
        db_NR = _sum_up(parts_CNP, b_NR, sizes)
    if du_CTP is None and needs_rank(needs):
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
    parts_CKV = _down_parts(dz_TZ, operands, sizes, settings, needs, beside)
    return _down_sums(parts_CKV, operands, sizes, needs, beside)


def _columns_of_down(sizes: skinny.Sizes, needs: Needs) -> tuple[int, int]:
    """Of dz: where those of a and router begin and end, of what is asked for."""
    return 0 if needs.a else sizes.P, sizes.Z if needs.router else sizes.P


def _down_parts(
    dz_TZ: Tensor,
    operands: Operands,
    sizes: skinny.Sizes,
    settings: Settings,
    needs: Needs,
    beside: Beside | None = None,
    early: skinny.Early | None = None,
) -> Tensor:
    first, last = _columns_of_down(sizes, needs)
    parts_CKV, _ = skinny.factor_gradients(
        skinny.aligned(operands.x),
        dz_TZ[:, first:last],
        rank_columns=sizes.P if needs.a else 0,
        settings=settings if needs.a else None,
        beside=beside,
        early=early,
    )
    return parts_CKV


def _down_sums(
    parts_CKV: Tensor,
    operands: Operands,
    sizes: skinny.Sizes,
    needs: Needs,
    beside: Beside | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    first, K = _columns_of_down(sizes, needs)[0], operands.x.shape[1]
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
    stack_ZK = skinny.stack(finite(a_RK, settings), operands.router, sizes, dz_TZ.dtype)
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
        dx_TK = add_product(base_TK, dz_TZ, stack_ZK[:, :K])
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


def needs_rank(needs: Needs) -> bool:
    return needs.x or needs.a or needs.router


def add_product(sum_TM: Tensor | None, left_TR: Tensor, right_RM: Tensor) -> Tensor:
    """sum + left @ right, in place where there is a sum."""
    return left_TR @ right_RM if sum_TM is None else sum_TM.addmm_(left_TR, right_RM)


def finite(parameter: Tensor, settings: Settings) -> Tensor:
    """With top_k, without NaN and inf: 0 · NaN would reach tokens that drop the expert."""
    if not settings.is_sparse:
        return parameter
    return parameter.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
