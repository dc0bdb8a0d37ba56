"""The ops `citi::molora_linear` and `citi::molora_linear_backward`.

Shapes: T tokens, K in-features, N out-features, R stacked rank (E·r), G = E + 1 gate entries,
B segments.
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
from citi_kernels.ops.molora_linear_reference import gate_dtype

UNSAVED = ("segment_ids", "dropout_seed")


def _run_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    num_experts: int,
    scaling: float,
    top_k: int | None,
    renormalize: bool,
    segment_ids: Tensor | None,
    num_segments: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y (T, N), the backend's `Saved`: h, probs, kept, and gate_sums (B, G)); x (T, K).

    What does not exist is empty: kept (0,) without top_k, gate_sums (0,) without segment_ids.
    """
    settings = Settings(
        num_experts,
        scaling,
        top_k,
        renormalize,
        segment_ids,
        num_segments,
        dropout_p,
        dropout_seed,
    )
    operands = Operands(x, weight, bias, a, b, router)
    y_TN, saved, gate_sums_BG = checked_forward(operands, settings, backend)
    if gate_sums_BG is None:
        gate_sums_BG = saved.probs.new_empty(0)
    return y_TN, *_as_outputs(saved), gate_sums_BG


def checked_forward(
    operands: Operands, settings: Settings, backend: str
) -> tuple[Tensor, Saved, Tensor | None]:
    run = checked_backend(operands, settings, backend)
    with without_autocast(operands.x):
        return run.forward(operands, settings)


def checked_backend(operands: Operands, settings: Settings, backend: str) -> Any:
    """What runs the forward, after the checks of its arguments."""
    check(operands, settings)
    check_values(settings)
    return backends.find("molora_linear", backend)


molora_linear_op = torch.library.custom_op("citi::molora_linear", _run_forward, mutates_args=())


