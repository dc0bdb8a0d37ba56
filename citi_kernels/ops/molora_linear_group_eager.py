"""`citi::molora_linear_group` without PyTorch's dispatch of custom ops, as `molora_linear_eager`.

Shapes: T tokens, G gate entries, B segments; L layers, as a suffix of lists.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.molora_linear_eager import in_shape_of, rows_of, wants_gradient
from citi_kernels.ops.molora_linear_group_op import (
    answerable,
    by_layer,
    checked_forward,
    run_gradients,
    unsaved,
)
from citi_kernels.ops.molora_linear_op import check_unchanged, versions_of


def run_eager_group(
    operands_L: list[Operands], settings_L: list[Settings], backend: str
) -> list[tuple[Tensor, Tensor | None]]:
    """y (..., N) and gate sums (B, G), None without segments, of each layer.

    x (..., K) is the same in all.
    """
    x = operands_L[0].x
    operands = list(itertools.chain(*(each[1:] for each in operands_L)))
    if wants_gradient(x, *operands):
        return by_layer(EagerGroup.apply(settings_L, backend, x, *operands), size=2)
    x_TK = rows_of(x)
    operands_L = [each._replace(x=x_TK) for each in operands_L]
    y_LTN, _, gate_sums_LBG = checked_forward(operands_L, settings_L, backend)
    y_L = [in_shape_of(y_TN, x.shape) for y_TN in y_LTN]
    return list(zip(y_L, gate_sums_LBG, strict=True))


class EagerGroup(torch.autograd.Function):
    """The op for autograd alone.

    apply(settings_L, backend, x, *operands): weight, bias, a, b and router of each layer, the first
    two maybe None. Returns y (..., N) and gate_sums (B, G), None without segments, of each layer.
    """

    @staticmethod
    def forward(
        ctx: Any, settings_L: list[Settings], backend: str, x: Tensor, *operands: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TK = rows_of(x)
        operands_L = [Operands(x_TK, *each) for each in by_layer(operands)]
        y_LTN, saved_L, gate_sums_LBG = checked_forward(operands_L, settings_L, backend)
        ctx.set_materialize_grads(False)
        needs_x, *flags = ctx.needs_input_grad[2:]
        needs_L = [Needs(needs_x, *each) for each in by_layer(flags)]
        is_x_needed = any(each.weight or each.a or each.router for each in needs_L)
        kept = [
            (each.weight if needs_x else None, each.a, each.b, each.router, saved.h, saved.probs)
            for each, saved in zip(operands_L, saved_L, strict=True)
        ]
        ctx.save_for_backward(x_TK if is_x_needed else None, *itertools.chain(*kept))
        ctx.x_shape = x.shape
        ctx.needs_L, ctx.settings_L, ctx.backend = needs_L, settings_L, backend
        ctx.versions = versions_of(*_unsaved(settings_L))
        y_L = [in_shape_of(y_TN, x.shape) for y_TN in y_LTN]
        return tuple(itertools.chain(*zip(y_L, gate_sums_LBG, strict=True)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        names = unsaved(len(ctx.settings_L))
        check_unchanged(names, _unsaved(ctx.settings_L), ctx.versions)
        x, *kept = ctx.saved_tensors
        kept_L = by_layer(kept, size=6)
        incoming_L = [
            (None if dy is None else rows_of(dy), dgate_sums)
            for dy, dgate_sums in by_layer(incoming, size=2)
        ]
        needs_L = [answerable(*each) for each in zip(ctx.needs_L, incoming_L, strict=True)]
        reached = [i for i, needs in enumerate(needs_L) if any(needs)]
        dx, gradients_L = None, [Operands(*[None] * 6)] * len(needs_L)
        if reached:
            dx_TK, found = run_gradients(
                [incoming_L[i] for i in reached],
                [Operands(x, kept_L[i][0], None, *kept_L[i][1:4]) for i in reached],
                [Saved(*kept_L[i][4:], None) for i in reached],
                [ctx.settings_L[i] for i in reached],
                [needs_L[i] for i in reached],
                ctx.backend,
            )
            dx = None if dx_TK is None else in_shape_of(dx_TK, ctx.x_shape)
            for i, gradients in zip(reached, found, strict=True):
                gradients_L[i] = gradients
        return None, None, dx, *itertools.chain(*(each[1:] for each in gradients_L))


def _unsaved(settings_L: list[Settings]) -> list[Tensor | None]:
    return [settings_L[0].segment_ids, *(each.dropout_seed for each in settings_L)]
