"""Backend "native" of `citi::molora_linear`: C++ for the CPU, in `citi_kernels._C`.

    path      when                                              what runs
    fused     fp32 and bf16, stacked rank up to 128             this module
    library   everything else                                   the torch backend

The base products, x weight^T and dy weight, are PyTorch's, but for the first of few tokens (up to
16 in fp32, which from some number on have a lane of a register each; up to 8 in bf16) once
b is not 0: a fresh layer's output stays its linear's, bitwise. Around them, in one call each:

    forward   shrink x to z, route, add u b^T to y: block by block of tokens. Few tokens, as in
              generation, meet the rows of a, router, b and weight where these lie, in fp32
    backward  shrink dy to du, rank gradients, add dz^T [a; router] to dx: block by block of tokens;
              db, and [da; drouter]: block by block of columns

Each passes over x, dy, y and dx once, in fp32 (bf16 in pairs where the CPU has avx512_bf16), and
writes rank-sized tensors besides. Dropout is applied to x in cache, a mask is never stored; then
[da; drouter] passes over x twice. The cut of the work follows from the shape alone and every sum
has one order: neither the number of threads nor strides change a bit. Variants (CITI_CPU_FEATURES)
sum in different orders, and so differ in the last bits.

With top_k all experts are computed and the gates of dropped ones are 0, which at these ranks takes
less time than to sort tokens by expert; a sign in `Saved.probs` says which were dropped. NaN and
infinity in b, forward, or in a, backward, would pass a gate of 0: then they are computed as 0, and
the tokens that keep such an expert have the torch backend's y, or dx.

Shapes: T tokens, K in-features, N out-features, R stacked rank (E·r), G = E + 1, B segments.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels import compiled
from citi_kernels.ops import molora_linear_reference as definition
from citi_kernels.ops import molora_linear_torch
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.top_k_marks import gates_of_marked, kept_experts, top_k_numbers

MAX_STACKED_RANK = 128
DTYPES = (torch.float32, torch.bfloat16)
# of the machine and `_C`; asked once, where dynamo does not look
_WHY_SLOW = compiled.why_slow()
_MAX_FEW_TOKENS = {} if compiled.why_missing("native") else compiled.extension().molora_few_tokens
MAX_FEW_TOKENS = {getattr(torch, name): most for name, most in _MAX_FEW_TOKENS.items()}


def refuses(x: Tensor) -> str | None:
    """Why x cannot be taken, or None."""
    return _WHY_SLOW


def path(stacked_rank: int, dtype: torch.dtype) -> str:
    """Which of "fused" and "library", for x of `dtype`."""
    return "fused" if dtype in DTYPES and stacked_rank <= MAX_STACKED_RANK else "library"


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Saved, Tensor | None]:
    """y (T, N), what the backward needs, and the gate sums (B, G) or None."""
    x_TK, a_RK = operands.x, operands.a
    if path(a_RK.shape[0], x_TK.dtype) == "library":
        return molora_linear_torch.forward(operands, settings)
    if _lets_through("b", operands, settings, x_TK.dtype):
        return _forward_by_expert(operands, settings)
    return _fused_forward(operands, settings)


def _fused_forward(operands: Operands, settings: Settings) -> tuple[Tensor, Saved, Tensor | None]:
    saved = empty_saved(operands.x, operands.a, settings)
    y_TN = _run_forward(operands, settings, saved.h, saved.probs)
    return y_TN, saved, _gate_sums(saved.probs, settings)


def forward_only(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """y (T, N) and the gate sums, for no backward."""
    x_TK = operands.x
    is_library = path(operands.a.shape[0], x_TK.dtype) == "library"
    if is_library or _lets_through("b", operands, settings, x_TK.dtype):
        y_TN, _, gate_sums_BG = forward(operands, settings)
        return y_TN, gate_sums_BG
    if settings.segment_ids is None:
        return _run_forward(operands, settings, None, None), None
    probs_TG = _empty_probs(x_TK, settings)
    return _run_forward(operands, settings, None, probs_TG), _gate_sums(probs_TG, settings)


def _run_forward(
    operands: Operands, settings: Settings, h_TR: Tensor | None, probs_TG: Tensor | None
) -> Tensor:
    """y; fills h and probs."""
    x_TK, weight_NK, bias_N, a_RK, b_NR, router_GK = operands
    x_TK = x_TK.contiguous()
    # names of ours keep these alive during the call
    a_RK, b_NR, router_GK = _readable(a_RK, b_NR, router_GK, dtype=x_TK.dtype)
    extension, matrix = compiled.extension(), compiled.matrix
    shape = shape_of(x_TK.shape[0], a_RK, b_NR, settings)
    dropout = definition.dropout_numbers(settings.dropout_p, settings.dropout_seed)
    b_numbers = matrix(b_NR)
    is_read_here = (
        weight_NK is not None
        and dropout is None
        and can_be_read(x_TK, weight_NK, bias_N)
        and extension.molora_has_update(shape=shape, b=b_numbers)
    )
    has_base = weight_NK is not None and not is_read_here
    if has_base:
        y_TN, weight_NK, bias_N = F.linear(x_TK, weight_NK, bias_N), None, None
    else:
        y_TN = x_TK.new_empty(x_TK.shape[0], b_NR.shape[0])
    size = workspace_size(shape, x_TK.dtype, has_dropout=dropout is not None)
    device = x_TK.device
    workspace = torch.empty(size, dtype=torch.float32, device=device) if size else None
    extension.molora_forward(
        shape=shape,
        scaling=settings.scaling,
        **top_k_numbers(settings),
        dropout=dropout,
        x=matrix(x_TK),
        a=matrix(a_RK),
        b=b_numbers,
        router=matrix(router_GK),
        y=matrix(y_TN),
        has_base=has_base,
        weight=None if weight_NK is None else matrix(weight_NK),
        bias=compiled.vector(bias_N),
        h=compiled.vector(h_TR),
        probs=compiled.vector(probs_TG),
        workspace=compiled.vector(workspace),
        num_threads=torch.get_num_threads(),
    )
    return y_TN


def can_be_read(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether the tokens are few, and the rows of weight, of which there is one, contiguous."""
    return (
        x_TK.shape[0] <= MAX_FEW_TOKENS[x_TK.dtype]
        and weight_NK.stride(1) == 1
        and weight_NK.numel() > 0
        and x_TK.numel() > 0
        and (bias_N is None or bias_N.is_contiguous())
    )


