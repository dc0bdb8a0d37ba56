"""Backend "torch" of `citi::molora_linear`: the stacked algebra in PyTorch calls, on any device.

Experts are one low-rank update of rank R with a diagonal gate per token. Dense (all experts kept):

    z = [a; router] x^T                                one pass over x; h = z[:R]
    u = scaling * h * repeat(gate[1:], r)
    y = x weight^T + bias + u^T b^T                    the update is added in place

    du = b^T dy^T           db^T = u dy
    dgate_i = scaling * <h_i, du_i>                    in rank space
    dz = [scaling * du * repeat(gate[1:], r); softmax backward of dgate]
    dx = dy weight + dz^T [a; router]                  the second term is added in place
    [da; drouter] = dz x                               one pass over x

Sparse (top_k < E): routed first, in fp32; each expert then sees the rows of its own tokens only,
so that nothing of a dropped expert, NaN included, can reach a token. y is a sum over the experts of
a token, in fp32 where they are many (`sum_dtype_of`): 16 bits would be rounded for each.

Rank-sized tensors have their tokens last: products with a small first side and softmax over a first
dimension are the fast ones (measured on CPUs, bf16 and fp32). They are held freely; nothing of size
(T, N) but y is kept, and weight is not copied.

Shapes: T tokens, K in-features, N out-features, E experts, r rank, R = E·r, G = E + 1, Z = R + G,
B segments; t the tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels.ops import molora_linear_reference as definition
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.molora_linear_top_k import sum_dtype_of

# up to so many tokens b is read as it lies, by dtype; others: one
_FEW_TOKENS = {torch.float32: 4}


def forward(operands: Operands, settings: Settings) -> tuple[Tensor, Saved, Tensor | None]:
    """y (T, N), what the backward needs, and the gate sums (B, G) or None."""
    operands = _prepare(operands, operands.x.dtype, operands.x.shape[0])
    y_TN = None
    if operands.weight is not None:
        y_TN = F.linear(operands.x, operands.weight, operands.bias)
    add_update = _add_sparse_update if settings.is_sparse else _add_dense_update
    y_TN, saved = add_update(y_TN, operands, settings)
    gate_sums_BG = None
    if settings.segment_ids is not None:
        kept_TE = None if saved.kept is None else saved.kept.T
        gate_sums_BG = definition.sum_over_segments(
            definition.gates(saved.probs.T, kept_TE), settings.segment_ids, settings.num_segments
        )
    return y_TN, saved, gate_sums_BG


def empty_saved(x_TK: Tensor, a_RK: Tensor, settings: Settings) -> Saved:
    """h (R, T), 0 where the expert was dropped; probs (G, T); kept (E, T) bool."""
    num_tokens, num_experts = x_TK.shape[0], settings.num_experts
    kept_ET = None
    if settings.is_sparse:
        kept_ET = x_TK.new_empty(num_experts, num_tokens, dtype=torch.bool)
    wide = definition.gate_dtype(x_TK.dtype)
    return Saved(
        h=x_TK.new_empty(a_RK.shape[0], num_tokens),
        probs=x_TK.new_empty(num_experts + 1, num_tokens, dtype=wide),
        kept=kept_ET,
    )


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
    operands = _prepare(operands, saved.h.dtype, saved.h.shape[1])
    if dy_TN is not None:
        dy_TN = dy_TN.contiguous()
    run = _sparse_gradients if settings.is_sparse else _dense_gradients
    gradients = run(dy_TN, dgate_sums_BG, operands, saved, settings, needs)
    return gradients._replace(
        weight=dy_TN.T @ operands.x if needs.weight else None,
        bias=dy_TN.sum(0) if needs.bias else None,
    )


def _add_dense_update(
    y_TN: Tensor | None, operands: Operands, settings: Settings
) -> tuple[Tensor, Saved]:
    x_TK, dtype, rank = operands.x, operands.x.dtype, operands.a.shape[0]
    if settings.dropout_p > 0:
        x_in_TK = x_TK * _dropout_scale(x_TK.shape[0], operands, settings)
        h_RT = operands.a @ x_in_TK.T
        logits_GT = operands.router @ x_TK.T
    else:
        z_ZT = _stack(operands) @ x_TK.T
        h_RT, logits_GT = z_ZT[:rank].clone(), z_ZT[rank:]
    probs_GT = torch.softmax(logits_GT, dim=0, dtype=definition.gate_dtype(dtype))
    u_RT = _scale(h_RT, probs_GT[1:], settings.scaling)
    return _add_product(y_TN, u_RT.T, operands.b.T), Saved(h_RT, probs_GT, None)


def _dense_gradients(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
) -> Operands:
    x_TK, rank = operands.x, saved.h.shape[0]
    dx_TK = _base_gradient(dy_TN, operands) if needs.x else None
    da_RK = db_NR = drouter_GK = None
    if needs.b:
        db_NR = (_scale(saved.h, saved.probs[1:], settings.scaling) @ dy_TN).T
    if not (needs.x or needs.a or needs.router):
        return Operands(None, None, None, None, db_NR, None)

    dz_ZT = _dense_rank_gradients(dy_TN, dgate_sums_BG, operands, saved, settings)
    if settings.dropout_p > 0:
        keep_TK = _dropout_scale(saved.h.shape[1], operands, settings)
        if needs.x:
            dx_TK = _add_product(dx_TK, dz_ZT[rank:].T, operands.router)
            dx_TK.addcmul_(dz_ZT[:rank].T @ operands.a, keep_TK)
        da_RK = dz_ZT[:rank] @ (x_TK * keep_TK) if needs.a else None
        drouter_GK = dz_ZT[rank:] @ x_TK if needs.router else None
        return Operands(dx_TK, None, None, da_RK, db_NR, drouter_GK)

    if needs.x:
        dx_TK = _add_product(dx_TK, dz_ZT.T, _stack(operands))
    if needs.a and needs.router:
        dstack_ZK = dz_ZT @ x_TK
        da_RK, drouter_GK = dstack_ZK[:rank].clone(), dstack_ZK[rank:].clone()
    elif needs.a:
        da_RK = dz_ZT[:rank] @ x_TK
    elif needs.router:
        drouter_GK = dz_ZT[rank:] @ x_TK
    return Operands(dx_TK, None, None, da_RK, db_NR, drouter_GK)


def _dense_rank_gradients(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
) -> Tensor:
    """dz (Z, T): the gradient of h above that of the logits, in x's dtype."""
    dtype, gate_ET = saved.h.dtype, saved.probs[1:]
    dgate_GT = _gate_sums_backward(dgate_sums_BG, saved, settings)
    dh_RT = torch.zeros_like(saved.h)
    if dy_TN is not None:
        du_RT = operands.b.T @ dy_TN.T
        dgate_GT[1:] += _scale_backward(saved.h, du_RT, gate_ET, settings.scaling)
        dh_RT = _scale(du_RT, gate_ET, settings.scaling)
    return torch.cat([dh_RT, _softmax_backward(saved.probs, dgate_GT).to(dtype)])


