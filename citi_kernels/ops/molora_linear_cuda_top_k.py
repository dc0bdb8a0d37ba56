"""The path of the backend "cuda" with top_k < E: each token meets the experts it keeps only.

Not yet run on a GPU. The algebra, the slots and `Saved` are those of `molora_linear_top_k`; bf16
and fp16 alone. Grouped products run in CUDA C++ (`citi_kernels._C`), the choice of experts and
everything rank-sized between them in PyTorch calls that do not wait for the GPU:

    probs, chosen experts = softmax and stable sort of fp32 logits     slots = stable sort by pair
    h  = a_e x[token]                                one row per slot
    y += (scaling * gate) * (h b_eᵀ)                 choice by choice: each holds a token once

    du = b_eᵀ dy[token]      dgate = scaling * <h, du>      dh = scaling * gate * du
    dlogits = softmax backward of the gates' gradients, per token
    db_e = Σ dy[token] uᵀ,  u = scaling * gate * h     da_e = Σ dh x[token]ᵀ     over e's slots
    dx = dlogits router + dy weight + dh a_e         choice by choice

No atomics: repeats are bitwise equal. All of it can be captured in a CUDA graph.

Shapes: T tokens, K in-features, N out-features, E experts, r rank, R = E·r, G = E + 1 gate
entries, B segments, S slots (top_k·T), C choices (top_k), P pairs of an expert and a choice (E·C),
Q tiles of the rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import molora_linear_reference as definition
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.molora_linear_top_k import Routing, empty_saved, routing_of, sum_dtype_of

__all__ = ["backward", "empty_saved", "forward", "refuses"]


def refuses(x: Tensor) -> str | None:
    """Why x cannot be taken, or None."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"with top_k it computes in bf16 and fp16, got {x.dtype}"
    return None


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Saved, Tensor | None]:
    """y (T, N), what the backward needs, and the gate sums (B, G) or None."""
    operands = _prepare(operands, operands.x.dtype)
    x_TK, sum_dtype = operands.x, sum_dtype_of(operands.x.dtype, settings)
    saved = empty_saved(x_TK, operands.a, settings)
    routing = routing_of(saved, settings)
    kept_TE = _route_(saved.probs, routing, x_TK, operands.router, settings)
    has_base = operands.weight is not None
    if has_base:
        y_TN = F.linear(x_TK, operands.weight, operands.bias).to(sum_dtype)
    else:
        y_TN = x_TK.new_empty(x_TK.shape[0], operands.b.shape[0], dtype=sum_dtype)
    _multiply_(
        saved.h,
        _dropped(x_TK, settings),
        operands.a,
        routing,
        settings,
        out_is_slots=True,
        weight_is_out_in=True,
        experts_in_rows=True,
    )
    _multiply_(
        y_TN,
        saved.h,
        operands.b,
        routing,
        settings,
        rows_are_slots=True,
        weight_is_out_in=True,
        adds=has_base,
        gates=saved.probs,
    )
    gate_sums_BG = None
    if settings.segment_ids is not None:
        gate_sums_BG = definition.sum_over_segments(
            definition.gates(saved.probs, kept_TE), settings.segment_ids, settings.num_segments
        )
    return y_TN.to(x_TK.dtype), saved, gate_sums_BG


def backward(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
) -> Operands:
    """Gradients, None where `needs` says no.

    dy is None where y took no part in the loss: weight, bias, a and b are then not needed.
    operands.x is None where no gradient needs it; operands.bias always is.
    """
    parameters, operands = operands, _prepare(operands, saved.h.dtype)
    dy_TN = None if dy_TN is None else dy_TN.contiguous()
    x_TK, routing = operands.x, routing_of(saved, settings)
    dh_Sr = dgate_QS = dlogits_TG = None
    if dy_TN is not None and (needs.x or needs.a or needs.router):
        dh_Sr, dgate_QS = _rank_gradients(dy_TN, operands.b, saved, routing, settings)
    if needs.x or needs.router:
        dlogits_TG = _route_backward(dgate_QS, dgate_sums_BG, saved, routing, settings)
    dx_TK = da_RK = db_NR = None
    if needs.x:
        dx_TK = _input_gradient(dy_TN, dh_Sr, dlogits_TG, operands, routing, settings)
    if needs.a:
        x_in_TK = _dropped(x_TK, settings)
        da_RK = _parameter_gradient(
            dh_Sr, x_in_TK, parameters.a, routing, settings, left_is_slots=True
        )
    if needs.b:
        u_Sr = _updates(saved, routing, settings)
        db_NR = _parameter_gradient(
            dy_TN, u_Sr, parameters.b, routing, settings, left_is_slots=False
        )
    return Operands(
        x=dx_TK,
        weight=dy_TN.T @ x_TK if needs.weight else None,
        bias=dy_TN.sum(0) if needs.bias else None,
        a=da_RK,
        b=db_NR,
        router=dlogits_TG.T @ x_TK if needs.router else None,
    )