@functools.lru_cache(maxsize=1024)
def workspace_size(shape: tuple[int, ...], dtype: torch.dtype, *, has_dropout: bool) -> int:
    """Numbers of fp32 that a forward of x of `dtype` writes besides its results."""
    code = compiled.dtype_code(dtype)
    return compiled.extension().molora_forward_workspace(shape, code, has_dropout=has_dropout)


@functools.lru_cache(maxsize=1024)
def _backward_workspace_size(shape: tuple[int, ...]) -> int:
    return compiled.extension().molora_backward_workspace(shape)


def _gate_sums(probs_TG: Tensor, settings: Settings) -> Tensor | None:
    if settings.segment_ids is None:
        return None
    gate_TG = gates_of_marked(probs_TG, settings)
    return definition.sum_over_segments(gate_TG, settings.segment_ids, settings.num_segments)


def backward(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
) -> Operands:
    """Gradients, None where `needs` says no; see `molora_linear_torch.backward`."""
    dtype = saved.h.dtype
    if path(operands.a.shape[0], dtype) == "library":
        run = molora_linear_torch.backward
    elif needs.x and _lets_through("a", operands, settings, dtype):
        run = _backward_by_expert
    else:
        run = _fused_backward
    return run(dy_TN, dgate_sums_BG, operands, saved, settings, needs)


def _fused_backward(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
) -> Operands:
    x_TK, weight_NK, _, a_RK, b_NR, router_GK = operands
    dtype = saved.h.dtype
    if dy_TN is not None and (needs.x or needs.weight or needs.bias):
        dy_TN = dy_TN.contiguous()
    has_base = dy_TN is not None and weight_NK is not None
    dx_TK = None
    if needs.x:
        num_tokens, num_in = saved.h.shape[0], a_RK.shape[1]
        dx_TK = dy_TN @ weight_NK if has_base else saved.h.new_empty(num_tokens, num_in)
    gradients = Operands(
        x=dx_TK,
        weight=dy_TN.T @ x_TK if needs.weight else None,
        bias=dy_TN.sum(0) if needs.bias else None,
        a=_gradient_of(a_RK) if needs.a else None,
        b=_gradient_of(b_NR) if needs.b else None,
        router=_gradient_of(router_GK) if needs.router else None,
    )
    if not (needs.x or needs.a or needs.b or needs.router):
        return gradients
    dgate_TG = None
    if dgate_sums_BG is not None:
        # the padded row of zeros is the last, where an index of -1 points
        dgate_TG = F.pad(dgate_sums_BG, (0, 0, 0, 1))[settings.segment_ids]
    a_RK, b_NR, router_GK = _readable(a_RK, b_NR, router_GK, dtype=dtype)
    extension, shape = compiled.extension(), shape_of(saved.h.shape[0], a_RK, b_NR, settings)
    size, device = _backward_workspace_size(shape), saved.probs.device
    workspace = torch.empty(size, dtype=torch.float32, device=device)
    needs_x = needs.a or needs.router
    extension.molora_backward(
        shape=shape,
        scaling=settings.scaling,
        dropout=definition.dropout_numbers(settings.dropout_p, settings.dropout_seed),
        dy=None if dy_TN is None else compiled.matrix(dy_TN),
        x=compiled.matrix(x_TK) if needs_x else None,
        a=compiled.matrix(a_RK),
        b=compiled.matrix(b_NR),
        router=compiled.matrix(router_GK),
        h=compiled.vector(saved.h),
        probs=compiled.vector(saved.probs),
        dgate=compiled.vector(dgate_TG),
        dx=None if dx_TK is None else compiled.matrix(dx_TK),
        has_base=has_base,
        da=compiled.vector(gradients.a),
        db=compiled.vector(gradients.b),
        drouter=compiled.vector(gradients.router),
        workspace=compiled.vector(workspace),
        num_threads=torch.get_num_threads(),
    )
    return gradients


