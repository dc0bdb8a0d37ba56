"""The ops `citi::molora_linear_group` and `citi::molora_linear_group_backward`.

They run where a backend has, besides what `molora_linear_contract` asks for,

    forward_group(operands_L, settings_L)
    backward_group(incoming_L, operands_L, saved_L, settings_L, needs_L)

Shapes: T tokens, K in-features, N out-features, R stacked rank (E·r), G = E + 1 gate entries,
B segments; L layers, as a suffix of lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from citi_kernels import backends
from citi_kernels.ops.autocast import without_autocast
from citi_kernels.ops.molora_linear_checks import check, check_values
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.molora_linear_op import (
    as_gradient,
    check_unchanged,
    resolved,
    rounded_gradients,
    versions_of,
)
from citi_kernels.ops.molora_linear_reference import gate_dtype


@torch.library.custom_op("citi::molora_linear_group", mutates_args=())
def group_op(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    routers: list[Tensor],
    has_weight: list[bool],
    has_bias: list[bool],
    num_experts: int,
    scaling: float,
    top_k: int | None,
    renormalize: bool,
    segment_ids: Tensor | None,
    num_segments: int,
    dropout_p: float,
    dropout_seeds: list[Tensor],
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """y (T, N), the backend's h and probs, and gate_sums (B, G), each L times; x (T, K).

    `weights` and `biases` hold those of the layers that have one: an optional tensor in a list has
    no gradient in PyTorch. No gate_sums without segment_ids.
    """
    operands_L = _operands(x, weights, biases, a, b, routers, has_weight, has_bias)
    settings_L = _settings(
        len(a),
        num_experts,
        scaling,
        top_k,
        renormalize,
        segment_ids,
        num_segments,
        dropout_p,
        dropout_seeds,
    )
    y_LTN, saved_L, gate_sums_LBG = checked_forward(operands_L, settings_L, backend)
    has_sums = segment_ids is not None
    h, probs = [each.h for each in saved_L], [each.probs for each in saved_L]
    return y_LTN, h, probs, gate_sums_LBG if has_sums else []


def checked_forward(
    operands_L: list[Operands], settings_L: list[Settings], backend: str
) -> tuple[list[Tensor], list[Saved], list[Tensor | None]]:
    for operands, settings in zip(operands_L, settings_L, strict=True):
        check(operands, settings)
    check_values(settings_L[0])
    run = backends.find("molora_linear", backend)
    with without_autocast(operands_L[0].x):
        outputs = run.forward_group(operands_L, settings_L)
    y_LTN, saved_L, gate_sums_LBG = (list(each) for each in zip(*outputs, strict=True))
    return y_LTN, saved_L, gate_sums_LBG


@group_op.register_fake
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    routers: list[Tensor],
    has_weight: list[bool],
    has_bias: list[bool],
    *rest: Any,
) -> tuple[list[Tensor], ...]:
    *rest, backend = rest
    operands_L = _operands(x, weights, biases, a, b, routers, has_weight, has_bias)
    settings_L = _settings(len(a), *rest)
    for operands, settings in zip(operands_L, settings_L, strict=True):
        check(operands, settings)
    run = backends.find("molora_linear", backend)
    saved_L = [
        run.empty_saved(x, each, settings) for each, settings in zip(a, settings_L, strict=True)
    ]
    settings, gate_sums_LBG = settings_L[0], []
    if settings.segment_ids is not None:
        shape = (settings.num_segments, settings.num_experts + 1)
        gate_sums_LBG = [x.new_empty(shape, dtype=gate_dtype(x.dtype)) for _ in a]
    y_LTN = [x.new_empty(x.shape[0], each.shape[0]) for each in b]
    return y_LTN, [each.h for each in saved_L], [each.probs for each in saved_L], gate_sums_LBG


@torch.library.custom_op("citi::molora_linear_group_backward", mutates_args=())
def group_op_backward(
    dy: list[Tensor | None],
    dgate_sums: list[Tensor | None],
    x: Tensor | None,
    weights: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    routers: list[Tensor],
    h: list[Tensor],
    probs: list[Tensor],
    num_experts: int,
    scaling: float,
    top_k: int | None,
    renormalize: bool,
    segment_ids: Tensor | None,
    num_segments: int,
    dropout_p: float,
    dropout_seeds: list[Tensor],
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x, and L times of weight, bias, a, b, router; (0,) where `needs` says no."""
    settings_L = _settings(
        len(a),
        num_experts,
        scaling,
        top_k,
        renormalize,
        segment_ids,
        num_segments,
        dropout_p,
        dropout_seeds,
    )
    operands_L = [
        Operands(x, weight, None, *each)
        for weight, *each in zip(weights, a, b, routers, strict=True)
    ]
    saved_L = [Saved(*each, None) for each in zip(h, probs, strict=True)]
    incoming_L, needs_L = list(zip(dy, dgate_sums, strict=True)), _needs_of_layers(needs)
    dx_TK, gradients_L = run_gradients(
        incoming_L, operands_L, saved_L, settings_L, needs_L, backend
    )
    by_operand = zip(*(each[1:] for each in gradients_L), strict=True)
    like = (h, h, a, b, routers)
    return _or_empty(dx_TK, h[0]), *(
        [_or_empty(*pair) for pair in zip(gradients, tensors, strict=True)]
        for gradients, tensors in zip(by_operand, like, strict=True)
    )


