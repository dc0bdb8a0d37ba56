"""`citi::molora_linear` where nothing but autograd looks on, or not even that.

PyTorch's dispatch of a custom op takes longer than a small layer, and so does the bookkeeping of an
autograd function while text is generated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from citi_kernels.ops.autocast import without_autocast
from citi_kernels.ops.molora_linear_contract import Operands, Saved, Settings, forward_only
from citi_kernels.ops.molora_linear_op import (
    UNSAVED,
    check_unchanged,
    checked_backend,
    checked_forward,
    keep,
    needs_of,
    run_gradients,
    versions_of,
)

_PLAIN = (Tensor, nn.Parameter)


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks on: no compiler, tracer, mode, transform or subclass.

    Nor a lazy negation (`is_neg`), which the dispatch of a custom op resolves.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or tensors[0].is_meta
    ):
        return False
    # a loop: a generator would cost as much again as what it asks
    for each in tensors:
        if each is not None and (type(each) not in _PLAIN or each.is_neg()):
            return False
    return True


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has something to do with an op on these, forward mode included."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for each in tensors:
            if each is not None and each.requires_grad:
                return True
    return False


def refuse_forward_mode(op: str) -> None:
    """A custom op has no formula for tangents, and PyTorch would take them for 0.

    Raises:
        NotImplementedError: forward-mode differentiation is going on.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{op}: it has no forward-mode derivative (torch.func.jvp, jacfwd and hessian, "
            "torch.autograd.forward_ad); use reverse mode, or use_backend('reference')"
        )


def rows_of(x: Tensor) -> Tensor:
    """(..., K) as (T, K)."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def in_shape_of(rows: Tensor, x_shape: torch.Size) -> Tensor:
    """(T, N), just made, as (..., N): itself, for users could not change a view in place."""
    if len(x_shape) == 2:
        return rows
    return rows.contiguous().resize_(*x_shape[:-1], rows.shape[1])


def run_eager(operands: Operands, settings: Settings, backend: str) -> tuple[Tensor, Tensor | None]:
    """y (..., N) for x (..., K), and the gate sums (B, G), None without segments.

    Shapes change within: outside, each change would be an operation of autograd's.
    """
    if wants_gradient(*operands):
        return EagerMoLoRALinear.apply(*operands, settings, backend)
    x = operands.x
    operands = operands._replace(x=rows_of(x))
    run = checked_backend(operands, settings, backend)
    with without_autocast(x):
        y_TN, gate_sums_BG = forward_only(run, operands, settings)
    return in_shape_of(y_TN, x.shape), gate_sums_BG


class EagerMoLoRALinear(torch.autograd.Function):
    """The op without PyTorch's dispatch of custom ops, which takes longer than a small layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        *parameters, settings, backend = inputs
        operands = Operands(rows_of(x), *parameters)
        y_TN, saved, gate_sums_BG = checked_forward(operands, settings, backend)
        keep(ctx, operands, saved)
        ctx.x_shape, ctx.settings, ctx.backend = x.shape, settings, backend
        ctx.versions = versions_of(settings.segment_ids, settings.dropout_seed)
        return in_shape_of(y_TN, x.shape), gate_sums_BG

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dgate_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        settings = ctx.settings
        check_unchanged(UNSAVED, (settings.segment_ids, settings.dropout_seed), ctx.versions)
        x, weight, a, b, router, *saved = ctx.saved_tensors
        operands, needs = Operands(x, weight, None, a, b, router), needs_of(ctx, dy)
        dy_TN = None if dy is None else rows_of(dy)
        dx_TK, *others = run_gradients(
            dy_TN, dgate_sums, operands, Saved(*saved), settings, needs, ctx.backend
        )
        dx = None if dx_TK is None else in_shape_of(dx_TK, ctx.x_shape)
        return (dx, *others, None, None)