def empty_saved(x_TK: Tensor, a_RK: Tensor, settings: Settings) -> Saved:
    """h (T, R), probs (T, G) fp32, of dropped experts with a sign; on the other path, the torch
    backend's."""
    if path(a_RK.shape[0], x_TK.dtype) == "library":
        return molora_linear_torch.empty_saved(x_TK, a_RK, settings)
    num_tokens = x_TK.shape[0]
    return Saved(
        h=x_TK.new_empty(num_tokens, a_RK.shape[0]),
        probs=_empty_probs(x_TK, settings),
        kept=None,
    )


def _empty_probs(x_TK: Tensor, settings: Settings) -> Tensor:
    num_gates = settings.num_experts + 1
    return torch.empty(x_TK.shape[0], num_gates, dtype=torch.float32, device=x_TK.device)


def _lets_through(
    parameter: str, operands: Operands, settings: Settings, dtype: torch.dtype
) -> bool:
    """Whether gates of 0 would let through what dropped experts have in "a" or "b": NaN, infinity.

    The forward multiplies gates of 0 by b, the gradient of x by a. x is of `dtype`.
    """
    if not settings.is_sparse:
        return False
    (given,) = _readable(getattr(operands, parameter), dtype=dtype)
    factors = {"a": None, "b": None} | {parameter: compiled.matrix(given)}
    shape = shape_of(0, operands.a, operands.b, settings)
    return not compiled.extension().molora_are_finite(shape=shape, **factors)


def _finite(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """With 0 for what is not finite in `dtype`."""
    return parameter.where(parameter.to(dtype).isfinite(), 0.0)


def _keeps_others(probs_TG: Tensor, columns_R: Tensor) -> Tensor:
    """(T,) bool: whether a token keeps an expert with NaN or infinity in its part of R columns."""
    kept_TE = kept_experts(probs_TG)
    others_E = (~columns_R.isfinite()).any(0).view(kept_TE.shape[1], -1).any(1)
    return (kept_TE & others_E).any(1)


def _forward_by_expert(
    operands: Operands, settings: Settings
) -> tuple[Tensor, Saved, Tensor | None]:
    """Where b is not finite: tokens that keep such an expert have the torch backend's y."""
    dtype, b_NR = operands.x.dtype, operands.b
    finite = operands._replace(b=_finite(b_NR, dtype))
    y_TN, saved, gate_sums_BG = _fused_forward(finite, settings)
    others_TN, _, _ = molora_linear_torch.forward(operands, settings)
    keeps_T = _keeps_others(saved.probs, b_NR.to(dtype))
    return torch.where(keeps_T[:, None], others_TN, y_TN), saved, gate_sums_BG


def _backward_by_expert(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
) -> Operands:
    """Where a is not finite: tokens that keep such an expert have the torch backend's dx."""
    dtype, a_RK = saved.h.dtype, operands.a
    incoming, finite = (dy_TN, dgate_sums_BG), operands._replace(a=_finite(a_RK, dtype))
    gradients = _fused_backward(*incoming, finite, saved, settings, needs)
    only_x = Needs(True, False, False, False, False, False)
    by_expert = Saved(
        saved.h.T.contiguous(), saved.probs.T.abs().contiguous(), kept_experts(saved.probs).T
    )
    others_TK = molora_linear_torch.backward(*incoming, operands, by_expert, settings, only_x).x
    keeps_T = _keeps_others(saved.probs, a_RK.to(dtype).T)
    dx_TK = torch.where(keeps_T[:, None], others_TK, gradients.x)
    return gradients._replace(x=dx_TK)


def shape_of(num_tokens: int, a_RK: Tensor, b_NR: Tensor, settings: Settings) -> tuple[int, ...]:
    stacked_rank, num_in = a_RK.shape
    return num_tokens, num_in, b_NR.shape[0], settings.num_experts, stacked_rank


def _readable(*parameters: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """As the kernels take them: fp32 and bf16 are rounded there, other dtypes here."""
    return [each if each.dtype in DTYPES else each.to(dtype) for each in parameters]


def _gradient_of(parameter: Tensor) -> Tensor:
    dtype = parameter.dtype if parameter.dtype in DTYPES else torch.float32
    return torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
