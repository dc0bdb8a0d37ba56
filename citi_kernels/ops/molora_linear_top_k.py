"""The path of the backend "triton" with top_k < E: each token meets the experts it keeps only.

A token has top_k slots, one per expert that it keeps. Slots are sorted by expert, so that every
product of the experts is one over the contiguous slots of each (a grouped product):

    probs, chosen experts = route(x)                 slots = stable counting sort
    h  = a_e x[token]                                one row per slot
    y += (scaling * gate * h) b_eᵀ                   choice by choice: each holds a token once

    du = b_eᵀ dy[token]      dgate = scaling * <h, du>      dh = scaling * gate * du
    dlogits = softmax backward of the gates' gradients, per token
    db_e, da_e = over the slots of expert e
    dx = dy weight + dlogits router + dh a_e         choice by choice, the router with the first

Numbers of slots stay on the device: grids are upper bounds, nothing waits, and all of it can be
captured in a CUDA graph. No atomics.

Shapes: T tokens, K in-features, N out-features, E experts, r rank, R = E·r, G = E + 1 gate
entries, B segments, S slots (top_k·T), C choices (top_k), P pairs of an expert and a choice (E·C).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings

# a rounding of y per choice: with 4, half of what the accuracy rule allows; with 16, all of it
_MAX_ROUNDINGS = 4


class Routing(NamedTuple):
    """Who keeps whom, int32: the parts of `Saved.kept`."""

    pairs: Tensor  # (C, T): expert * C + choice, of every choice of every token
    order: Tensor  # (S,): slot -> choice * T + token, sorted by pair, then by token
    offsets: Tensor  # (P + 1,): the slots of pair p are offsets[p] .. offsets[p + 1] - 1


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Saved, Tensor | None]:
    """y (T, N), what the backward needs, and the gate sums (B, G) or None."""
    from citi_kernels.triton_kernels.gate_sums import gate_sums
    from citi_kernels.triton_kernels.grouped_expand import grouped_expand_
    from citi_kernels.triton_kernels.grouped_shrink import grouped_shrink_
    from citi_kernels.triton_kernels.top_k_route import top_k_route_

    operands = _contiguous(operands)
    x_TK = operands.x
    saved = empty_saved(x_TK, operands.a, settings)
    routing = routing_of(saved, settings)
    has_base, sum_dtype = operands.weight is not None, sum_dtype_of(x_TK.dtype, settings)
    if has_base:
        y_TN = F.linear(x_TK, operands.weight, operands.bias).to(sum_dtype)
    else:
        y_TN = x_TK.new_empty(x_TK.shape[0], operands.b.shape[0], dtype=sum_dtype)
    gate_TG = top_k_route_(saved.probs, routing, x_TK, operands.router, settings)
    grouped_shrink_(saved.h, x_TK, operands.a, routing, settings)
    grouped_expand_(y_TN, saved.h, saved.probs, operands.b, routing, settings, has_base=has_base)
    gate_sums_BG = None if gate_TG is None else gate_sums(gate_TG, settings)
    return y_TN.to(x_TK.dtype), saved, gate_sums_BG


def empty_saved(x_TK: Tensor, a_RK: Tensor, settings: Settings) -> Saved:
    """h (S, r); probs (T, G), of dropped experts too; kept: the parts of `Routing`, flat."""
    num_tokens, num_experts = x_TK.shape[0], settings.num_experts
    num_slots, num_pairs = settings.top_k * num_tokens, settings.top_k * num_experts
    return Saved(
        h=x_TK.new_empty(num_slots, a_RK.shape[0] // num_experts),
        probs=x_TK.new_empty(num_tokens, num_experts + 1, dtype=torch.float32),
        kept=x_TK.new_empty(2 * num_slots + num_pairs + 1, dtype=torch.int32),
    )


def routing_of(saved: Saved, settings: Settings) -> Routing:
    """The parts of `saved.kept`, as views."""
    num_slots = saved.h.shape[0]
    pairs_S, order_S, offsets = saved.kept.split(
        [num_slots, num_slots, settings.top_k * settings.num_experts + 1]
    )
    pairs_CT = pairs_S.view(settings.top_k, num_slots // settings.top_k)
    return Routing(pairs_CT, order_S, offsets)


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
    from citi_kernels.triton_kernels.grouped_parameter_gradients import a_gradient, b_gradient
    from citi_kernels.triton_kernels.grouped_rank_gradients import grouped_rank_gradients
    from citi_kernels.triton_kernels.top_k_route_backward import top_k_route_backward

    operands = _contiguous(operands)
    dy_TN = None if dy_TN is None else dy_TN.contiguous()
    x_TK, routing = operands.x, routing_of(saved, settings)
    dh_Sr = dgate_parts = dlogits_TG = None
    if dy_TN is not None and (needs.x or needs.a or needs.router):
        dh_Sr, dgate_parts = grouped_rank_gradients(dy_TN, operands.b, saved, routing, settings)
    if needs.x or needs.router:
        dlogits_TG = top_k_route_backward(dgate_parts, dgate_sums_BG, saved, routing, settings)
    return Operands(
        x=_input_gradient(dy_TN, dh_Sr, dlogits_TG, operands, routing, settings)
        if needs.x
        else None,
        weight=dy_TN.T @ x_TK if needs.weight else None,
        bias=dy_TN.sum(0) if needs.bias else None,
        a=a_gradient(x_TK, dh_Sr, operands.a, saved, routing, settings) if needs.a else None,
        b=b_gradient(dy_TN, operands.b, saved, routing, settings) if needs.b else None,
        router=dlogits_TG.T @ x_TK if needs.router else None,
    )


def _input_gradient(
    dy_TN: Tensor | None,
    dh_Sr: Tensor | None,
    dlogits_TG: Tensor,
    operands: Operands,
    routing: Routing,
    settings: Settings,
) -> Tensor:
    from citi_kernels.triton_kernels.grouped_input_gradient import grouped_input_gradient_

    if dy_TN is None:
        return dlogits_TG @ operands.router.to(dlogits_TG.dtype)
    has_base, sum_dtype = operands.weight is not None, sum_dtype_of(dy_TN.dtype, settings)
    if has_base:
        dx_TK = (dy_TN @ operands.weight).to(sum_dtype)
    else:
        dx_TK = dy_TN.new_empty(dy_TN.shape[0], operands.a.shape[1], dtype=sum_dtype)
    grouped_input_gradient_(
        dx_TK, dh_Sr, dlogits_TG, operands, routing, settings, has_base=has_base
    )
    return dx_TK.to(dy_TN.dtype)


def sum_dtype_of(dtype: torch.dtype, settings: Settings) -> torch.dtype:
    """Of the sum over the choices, which is rounded to it at each: no 16 bits where they are many.

    fp32 and fp64 stay.
    """
    if settings.top_k <= _MAX_ROUNDINGS:
        return dtype
    return torch.promote_types(dtype, torch.float32)


def _contiguous(operands: Operands) -> Operands:
    """All but weight in one layout, so that results do not depend on the caller's strides."""
    return operands._replace(
        x=None if operands.x is None else operands.x.contiguous(),
        a=operands.a.contiguous(),
        b=operands.b.contiguous(),
        router=operands.router.contiguous(),
    )