def _as_outputs(saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    kept = saved.h.new_empty(0, dtype=torch.bool) if saved.kept is None else saved.kept
    return saved.h, saved.probs, kept


@molora_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *rest, backend = rest
    settings = Settings(*rest)
    check(Operands(x, weight, bias, a, b, router), settings)
    saved = backends.find("molora_linear", backend).empty_saved(x, a, settings)
    sums_shape = (0,)
    if settings.segment_ids is not None:
        sums_shape = (settings.num_segments, settings.num_experts + 1)
    gate_sums = x.new_empty(sums_shape, dtype=gate_dtype(x.dtype))
    return x.new_empty(x.shape[0], b.shape[0]), *_as_outputs(saved), gate_sums


def _run_backward(
    dy: Tensor | None,
    dgate_sums: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    h: Tensor,
    probs: Tensor,
    kept: Tensor,
    num_experts: int,
    scaling: float,
    top_k: int | None,
    renormalize: bool,
    segment_ids: Tensor | None,
    num_segments: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, a, b, router; (0,) where `needs` says no."""
    settings = Settings(
        num_experts,
        scaling,
        top_k,
        renormalize,
        segment_ids,
        num_segments,
        dropout_p,
        dropout_seed,
    )
    saved = Saved(h, probs, kept if settings.is_sparse else None)
    operands = Operands(x, weight, None, a, b, router)
    gradients = run_gradients(dy, dgate_sums, operands, saved, settings, Needs(*needs), backend)
    return tuple(h.new_empty(0) if each is None else each for each in gradients)


def run_gradients(
    dy: Tensor | None,
    dgate_sums: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
    backend: str,
) -> list[Tensor | None]:
    run = backends.find("molora_linear", backend)
    incoming = resolved(dy), resolved(dgate_sums)
    with without_autocast(saved.h):
        gradients = run.backward(*incoming, operands, saved, settings, needs)
    return rounded_gradients(gradients, operands, saved.h.dtype)


def resolved(incoming: Tensor | None) -> Tensor | None:
    """An incoming gradient without a lazy negation: kernels read memory as it lies."""
    return incoming if incoming is None or not incoming.is_neg() else incoming.resolve_neg()


def rounded_gradients(
    gradients: Operands, operands: Operands, dtype: torch.dtype
) -> list[Tensor | None]:
    """Contiguous, in x's dtype or the parameter's own; None where not asked for."""
    _, _, _, a, b, router = operands
    dtypes = (dtype, dtype, dtype, a.dtype, b.dtype, router.dtype)
    return [as_gradient(*each) for each in zip(gradients, dtypes, strict=True)]


def as_gradient(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if gradient is None or (gradient.dtype == dtype and gradient.is_contiguous()):
        return gradient
    return gradient.to(dtype, memory_format=torch.contiguous_format).contiguous()


molora_linear_op_backward = torch.library.custom_op(
    "citi::molora_linear_backward", _run_backward, mutates_args=()
)


@molora_linear_op_backward.register_fake
def _(
    dy: Tensor | None,
    dgate_sums: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    h: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    num_in, num_out, needs = a.shape[1], b.shape[0], rest[-2]
    segment_ids = rest[-6]
    num_tokens = next(each.shape[0] for each in (dy, x, segment_ids) if each is not None)
    shapes = ((num_tokens, num_in), (num_out, num_in), (num_out,), a.shape, b.shape, router.shape)
    dtypes = (h.dtype, h.dtype, h.dtype, a.dtype, b.dtype, router.dtype)
    return tuple(
        h.new_empty(shape, dtype=dtype) if need else h.new_empty(0)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, rest = Operands(*inputs[:6]), inputs[6:]
    _, *saved, _ = output
    ctx.mark_non_differentiable(*saved)
    keep(ctx, operands, Saved(*saved))
    # segment_ids and dropout_seed stay attributes: the list of saved tensors must be the same when
    # activation checkpointing runs the forward again without a routing context
    ctx.rest, ctx.backend = tuple(rest[:-1]), rest[-1]
    ctx.versions = versions_of(rest[4], rest[7])


def keep(ctx: Any, operands: Operands, saved: Saved) -> None:
    x, weight, _, a, b, router = operands
    ctx.set_materialize_grads(False)
    needs = Needs(*ctx.needs_input_grad[:6])
    x_if_needed = x if needs.weight or needs.a or needs.router else None
    weight_if_needed = weight if needs.x else None  # under autocast it may be a copy
    ctx.save_for_backward(x_if_needed, weight_if_needed, a, b, router, *saved)


def versions_of(*tensors: Tensor | None) -> list[int | None]:
    """How often each was changed in place, for autograd sees to saved tensors alone.

    None where that is not counted, and where a tracer that copies what changes looks on.
    """
    return [
        None if each is None or type(each) is not Tensor or each.is_inference() else each._version
        for each in tensors
    ]


def check_unchanged(names: Sequence[str], tensors: Sequence[Tensor | None], before: list) -> None:
    """Raises a RuntimeError, as autograd does, where the backward would see other values."""
    for name, old, new in zip(names, before, versions_of(*tensors), strict=True):
        if old is not None and new != old:
            raise RuntimeError(
                f"molora_linear: {name}, needed for the backward, was modified by an inplace "
                f"operation: it is at version {new}, expected version {old}; give it a copy"
            )


def needs_of(ctx: Any, dy: Tensor | None) -> Needs:
    needs = Needs(*ctx.needs_input_grad[:6])
    if dy is None:
        needs = needs._replace(weight=False, bias=False, a=False, b=False)
    return needs


def _backward(
    ctx: Any, dy: Tensor | None, _h: None, _probs: None, _kept: None, dgate_sums: Tensor | None
) -> tuple[Tensor | None, ...]:
    check_unchanged(UNSAVED, (ctx.rest[4], ctx.rest[7]), ctx.versions)
    has_segments, needs = ctx.rest[4] is not None, needs_of(ctx, dy)
    gradients = molora_linear_op_backward(
        dy,
        dgate_sums if has_segments else None,
        *ctx.saved_tensors,
        *ctx.rest,
        list(needs),
        ctx.backend,
    )
    asked = [each if need else None for each, need in zip(gradients, needs, strict=True)]
    return (*asked, *[None] * 9)


molora_linear_op.register_autograd(_backward, setup_context=_setup_context)