def _add_sparse_update(
    y_TN: Tensor | None, operands: Operands, settings: Settings
) -> tuple[Tensor, Saved]:
    x_TK = operands.x
    wide_x_TK, wide_router_GK = definition.in_gate_dtype(x_TK, operands.router)
    logits_TG = F.linear(wide_x_TK, wide_router_GK)
    kept_TE = definition.choose_experts(logits_TG, settings.top_k)
    probs_TG = definition.gate_probabilities(logits_TG, kept_TE, settings.renormalize)
    kept_ET, probs_GT = kept_TE.T.contiguous(), probs_TG.T.contiguous()
    h_RT = x_TK.new_zeros(operands.a.shape[0], x_TK.shape[0])
    dtype, sum_dtype = x_TK.dtype, sum_dtype_of(x_TK.dtype, settings)
    if y_TN is None:
        y_TN = x_TK.new_zeros(x_TK.shape[0], operands.b.shape[0], dtype=sum_dtype)
    y_TN = y_TN.to(sum_dtype)
    if settings.dropout_p > 0:
        x_TK = x_TK * _dropout_scale(x_TK.shape[0], operands, settings)
    for rows, gate, tokens_t, a_rK, b_rN in _experts_with_tokens(kept_ET, operands):
        h_rt = a_rK @ x_TK[tokens_t].T
        u_rt = _scale(h_rt, probs_GT[gate, tokens_t], settings.scaling)
        h_RT[rows, tokens_t] = h_rt
        y_TN[tokens_t] = torch.addmm(y_TN[tokens_t], u_rt.T.to(sum_dtype), b_rN.to(sum_dtype))
    return y_TN.to(dtype), Saved(h_RT, probs_GT, kept_ET)


