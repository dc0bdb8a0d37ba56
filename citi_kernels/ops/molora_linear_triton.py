"""Backend "triton" of `citi::molora_linear`: which kernels run, in what order.

    path      when                                             what runs
    dense     stacked rank up to 256, with top_k < E up to     this module: rank-sized passes; the
              128; in fp32, without tensor cores, up to 64     gates of dropped experts are 0
    grouped   top_k < E, wider than that                       `molora_linear_top_k`
    library   every expert kept, wider than that               the torch backend: ordinary GEMMs

With top_k the dense path computes all experts, and passes once over x, y, dx and dy; the grouped
path computes those kept, and passes top_k times over each. Up to rank 128 the arithmetic is a few
percent of the layer's, and passes decide.

Dense, 8 launches forward and backward:

    forward   shrink and route; expand, with the gate sums; base product added in place
    backward  up gradients; rank gradients; down gradients; input gradient, with the second stage
              of db, da and drouter; base product added in place

The update comes first because cuBLAS adds to what lies there for 2 % of its time, where an update
after it reads and writes y once more: 385 against 410 us at 8192 x 4096 x 4096 on an H100. With a
bias, which cuBLAS adds only instead, the update comes after.

Gradients that are not asked for are not computed: with the router alone trained, du is computed
inside rank gradients; with the adapter frozen, the pass over x does not run.

The kernels are imported when they first run, so that this module needs no Triton.

Shapes: T tokens, K in-features, N out-features, R stacked rank (E·r), G = E + 1, B segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels.ops import molora_linear_top_k, molora_linear_torch
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings

MAX_DENSE_RANK = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}
MAX_SPARSE_DENSE_RANK = 128
MAX_DENSE_GATES = 128


def refuses(x: Tensor) -> str | None:
    """Why x cannot be taken, or None."""
    if x.dtype == torch.float64:
        return "it computes in fp32, bf16 and fp16, got torch.float64"
    return None


def path(stacked_rank: int, dtype: torch.dtype, settings: Settings) -> str:
    """Which of "dense", "grouped" and "library", for x of `dtype`."""
    widest = MAX_DENSE_RANK[dtype]
    if settings.is_sparse:
        widest = min(widest, MAX_SPARSE_DENSE_RANK)
    if stacked_rank <= widest and settings.num_experts + 1 <= MAX_DENSE_GATES:
        return "dense"
    return "grouped" if settings.is_sparse else "library"


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Saved, Tensor | None]:
    """y (T, N), what the backward needs, and the gate sums (B, G) or None."""
    other = _other_path(operands.a, operands.x.dtype, settings)
    if other is not None:
        return other.forward(operands, settings)
    return forward_group([operands], [settings])[0]


def backward(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
) -> Operands:
    """Gradients, None where `needs` says no; see `molora_linear_torch.backward`."""
    other = _other_path(operands.a, saved.h.dtype, settings)
    if other is not None:
        return other.backward(dy_TN, dgate_sums_BG, operands, saved, settings, needs)
    incoming = [(dy_TN, dgate_sums_BG)]
    dx_TK, (gradients,) = backward_group(incoming, [operands], [saved], [settings], [needs])
    return gradients._replace(x=dx_TK)


def forward_group(
    operands_L: Sequence[Operands], settings_L: Sequence[Settings]
) -> list[tuple[Tensor, Saved, Tensor | None]]:
    """`forward` of up to three dense layers that share x, E and r; x is read once for all."""
    from citi_kernels.triton_kernels import base_product
    from citi_kernels.triton_kernels.decode import decode_linear
    from citi_kernels.triton_kernels.shrink_route import shrink_route

    operands_L = [_contiguous(each) for each in operands_L]
    x_TK, rank = operands_L[0].x, operands_L[0].a.shape[0]
    way_L = ["update"] * len(operands_L)
    if not settings_L[0].is_sparse:
        way_L = [
            base_product.choose_base_product(x_TK, each.weight, x_TK.shape[0], rank)
            for each in operands_L
        ]
    if not {"few", "decode"}.isdisjoint(way_L):
        layers = []
        for operands, settings, way in zip(operands_L, settings_L, way_L, strict=True):
            base_TN = None
            if way != "decode" and operands.weight is not None:
                base_TN = F.linear(x_TK, operands.weight, operands.bias)
            y_TN, h_TR, probs_TG = decode_linear(operands, settings, base_TN=base_TN)
            layers.append((y_TN, Saved(h_TR, probs_TG, None), _sum_gates(probs_TG, settings)))
        return layers
    ranks = shrink_route(
        x_TK, [each.a for each in operands_L], [each.router for each in operands_L], settings_L
    )
    saved_L = [Saved(h_TR, probs_TG, None) for h_TR, probs_TG in ranks]
    return [_expand(*each) for each in zip(operands_L, saved_L, settings_L, way_L, strict=True)]


def _expand(
    operands: Operands, saved: Saved, settings: Settings, way: str
) -> tuple[Tensor, Saved, Tensor | None]:
    from citi_kernels.triton_kernels.expand import expand_
    from citi_kernels.triton_kernels.extended_gemm import extended_linear

    x_TK, weight_NK, bias_N, _, b_NR, _ = operands
    h_TR, probs_TG, _ = saved
    if way == "extended":
        y_TN = extended_linear(x_TK, weight_NK, bias_N, h_TR, probs_TG, b_NR, settings)
        return y_TN, saved, _sum_gates(probs_TG, settings)
    if bias_N is not None:
        y_TN = F.linear(x_TK, weight_NK, bias_N)
        return y_TN, saved, expand_(y_TN, h_TR, probs_TG, b_NR, settings, has_base=True)
    y_TN = x_TK.new_empty(x_TK.shape[0], b_NR.shape[0])
    gate_sums_BG = expand_(y_TN, h_TR, probs_TG, b_NR, settings, has_base=False)
    if weight_NK is not None:
        y_TN.addmm_(x_TK, weight_NK.T)
    return y_TN, saved, gate_sums_BG


def _sum_gates(probs_TG: Tensor, settings: Settings) -> Tensor | None:
    from citi_kernels.triton_kernels.gate_sums import gate_sums

    return None if settings.segment_ids is None else gate_sums(probs_TG, settings)


def backward_group(
    incoming_L: Sequence[tuple[Tensor | None, Tensor | None]],
    operands_L: Sequence[Operands],
    saved_L: Sequence[Saved],
    settings_L: Sequence[Settings],
    needs_L: Sequence[Needs],
) -> tuple[Tensor | None, list[Operands]]:
    """dx (T, K) of all layers together, and each layer's other gradients.

    Args:
        incoming_L: dy (T, N) and dgate_sums (B, G) of each layer; None where there is none, and
            then nothing that comes from it may be asked for.
        operands_L, saved_L, settings_L: of `forward_group`.
        needs_L: what is asked for; x of all or of none.
    """
    incoming_L = [
        tuple(None if each is None else each.contiguous() for each in pair) for pair in incoming_L
    ]
    operands_L = [_contiguous(each) for each in operands_L]
    gradients_L, sums, ranks_L = [], [], []
    for layer in zip(incoming_L, operands_L, saved_L, settings_L, needs_L, strict=True):
        gradients, ranks = _up_and_rank(*layer, sums)
        gradients_L.append(gradients)
        ranks_L.append(ranks)
    if any(needs.a or needs.router for needs in needs_L):
        gradients_L = _down(gradients_L, operands_L, ranks_L, settings_L, needs_L, sums)
    dx_TK = None
    if needs_L[0].x or sums:
        dy_L = [dy_TN for dy_TN, _ in incoming_L]
        dx_TK = _input_gradient(dy_L, ranks_L, operands_L, saved_L, sums, settings_L, needs_L[0].x)
    return dx_TK, gradients_L


def _up_and_rank(
    incoming: tuple[Tensor | None, Tensor | None],
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
    sums: list,
) -> tuple[Operands, tuple[Tensor, Tensor]]:
    """Gradients of b, weight and bias (b's sum is left to `sums`), and (dh, dlogits)."""
    from citi_kernels.triton_kernels.input_gradient import Parts
    from citi_kernels.triton_kernels.rank_gradients import rank_gradients
    from citi_kernels.triton_kernels.up_gradients import up_gradients

    dy_TN, dgate_sums_BG = incoming
    (h_TR, probs_TG, _), b_NR = saved, operands.b
    needs_rank = needs.x or needs.a or needs.router
    db_NR, du_CTR = None, None
    if needs.b:
        db_NR = torch.empty_like(b_NR)
        du_CTR, db_SNR = up_gradients(dy_TN, b_NR, h_TR, probs_TG, settings, needs_du=needs_rank)
        sums.append(Parts(db_SNR, 0, db_NR))
    if needs_rank:
        ranks = rank_gradients(dy_TN, du_CTR, dgate_sums_BG, b_NR, h_TR, probs_TG, settings)
    else:
        # no result comes of these, so that nobody fills them; but kernels want their dtypes
        ranks = h_TR, torch.empty_like(probs_TG, dtype=h_TR.dtype)
    gradients = Operands(
        x=None,
        weight=dy_TN.T @ operands.x if needs.weight else None,
        bias=dy_TN.sum(0) if needs.bias else None,
        a=None,
        b=db_NR,
        router=None,
    )
    return gradients, ranks


def _down(
    gradients_L: Sequence[Operands],
    operands_L: Sequence[Operands],
    ranks_L: Sequence[tuple[Tensor, Tensor]],
    settings_L: Sequence[Settings],
    needs_L: Sequence[Needs],
    sums: list,
) -> list[Operands]:
    """The gradients with those of a and router, whose sums are left to `sums`."""
    from citi_kernels.triton_kernels.down_gradients import down_gradients
    from citi_kernels.triton_kernels.input_gradient import Parts

    needs_a = any(needs.a for needs in needs_L)
    needs_router = any(needs.router for needs in needs_L)
    dh_LTR, dlogits_LTG = zip(*ranks_L, strict=True)
    parts_L = down_gradients(
        operands_L[0].x,
        dh_LTR,
        dlogits_LTG,
        settings_L,
        needs_a=needs_a,
        needs_router=needs_router,
    )
    complete = []
    for gradients, operands, needs, parts_SDK in zip(
        gradients_L, operands_L, needs_L, parts_L, strict=True
    ):
        da_RK = torch.empty_like(operands.a) if needs.a else None
        drouter_GK = torch.empty_like(operands.router) if needs.router else None
        if needs.a:
            sums.append(Parts(parts_SDK, 0, da_RK))
        if needs.router:
            sums.append(Parts(parts_SDK, operands.a.numel() * needs_a, drouter_GK))
        complete.append(gradients._replace(a=da_RK, router=drouter_GK))
    return complete


def _input_gradient(
    dy_L: Sequence[Tensor | None],
    ranks_L: Sequence[tuple[Tensor, Tensor]],
    operands_L: Sequence[Operands],
    saved_L: Sequence[Saved],
    sums: list,
    settings_L: Sequence[Settings],
    needs_x: bool,
) -> Tensor | None:
    """dx or None, and what `sums` asks for."""
    from citi_kernels.triton_kernels import base_product
    from citi_kernels.triton_kernels.extended_gemm import extended_input_gradient
    from citi_kernels.triton_kernels.input_gradient import input_gradient_

    dh_LTR, dlogits_LTG = zip(*ranks_L, strict=True)
    dx_TK, is_complete = None, False
    based = [(dy, each) for dy, each in zip(dy_L, operands_L, strict=True)]
    based = [(dy, each) for dy, each in based if dy is not None and each.weight is not None]
    if needs_x:
        way = "update"
        if len(operands_L) == len(based) == 1 and not settings_L[0].is_sparse:
            dy_TN, (_, weight_NK, _, a_RK, _, router_GK) = based[0]
            way = base_product.choose_base_product(
                dy_TN, weight_NK, dy_TN.shape[0], a_RK.shape[0], direction="backward"
            )
        if way == "extended":
            is_complete = True
            dx_TK = extended_input_gradient(
                dy_TN, weight_NK, *ranks_L[0][:1], a_RK, ranks_L[0][1], router_GK, settings_L[0]
            )
        else:
            dx_TK = dh_LTR[0].new_empty(dh_LTR[0].shape[0], operands_L[0].a.shape[1])
    if not is_complete or sums:
        input_gradient_(
            None if is_complete else dx_TK,
            dh_LTR,
            dlogits_LTG,
            [each.a for each in operands_L],
            [each.router for each in operands_L],
            [each.probs for each in saved_L],
            sums,
            settings_L,
        )
    if needs_x and not is_complete:
        for dy_TN, operands in based:
            dx_TK.addmm_(dy_TN, operands.weight)
    return dx_TK


def empty_saved(x_TK: Tensor, a_RK: Tensor, settings: Settings) -> Saved:
    """h (T, R), probs (T, G) fp32; on another path, that path's."""
    other = _other_path(a_RK, x_TK.dtype, settings)
    if other is not None:
        return other.empty_saved(x_TK, a_RK, settings)
    num_tokens = x_TK.shape[0]
    return Saved(
        h=x_TK.new_empty(num_tokens, a_RK.shape[0]),
        probs=x_TK.new_empty(num_tokens, settings.num_experts + 1, dtype=torch.float32),
        kept=None,
    )


def _other_path(a_RK: Tensor, dtype: torch.dtype, settings: Settings) -> ModuleType | None:
    others = {"grouped": molora_linear_top_k, "library": molora_linear_torch}
    return others.get(path(a_RK.shape[0], dtype, settings))


def _contiguous(operands: Operands) -> Operands:
    """All but weight, which is read as it lies; rows of x may lie apart."""
    x_TK, weight_NK, *others = operands
    if x_TK is not None and (x_TK.stride(1) != 1 or x_TK.stride(0) < x_TK.shape[1]):
        x_TK = x_TK.contiguous()
    return Operands(
        x_TK, weight_NK, *(None if each is None else each.contiguous() for each in others)
    )
