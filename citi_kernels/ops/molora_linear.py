"""MOLoRA linear: a linear layer with routed low-rank experts, as the op `citi::molora_linear`.

Shapes: T tokens, K in-features, N out-features, E experts, r rank, R = E·r, G = E + 1 gate entries
(entry 0 is the backbone neuron), B segments (samples).
Source: CITI, arXiv 2409.13202, section "MOLoRA". The paper is silent on top_k, renormalize and
segments; they are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from citi_kernels import backends
from citi_kernels.ops import (
    molora_linear_cuda,
    molora_linear_few,
    molora_linear_native,
    molora_linear_reference,
    molora_linear_torch,
    molora_linear_triton,
)
from citi_kernels.ops.autocast import as_autocast, autocast_is_on, without_autocast
from citi_kernels.ops.molora_linear_checks import check, check_values, flat_segment_ids
from citi_kernels.ops.molora_linear_contract import Operands, Settings
from citi_kernels.ops.molora_linear_eager import (
    is_plain_eager,
    refuse_forward_mode,
    rows_of,
    run_eager,
)
from citi_kernels.ops.molora_linear_op import molora_linear_op
from citi_kernels.ops.molora_linear_reference import molora_linear_ref

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
        NotImplementedError: forward-mode differentiation, but for the backend "reference".
        RuntimeError: the backend asked for cannot run here.
    """
    if segment_ids is not None and num_segments is None:
        raise ValueError("molora_linear: num_segments: want the number of segments, got None")
    parameters, choices = (weight, bias, a, b, router), (num_experts, scaling, top_k, renormalize)
    is_simple = segment_ids is None and dropout_p == 0.0
    key = molora_linear_few.key_of(x, parameters, choices, is_simple=is_simple)
    if key is not None and (y := molora_linear_few.repeat(key, x)) is not None:
        return y, None
    if autocast_is_on(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (as_autocast(tensor, dtype) for tensor in (x, weight, bias))
    if x.dim() == 0:
        raise ValueError("molora_linear: x: want (..., K), got a tensor without dimensions")
    if segment_ids is not None:
        segment_ids = flat_segment_ids(segment_ids, x.shape)
    scaling, count = float(scaling), num_segments or 0
    settings = Settings(
        num_experts, scaling, top_k, renormalize, segment_ids, count, dropout_p, dropout_seed
    )
    is_cuda_first = x.is_cuda and a.dim() == 2
    is_cuda_first = is_cuda_first and molora_linear_cuda.is_fastest(
        x, a.shape[0], settings, has_weight=weight is not None
    )
    backend = backends.choose("molora_linear", x, first="cuda" if is_cuda_first else None)
    if backend != "reference" and is_plain_eager(x, weight, bias, a, b, router):
        operands = Operands(x, weight, bias, a, b, router)
        y, gate_sums_BG = run_eager(operands, settings, backend)
        if key is not None and backend == "native":
            molora_linear_few.remember(key, operands._replace(x=rows_of(x)), settings)
        return y, gate_sums_BG
    operands = Operands(rows_of(x), weight, bias, a, b, router)
    if backend == "reference":
        y_TN, gate_sums_BG = _reference(operands, settings)
    else:
        refuse_forward_mode("molora_linear")
        y_TN, _, _, _, gate_sums_BG = molora_linear_op(*operands, *settings, backend)
    y = y_TN.reshape(*x.shape[:-1], y_TN.shape[1])
    return y, None if segment_ids is None else gate_sums_BG


def _reference(operands: Operands, settings: Settings) -> tuple[Tensor, Tensor | None]:
    check(operands, settings)
    check_values(settings)
    with without_autocast(operands.x):
        return molora_linear_ref(
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