def _sparse_gradients(
    dy_TN: Tensor | None,
    dgate_sums_BG: Tensor | None,
    operands: Operands,
    saved: Saved,
    settings: Settings,
    needs: Needs,
) -> Operands:
    dtype, num_tokens, num_in = saved.h.dtype, saved.h.shape[1], operands.a.shape[1]
    dgate_GT = _gate_sums_backward(dgate_sums_BG, saved, settings)
    dx_in_TK = operands.a.new_zeros(num_tokens, num_in) if needs.x else None
    keep_TK, x_in_TK = None, operands.x
    if settings.dropout_p > 0:
        keep_TK = _dropout_scale(saved.h.shape[1], operands, settings)
        x_in_TK = operands.x * keep_TK if needs.a else None
    da_RK = operands.a.new_zeros(operands.a.shape) if needs.a else None
    db_RN = operands.b.new_zeros(operands.b.T.shape) if needs.b else None
    experts = _experts_with_tokens(saved.kept, operands) if dy_TN is not None else ()
    for rows, gate, tokens_t, a_rK, b_rN in experts:
        dy_tN, h_rt, gate_1t = dy_TN[tokens_t], saved.h[rows, tokens_t], saved.probs[gate, tokens_t]
        du_rt = b_rN @ dy_tN.T
        dh_rt = _scale(du_rt, gate_1t, settings.scaling)
        dgate_GT[gate, tokens_t] += _scale_backward(h_rt, du_rt, gate_1t, settings.scaling)
        if needs.b:
            db_RN[rows] = _scale(h_rt, gate_1t, settings.scaling) @ dy_tN
        if needs.a:
            da_RK[rows] = dh_rt @ x_in_TK[tokens_t]
        if needs.x:
            dx_in_TK[tokens_t] += dh_rt.T @ a_rK

    dgate_GT[1:].masked_fill_(~saved.kept, 0.0)
    dlogits_GT = _softmax_backward(saved.probs, dgate_GT).to(dtype)
    dx_TK = None
    if needs.x:
        dx_TK = dx_in_TK if keep_TK is None else dx_in_TK.mul_(keep_TK)
        dx_TK = _add_product(dx_TK, dlogits_GT.T, operands.router)
        if dy_TN is not None and operands.weight is not None:
            dx_TK = _add_product(dx_TK, dy_TN, operands.weight)
    return Operands(
        x=dx_TK,
        weight=None,
        bias=None,
        a=da_RK,
        b=db_RN.T if needs.b else None,
        router=dlogits_GT @ operands.x if needs.router else None,
    )