def run_gradients(
    incoming_L: list[tuple[Tensor | None, Tensor | None]],
    operands_L: list[Operands],
    saved_L: list[Saved],
    settings_L: list[Settings],
    needs_L: list[Needs],
    backend: str,
) -> tuple[Tensor | None, list[Operands]]:
    """dx, and of each layer the others: contiguous, in their dtypes; None where not asked for."""
    run = backends.find("molora_linear", backend)
    like_x = saved_L[0].h
    incoming_L = [tuple(resolved(each) for each in pair) for pair in incoming_L]
    with without_autocast(like_x):
        dx_TK, gradients_L = run.backward_group(
            incoming_L, operands_L, saved_L, settings_L, needs_L
        )
    rounded_L = []
    for gradients, operands in zip(gradients_L, operands_L, strict=True):
        rounded_L.append(Operands(*rounded_gradients(gradients, operands, like_x.dtype)))
    return as_gradient(dx_TK, like_x.dtype), rounded_L


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient


@group_op_backward.register_fake
def _(
    dy: list[Tensor | None],
    dgate_sums: list[Tensor | None],
    x: Tensor | None,
    weights: list[Tensor | None],
    a: list[Tensor],
    b: list[Tensor],
    routers: list[Tensor],
    h: list[Tensor],
    *rest: Any,
) -> tuple[Any, ...]:
    needs_L, segment_ids = _needs_of_layers(rest[-2]), rest[-6]
    num_in = a[0].shape[1]
    num_tokens = next(each.shape[0] for each in (*dy, x, segment_ids) if each is not None)

    def empty(need: bool, shape: Any, like: Tensor) -> Tensor:
        return like.new_empty(shape if need else 0)

    shapes_L = [
        ((up.shape[0], num_in), (up.shape[0],), down.shape, up.shape, router.shape)
        for down, up, router in zip(a, b, routers, strict=True)
    ]
    like_L = zip(h, h, a, b, routers, strict=True)
    gradients_L = [
        [empty(*each) for each in zip(needs[1:], shapes, like, strict=True)]
        for needs, shapes, like in zip(needs_L, shapes_L, like_L, strict=True)
    ]
    dx_TK = empty(needs_L[0].x, (num_tokens, num_in), h[0])
    return dx_TK, *(list(each) for each in zip(*gradients_L, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], ...]) -> None:
    x, weights, biases, a, b, routers, has_weight, has_bias, *rest = inputs
    _, h, probs, _ = output
    ctx.mark_non_differentiable(*h, *probs)
    ctx.set_materialize_grads(False)
    flags = iter(ctx.needs_input_grad)  # flat here, nested like the inputs in the backward
    needs_x = next(flags)
    by_operand = [[next(flags) for _ in each] for each in (weights, biases, a, b, routers)]
    needs_L = _needs(needs_x, *by_operand, has_weight, has_bias)
    x_if_needed = x if any(each.weight or each.a or each.router for each in needs_L) else None
    weights_if_needed = weights if needs_x else []  # under autocast they may be copies
    ctx.save_for_backward(x_if_needed, *weights_if_needed, *a, *b, *routers, *h, *probs)
    # segment_ids and dropout_seeds stay attributes, see molora_linear
    ctx.has_weight, ctx.has_bias = has_weight, has_bias
    ctx.num_weights, ctx.rest, ctx.backend = len(weights_if_needed), rest[:-1], rest[-1]
    ctx.versions = versions_of(rest[4], *rest[-2])


