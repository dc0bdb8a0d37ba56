"""A frozen linear whose backward hands out what importance scores need, and no weight gradient.

Shape suffixes: T tokens, K in-features, N out-features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Backward(NamedTuple):
    """One use of a linear, when its backward runs.

    Attributes:
        x: (T, K).
        g: (T, N), gradient of the output.
        dx: (T, K), this use's own input gradient; None unless asked for or needed.
        y: (T, N), the output; None unless asked for.
        weight: (N, K), as `weight` gave it; None without that.
    """

    x: Tensor
    g: Tensor
    dx: Tensor | None
    y: Tensor | None
    weight: Tensor | None


def scored_linear(
    x: Tensor,
    forward: Callable[[Tensor], Tensor],
    *,
    weight: Callable[[], Tensor] | None,
    anchor: Tensor,
    on_backward: Callable[[Backward], None],
    needs_dx: bool = True,
    needs_y: bool = False,
) -> Tensor:
    """Run a frozen linear so that its backward calls `on_backward`.

        y = forward(x);   in backward, given g:   dx = g W;   on_backward(Backward(...))

    Saved for backward: x itself, once however many components share it, and y if asked for. No
    gradient of the weight or bias is formed. A recomputation under non-reentrant activation
    checkpointing calls back once, since only the backward does.

    Args:
        x: (..., K) floating.
        forward: maps (..., K) to (..., N) and is affine in x.
        weight: gives the (N, K) weight that `forward` uses, any strides, when the backward wants
            it: nothing keeps it in memory in between. None where it cannot be used as it stands
            (quantised, or a subclass with arithmetic of its own): then the backward runs `forward`
            once more and differentiates it.
        anchor: any tensor that requires grad; makes the backward run even if x does not.
        on_backward: called with matrices, see `Backward`.
        needs_dx: False lets dx be None where x needs no gradient.
        needs_y: keep y for the backward.

    Returns:
        `forward(x)`, attached to the graph.
    """
    return _ScoredLinear.apply(x, anchor, forward, weight, on_backward, needs_dx, needs_y)


class _ScoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, forward, weight, on_backward, needs_dx, needs_y):
        y = forward(x)
        ctx.save_for_backward(x, *([y] if needs_y else []))
        ctx.forward, ctx.weight = forward, weight
        ctx.on_backward, ctx.needs_dx = on_backward, needs_dx
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, *rest = ctx.saved_tensors
        needs_input_gradient = ctx.needs_input_grad[0]
        weight = None if ctx.weight is None else ctx.weight()
        dx = None
        if needs_input_gradient or ctx.needs_dx:
            dx = _own_input_gradient(x, g, ctx.forward, weight)
        y = _matrix(rest[0]) if rest else None
        seen_dx = None if dx is None else _matrix(dx)
        ctx.on_backward(Backward(_matrix(x), _matrix(g), seen_dx, y, weight))
        return (dx if needs_input_gradient else None), *[None] * 6


def _own_input_gradient(x, g, forward, weight):
    if weight is not None:
        return (g @ weight.to(g.dtype)).to(x.dtype)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(forward(leaf), leaf, g)[0]


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