def _route_(
    probs_TG: Tensor, routing: Routing, x_TK: Tensor, router_GK: Tensor, settings: Settings
) -> Tensor:
    """Fills probs (of dropped experts too) and routing; returns who is kept, (T, E) bool."""
    top_k, num_experts = settings.top_k, settings.num_experts
    logits_TG = F.linear(*definition.in_gate_dtype(x_TK, router_GK))
    # as `choose_experts`, but in the order of the choices
    order_TE = logits_TG[:, 1:].sort(dim=1, descending=True, stable=True).indices
    choices_TC = order_TE[:, :top_k]
    kept_TE = _kept(choices_TC, num_experts)
    probs_TG.copy_(definition.gate_probabilities(logits_TG, kept_TE, settings.renormalize))
    on_device = {"dtype": torch.int32, "device": x_TK.device}
    routing.pairs.copy_((choices_TC * top_k + torch.arange(top_k, **on_device)).T)
    pairs_S, order_S = routing.pairs.flatten().sort(stable=True)
    routing.order.copy_(order_S)
    every_pair = torch.arange(top_k * num_experts + 1, **on_device)
    routing.offsets.copy_(torch.searchsorted(pairs_S, every_pair))
    return kept_TE


def _kept(experts_TC: Tensor, num_experts: int) -> Tensor:
    """(T, E) bool."""
    kept_TE = experts_TC.new_zeros(experts_TC.shape[0], num_experts, dtype=torch.bool)
    return kept_TE.scatter_(1, experts_TC, True)