def _backward(
    ctx: Any,
    dy: list[Tensor | None],
    _h: list[None],
    _probs: list[None],
    dgate_sums: list[Tensor | None],
) -> tuple[Any, ...]:
    """Layers that nothing comes back from are left out: their gradients are None, as alone."""
    num_layers, seeds = len(dy), ctx.rest[-1]
    check_unchanged(unsaved(len(seeds)), (ctx.rest[4], *seeds), ctx.versions)
    incoming_L = list(zip(dy, dgate_sums or [None] * num_layers, strict=True))
    needs_L = _needs(*ctx.needs_input_grad[:6], ctx.has_weight, ctx.has_bias)
    needs_L = [answerable(*each) for each in zip(needs_L, incoming_L, strict=True)]
    reached = [i for i, needs in enumerate(needs_L) if any(needs)]
    dx_TK, by_operand = None, [[None] * num_layers for _ in range(5)]
    if reached:
        dx_TK, *gradients = _run_backward(ctx, incoming_L, needs_L, reached)
        dx_TK = dx_TK if needs_L[reached[0]].x else None
        for place, of_operand in enumerate(gradients):
            for i, gradient in zip(reached, of_operand, strict=True):
                by_operand[place][i] = gradient if needs_L[i][1 + place] else None
    dweights, dbiases, *others = by_operand
    return (
        dx_TK,
        _where(dweights, ctx.has_weight),
        _where(dbiases, ctx.has_bias),
        *others,
        *[None] * 9,
        [None] * len(seeds),
        None,
    )


def unsaved(num_seeds: int) -> list[str]:
    """Names of the tensors that autograd does not save."""
    return ["segment_ids", *(f"dropout_seeds[{i}]" for i in range(num_seeds))]


def answerable(needs: Needs, incoming: tuple[Tensor | None, Tensor | None]) -> Needs:
    """What of `needs` has a gradient at all, given dy and dgate_sums."""
    dy_TN, dgate_sums_BG = incoming
    if dy_TN is not None:
        return needs
    if dgate_sums_BG is not None:
        return needs._replace(weight=False, bias=False, a=False, b=False)
    return Needs(*[False] * len(needs))


def _run_backward(
    ctx: Any,
    incoming_L: list[tuple[Tensor | None, Tensor | None]],
    needs_L: list[Needs],
    reached: list[int],
) -> tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    present, tensors = iter(tensors[: ctx.num_weights]), tensors[ctx.num_weights :]
    weights = [next(present, None) if has_weight else None for has_weight in ctx.has_weight]
    size = len(incoming_L)
    lists = (weights, *(tensors[start : start + size] for start in range(0, 5 * size, size)))
    *rest, seeds = ctx.rest
    return group_op_backward(
        [incoming_L[i][0] for i in reached],
        [incoming_L[i][1] for i in reached],
        x,
        *([each[i] for i in reached] for each in lists),
        *rest,
        [seeds[i] for i in reached] if seeds else [],
        [need for i in reached for need in needs_L[i]],
        ctx.backend,
    )


group_op.register_autograd(_backward, setup_context=_setup_context)


def by_layer(flat: Sequence[Any], size: int = 5) -> list[tuple[Any, ...]]:
    return [tuple(flat[start : start + size]) for start in range(0, len(flat), size)]


def _operands(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    routers: list[Tensor],
    has_weight: list[bool],
    has_bias: list[bool],
) -> list[Operands]:
    layers = zip(
        _spread(weights, has_weight), _spread(biases, has_bias), a, b, routers, strict=True
    )
    return [Operands(x, *each) for each in layers]


def _settings(num_layers: int, *rest: Any) -> list[Settings]:
    *shared, seeds = rest
    return [Settings(*shared, seed) for seed in seeds or [None] * num_layers]


def _needs(
    x: bool,
    weights: list[bool],
    biases: list[bool],
    a: list[bool],
    b: list[bool],
    routers: list[bool],
    has_weight: list[bool],
    has_bias: list[bool],
) -> list[Needs]:
    layers = zip(
        _spread(weights, has_weight), _spread(biases, has_bias), a, b, routers, strict=True
    )
    return [Needs(x, *(bool(each) for each in layer)) for layer in layers]


def _needs_of_layers(flat: list[bool]) -> list[Needs]:
    return [Needs(*each) for each in by_layer(flat, size=len(Needs._fields))]


def _spread(present: list[Any], has: list[bool]) -> list[Any]:
    """One entry per layer, None where the layer has none."""
    entries = iter(present)
    return [next(entries) if each else None for each in has]


def _where(entries: list[Any], has: list[bool]) -> list[Any]:
    """The reverse of `_spread`."""
    return [entry for entry, each in zip(entries, has, strict=True) if each]
