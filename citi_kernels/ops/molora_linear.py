"""MOLoRA linear: a linear layer with routed low-rank experts, as the op `citi::molora_linear`.

Shapes: T tokens, K in-features, N out-features, E experts, r rank, R = E·r, G = E + 1 gate entries
(entry 0 is the backbone neuron), B segments (samples).
Source: CITI, arXiv 2409.13202, section "MOLoRA". The paper is silent on top_k, renormalize and
segments; they are ours.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from citi_kernels import backends
from citi_kernels.ops import (
    molora_linear_cuda,
    molora_linear_native,
    molora_linear_reference,
    molora_linear_torch,
    molora_linear_triton,
)
from citi_kernels.ops.molora_linear_checks import check, check_values, flat_segment_ids
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.molora_linear_reference import gate_dtype, molora_linear_ref

# asked once: torch.compile of PyTorch 2.11 cannot trace the question
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)

backends.register("molora_linear", "reference", molora_linear_reference)
backends.register("molora_linear", "torch", molora_linear_torch)
backends.register(
    "molora_linear", "native", molora_linear_native, refuses=molora_linear_native.refuses
)
backends.register(
    "molora_linear", "triton", molora_linear_triton, refuses=molora_linear_triton.refuses
)
backends.register("molora_linear", "cuda", molora_linear_cuda, refuses=molora_linear_cuda.refuses)


def molora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    *,
    num_experts: int,
    scaling: float,
    top_k: int | None = None,
    renormalize: bool = False,
    segment_ids: Tensor | None = None,
    num_segments: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A linear layer plus experts, each a low-rank update, weighed per token by a router.

        gate = softmax(router @ x)                                      entry 0 scales nothing
        y    = weight @ x + bias + scaling * sum_i gate[i] * b_i @ (a_i @ x)      i = 1 .. E
        gate_sums[s] = sum of gate over the tokens of segment s

    Kept for the backward: x (only if a, router or weight has a gradient), h = a @ x, the gate
    probabilities, and the choice of experts under top_k. Nothing of size (T, N). The backward's
    reductions have a fixed order, so that repeats are bitwise equal. Not differentiable twice.

    Args:
        x: (..., K) fp32, bf16, fp16 or fp64; no token at all is allowed.
        weight: (N, K) in x's dtype, any strides; read as it lies, like F.linear. None: y is the
            update alone, to be added to a base layer of another kind.
        bias: (N,) in x's dtype, or None. Needs a weight.
        a: (E·r, K) down-projections, expert i in rows i·r to (i + 1)·r. Like b and router, any
            floating dtype: rounded to x's for the products; the gradient has the parameter's.
        b: (N, E·r) up-projections, expert i in columns i·r to (i + 1)·r.
        router: (E + 1, K).
        num_experts: E.
        scaling: alpha / r.
        top_k: experts kept per token, 1 to E, by the largest logit in fp32, ties to the lowest
            index; the gates of the others are exactly 0 and the backbone neuron stays. None: all.
        renormalize: under top_k, divide the kept gates, backbone included, by their sum.
        segment_ids: int64, x's shape without K or flat (T,): the segment of each token, -1 for a
            token that counts nowhere. None: no gate sums.
        num_segments: B, needed with segment_ids.
        dropout_p: probability to drop an entry of the experts' input, 0 <= p < 1; the base layer
            and the router see x as it is.
        dropout_seed: () int64 on the CPU, needed with dropout_p; the mask is made anew from it in
            the backward.
    Returns:
        y: (..., N) in x's dtype. Under autocast x, weight and bias are cast as F.linear does.
        gate_sums: (B, E + 1) fp32 (fp64 for fp64 x), differentiable; None without segment_ids.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; a segment id outside
            [-1, num_segments) (checked on the CPU only, a GPU would have to wait).
        RuntimeError: the backend asked for cannot run here.
    """
    if segment_ids is not None and num_segments is None:
        raise ValueError("molora_linear: num_segments: want the number of segments, got None")
    if autocast_is_on(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (as_autocast(tensor, dtype) for tensor in (x, weight, bias))
    if x.dim() == 0:
        raise ValueError("molora_linear: x: want (..., K), got a tensor without dimensions")
    shape, x_TK = x.shape, x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if segment_ids is not None:
        segment_ids = flat_segment_ids(segment_ids, shape, x_TK.shape[0])
    operands = (x_TK, weight, bias, a, b, router)
    is_cuda_first = molora_linear_cuda.is_fastest(x_TK, num_experts, top_k, dropout_p)
    backend = backends.choose("molora_linear", x_TK, first="cuda" if is_cuda_first else None)
    scaling, count = float(scaling), num_segments or 0
    settings = Settings(
        num_experts, scaling, top_k, renormalize, segment_ids, count, dropout_p, dropout_seed
    )
    if backend == "reference":
        return _reference(operands, settings, shape)
    if is_plain_eager(x_TK, weight, bias, a, b, router):
        y_TN, gate_sums_BG = _EagerMoLoRALinear.apply(*operands, settings, backend)
    else:
        y_TN, _, _, _, gate_sums_BG = _molora_linear(*operands, *settings, backend)
    y = y_TN.reshape(*shape[:-1], y_TN.shape[1])
    return y, None if segment_ids is None else gate_sums_BG


def _reference(
    operands: tuple[Tensor | None, ...], settings: Settings, shape: torch.Size
) -> tuple[Tensor, Tensor | None]:
    check(Operands(*operands), settings)
    check_values(settings)
    with without_autocast(operands[0]):
        y_TN, gate_sums_BG = molora_linear_ref(
            *operands,
            num_experts=settings.num_experts,
            scaling=settings.scaling,
            top_k=settings.top_k,
            renormalize=settings.renormalize,
            segment_ids=settings.segment_ids,
            num_segments=settings.num_segments,
            dropout_p=settings.dropout_p,
            dropout_seed=settings.dropout_seed,
        )
    return y_TN.reshape(*shape[:-1], y_TN.shape[1]), gate_sums_BG


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
    y_TN, saved, gate_sums_BG = _checked_forward(operands, settings, backend)
    if gate_sums_BG is None:
        gate_sums_BG = saved.probs.new_empty(0)
    return y_TN, *_as_outputs(saved), gate_sums_BG


def _checked_forward(
    operands: Operands, settings: Settings, backend: str
) -> tuple[Tensor, Saved, Tensor | None]:
    check(operands, settings)
    check_values(settings)
    run = backends.find("molora_linear", backend)
    with without_autocast(operands.x):
        return run.forward(operands, settings)


_molora_linear = torch.library.custom_op("citi::molora_linear", _run_forward, mutates_args=())


def _as_outputs(saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    kept = saved.h.new_empty(0, dtype=torch.bool) if saved.kept is None else saved.kept
    return saved.h, saved.probs, kept


@_molora_linear.register_fake
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
    gradients = _run_gradients(dy, dgate_sums, operands, saved, settings, Needs(*needs), backend)
    return tuple(h.new_empty(0) if each is None else each for each in gradients)


def _run_gradients(
    dy: Tensor | None,
    dgate_sums: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
    backend: str,
) -> list[Tensor | None]:
    run = backends.find("molora_linear", backend)
    with without_autocast(saved.h):
        gradients = run.backward(dy, dgate_sums, operands, saved, settings, needs)
    return rounded_gradients(gradients, operands, saved.h.dtype)


def rounded_gradients(
    gradients: Operands, operands: Operands, dtype: torch.dtype
) -> list[Tensor | None]:
    """Contiguous, in x's dtype or the parameter's own; None where not asked for."""
    _, _, _, a, b, router = operands
    dtypes = (dtype, dtype, dtype, a.dtype, b.dtype, router.dtype)
    return [as_gradient(*each) for each in zip(gradients, dtypes, strict=True)]


def as_gradient(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if gradient is None:
        return None
    return gradient.to(dtype, memory_format=torch.contiguous_format).contiguous()


_molora_linear_backward = torch.library.custom_op(
    "citi::molora_linear_backward", _run_backward, mutates_args=()
)


@_molora_linear_backward.register_fake
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
    _keep(ctx, operands, Saved(*saved))
    # segment_ids and dropout_seed stay attributes: the list of saved tensors must be the same when
    # activation checkpointing runs the forward again without a routing context
    ctx.rest, ctx.backend = tuple(rest[:-1]), rest[-1]


def _keep(ctx: Any, operands: Operands, saved: Saved) -> None:
    x, weight, _, a, b, router = operands
    ctx.set_materialize_grads(False)
    needs = Needs(*ctx.needs_input_grad[:6])
    x_if_needed = x if needs.weight or needs.a or needs.router else None
    weight_if_needed = weight if needs.x else None  # under autocast it may be a copy
    ctx.save_for_backward(x_if_needed, weight_if_needed, a, b, router, *saved)


def _needs_of(ctx: Any, dy: Tensor | None) -> Needs:
    needs = Needs(*ctx.needs_input_grad[:6])
    if dy is None:
        needs = needs._replace(weight=False, bias=False, a=False, b=False)
    return needs


def _backward(
    ctx: Any, dy: Tensor | None, _h: None, _probs: None, _kept: None, dgate_sums: Tensor | None
) -> tuple[Tensor | None, ...]:
    has_segments, needs = ctx.rest[4] is not None, _needs_of(ctx, dy)
    gradients = _molora_linear_backward(
        dy,
        dgate_sums if has_segments else None,
        *ctx.saved_tensors,
        *ctx.rest,
        list(needs),
        ctx.backend,
    )
    asked = [each if need else None for each, need in zip(gradients, needs, strict=True)]
    return (*asked, *[None] * 9)


_molora_linear.register_autograd(_backward, setup_context=_setup_context)


class _EagerMoLoRALinear(torch.autograd.Function):
    """The op without PyTorch's dispatch of custom ops, which takes longer than a small layer."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        operands, (settings, backend) = Operands(*inputs[:6]), inputs[6:]
        y_TN, saved, gate_sums_BG = _checked_forward(operands, settings, backend)
        _keep(ctx, operands, saved)
        ctx.settings, ctx.backend = settings, backend
        return y_TN, gate_sums_BG

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dgate_sums: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, a, b, router, *saved = ctx.saved_tensors
        operands, needs = Operands(x, weight, None, a, b, router), _needs_of(ctx, dy)
        gradients = _run_gradients(
            dy, dgate_sums, operands, Saved(*saved), ctx.settings, needs, ctx.backend
        )
        return (*gradients, None, None)


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks on: no compiler, mode, transform or tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and tensors[0].device.type != "meta"
        and all(each is None or type(each) in (Tensor, nn.Parameter) for each in tensors)
    )


def autocast_is_on(x: Tensor) -> bool:
    kind = x.device.type
    return kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)


def as_autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As autocast treats an argument of F.linear: fp64 and integers stay."""
    if tensor is None or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return tensor
    return tensor.to(dtype)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast does not see into an op: the fp32 products of the router must stay fp32."""
    if not autocast_is_on(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