def _experts_with_tokens(
    kept_ET: Tensor, operands: Operands
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Each used expert: its rows of the rank, its row of the gate, its tokens, a_i and b_i^T.

    The numbers of tokens go to the host: on a GPU this waits, and cannot be captured in a graph.
    """
    num_experts, rank = kept_ET.shape[0], operands.a.shape[0] // kept_ET.shape[0]
    tokens = kept_ET.nonzero()[:, 1].split(kept_ET.sum(1).tolist())
    for i in range(num_experts):
        if tokens[i].numel():
            rows = slice(i * rank, (i + 1) * rank)
            gate = slice(i + 1, i + 2)
            yield rows, gate, tokens[i], operands.a[rows], operands.b.T[rows]


def _base_gradient(dy_TN: Tensor | None, operands: Operands) -> Tensor | None:
    """dx of the linear layer alone; None where nothing flows through it."""
    if dy_TN is None or operands.weight is None:
        return None
    return dy_TN @ operands.weight


def _prepare(operands: Operands, dtype: torch.dtype, num_tokens: int) -> Operands:
    """Everything but weight contiguous, a, b and router rounded to `dtype`.

    One layout whatever the caller's, so that results do not depend on it: of b the transpose, but
    for few tokens, where that takes longer than the products. weight alone is read as it lies: a
    copy would cost as much as the memory it saves.
    """
    if num_tokens > _FEW_TOKENS.get(dtype, 1):
        b_NR = operands.b.T.to(dtype, memory_format=torch.contiguous_format).contiguous().T
    else:
        b_NR = operands.b.to(dtype).contiguous()
    return operands._replace(
        x=None if operands.x is None else operands.x.contiguous(),
        a=operands.a.to(dtype).contiguous(),
        b=b_NR,
        router=operands.router.to(dtype).contiguous(),
    )


def _stack(operands: Operands) -> Tensor:
    return torch.cat([operands.a, operands.router])


def _add_product(sum_TN: Tensor | None, left_TR: Tensor, right_RN: Tensor) -> Tensor:
    """sum + left @ right, in place where there is a sum."""
    return left_TR @ right_RN if sum_TN is None else sum_TN.addmm_(left_TR, right_RN)


def _scale(h_RT: Tensor, gate_ET: Tensor, scaling: float) -> Tensor:
    """scaling * h ⊙ repeat(gate, r), rounded once to h's dtype."""
    h_ErT = _by_expert(h_RT, gate_ET)
    return (h_ErT * (scaling * gate_ET).unsqueeze(1)).view(h_RT.shape).to(h_RT.dtype)


def _scale_backward(h_RT: Tensor, du_RT: Tensor, gate_ET: Tensor, scaling: float) -> Tensor:
    """The gradient of the gate: scaling * <h_i, du_i> per expert, in the gate's dtype."""
    h_ErT, du_ErT = (_by_expert(each, gate_ET).to(gate_ET.dtype) for each in (h_RT, du_RT))
    return (h_ErT * du_ErT).sum(1).mul_(scaling)


def _by_expert(h_RT: Tensor, gate_ET: Tensor) -> Tensor:
    num_experts = gate_ET.shape[0]
    return h_RT.view(num_experts, h_RT.shape[0] // num_experts, h_RT.shape[1])


def _softmax_backward(probs_GT: Tensor, dgate_GT: Tensor) -> Tensor:
    return probs_GT * (dgate_GT - (probs_GT * dgate_GT).sum(0))


def _gate_sums_backward(dgate_sums_BG: Tensor | None, saved: Saved, settings: Settings) -> Tensor:
    """(G, T): each token's gate gets the gradient of its segment's sum; segment -1 gets 0."""
    if dgate_sums_BG is None:
        return torch.zeros_like(saved.probs)
    # the padded column of zeros is the last, where an index of -1 points
    return F.pad(dgate_sums_BG.T, (0, 1))[:, settings.segment_ids]


def _dropout_scale(num_tokens: int, operands: Operands, settings: Settings) -> Tensor:
    a_RK = operands.a
    return definition.dropout_scale(
        (num_tokens, a_RK.shape[1]),
        settings.dropout_p,
        settings.dropout_seed,
        dtype=a_RK.dtype,
        device=a_RK.device,
    )