def _experts(routing: Routing, settings: Settings) -> Tensor:
    """(T, C) int64, the expert of every choice of every token."""
    return (routing.pairs // settings.top_k).T.long()


def _rank_gradients(
    dy_TN: Tensor, b_NR: Tensor, saved: Saved, routing: Routing, settings: Settings
) -> tuple[Tensor, Tensor]:
    """dh (S, r) in h's dtype, and parts of dgate (Q, S) by choice and token, fp32."""
    num_slots, rank = saved.h.shape
    num_tiles = compiled.extension().grouped_column_tiles(rank)
    dh_Sr, dgate_QS = torch.empty_like(saved.h), saved.probs.new_empty(num_tiles, num_slots)
    _multiply_(
        dh_Sr,
        dy_TN,
        b_NR,
        routing,
        settings,
        out_is_slots=True,
        gates=saved.probs,
        factors=saved.h,
        dots=dgate_QS,
    )
    return dh_Sr, dgate_QS


def _route_backward(
    dgate_QS: Tensor | None,
    dgate_sums_BG: Tensor | None,
    saved: Saved,
    routing: Routing,
    settings: Settings,
) -> Tensor:
    """dlogits (T, G) in h's dtype; either gradient may be None."""
    probs_TG, experts_TC = saved.probs, _experts(routing, settings)
    kept_TG = F.pad(_kept(experts_TC, settings.num_experts), (1, 0), value=True)
    dgate_TG = torch.zeros_like(probs_TG)
    if dgate_QS is not None:
        dgate_TG.scatter_(1, 1 + experts_TC, dgate_QS.sum(0).view(routing.pairs.shape).T)
    if dgate_sums_BG is not None:
        # the padded row of zeros is the last, where an index of -1 points
        of_segment_TG = F.pad(dgate_sums_BG, (0, 0, 0, 1))[settings.segment_ids]
        dgate_TG += of_segment_TG.masked_fill(~kept_TG, 0.0)
    dlogits_TG = probs_TG * (dgate_TG - (probs_TG * dgate_TG).sum(1, keepdim=True))
    if settings.renormalize:
        dlogits_TG = dlogits_TG.masked_fill(~kept_TG, 0.0)
    return dlogits_TG.to(saved.h.dtype)


def _input_gradient(
    dy_TN: Tensor | None,
    dh_Sr: Tensor | None,
    dlogits_TG: Tensor,
    operands: Operands,
    routing: Routing,
    settings: Settings,
) -> Tensor:
    dx_TK = dlogits_TG @ operands.router
    if dy_TN is None:
        return dx_TK
    dtype, sum_dtype = dx_TK.dtype, sum_dtype_of(dx_TK.dtype, settings)
    if operands.weight is not None:
        dx_TK.addmm_(dy_TN, operands.weight)
    dx_TK = dx_TK.to(sum_dtype)
    has_dropout = settings.dropout_p > 0
    of_experts_TK = torch.empty_like(dx_TK) if has_dropout else dx_TK
    _multiply_(
        of_experts_TK,
        dh_Sr,
        operands.a,
        routing,
        settings,
        rows_are_slots=True,
        experts_in_rows=True,
        adds=not has_dropout,
    )
    if has_dropout:
        dx_TK += _dropped(of_experts_TK, settings)
    return dx_TK.to(dtype)


def _updates(saved: Saved, routing: Routing, settings: Settings) -> Tensor:
    """u (S, r) = scaling * gate * h, rounded once."""
    gate_TC = saved.probs.gather(1, 1 + _experts(routing, settings))
    gate_S = gate_TC.T.flatten()[routing.order]
    return (saved.h * (settings.scaling * gate_S)[:, None]).to(saved.h.dtype)


def _multiply_(
    out: Tensor,
    rows: Tensor,
    weight: Tensor,
    routing: Routing,
    settings: Settings,
    *,
    rows_are_slots: bool = False,
    out_is_slots: bool = False,
    weight_is_out_in: bool = False,
    experts_in_rows: bool = False,
    adds: bool = False,
    gates: Tensor | None = None,
    factors: Tensor | None = None,
    dots: Tensor | None = None,
) -> None:
    """out (+)= scaling * gate * rows weight_e of every slot; scaling and gate with `gates` only.

    Rows of out are slots, all written at once, or tokens: choice by choice, each of which holds
    every token once, so that the first may write where the others add.
    """
    (num_choices, num_tokens), num_experts = routing.pairs.shape, settings.num_experts
    if num_tokens == 0:
        return
    every_choice = [(choice, choice + 1) for choice in range(num_choices)]
    for first, end in [(0, num_choices)] if out_is_slots else every_choice:
        compiled.extension().grouped_product_cuda(
            routing=(num_tokens, num_experts, num_choices),
            choices=(first, end),
            features=(rows.shape[1], out.shape[1]),
            order=compiled.indices(routing.order),
            offsets=compiled.indices(routing.offsets),
            rows=compiled.matrix(rows),
            rows_are_slots=rows_are_slots,
            weight=compiled.matrix(weight),
            weight_is_out_in=weight_is_out_in,
            experts_in_rows=experts_in_rows,
            out=compiled.matrix(out),
            out_is_slots=out_is_slots,
            adds=adds or first > 0,
            gates=None if gates is None else compiled.matrix(gates),
            scaling=1.0 if gates is None else settings.scaling,
            factors=None if factors is None else compiled.matrix(factors),
            dots=compiled.vector(dots),
            **compiled.launch_place(out),
        )


def _parameter_gradient(
    left: Tensor,
    right: Tensor,
    parameter: Tensor,
    routing: Routing,
    settings: Settings,
    *,
    left_is_slots: bool,
) -> Tensor:
    """Σ leftᵀ right over the slots of each expert, shaped as the parameter.

    Slots and tokens are what is left and right for a, whose experts lie one below the other, and
    right and left for b. In the parameter's dtype where that is the inputs', else in fp32.
    """
    dtype = parameter.dtype if parameter.dtype == left.dtype else torch.float32
    num_choices, num_tokens = routing.pairs.shape
    gradient = parameter.new_empty(parameter.shape, dtype=dtype)
    if num_tokens == 0:
        return gradient.zero_()
    compiled.extension().grouped_gradient_cuda(
        routing=(num_tokens, settings.num_experts, num_choices),
        features=(left.shape[1], right.shape[1]),
        order=compiled.indices(routing.order),
        offsets=compiled.indices(routing.offsets),
        left=compiled.matrix(left),
        left_is_slots=left_is_slots,
        right=compiled.matrix(right),
        right_is_slots=not left_is_slots,
        out=compiled.matrix(gradient),
        experts_in_rows=left_is_slots,
        **compiled.launch_place(gradient),
    )
    return gradient


def _dropped(rows_TK: Tensor, settings: Settings) -> Tensor:
    """Rows of the experts' input, or of its gradient, with what is dropped 0."""
    if settings.dropout_p == 0:
        return rows_TK
    return rows_TK * definition.dropout_scale(
        rows_TK.shape,
        settings.dropout_p,
        settings.dropout_seed,
        dtype=rows_TK.dtype,
        device=rows_TK.device,
    )


def _prepare(operands: Operands, dtype: torch.dtype) -> Operands:
    """All but weight in one layout and dtype, so that results do not depend on the caller's."""
    x_TK = None if operands.x is None else operands.x.contiguous()
    a_RK, b_NR, router_GK = (
        each.to(dtype).contiguous() for each in (operands.a, operands.b, operands.router)
    )
    return operands._replace(x=x_TK, a=a_RK, b=b_NR, router=router_GK)
