"""MOLoRA linear by its definition, one expert at a time, and the rules every backend shares.

Shapes: T tokens, K in-features, N out-features, E experts, R stacked rank (E·r), G gate entries
(E + 1, entry 0 is the backbone neuron), B segments (samples).
Source: CITI, arXiv 2409.13202, section "MOLoRA".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels.ops.counter_hash import as_int32, hash_of_columns, hash_of_rows


def molora_linear_ref(
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
    """The formula of `citi_kernels.molora_linear`, one expert at a time; PyTorch differentiates it.

        gate = softmax(router @ x)
        y    = weight @ x + bias + scaling * sum_i gate[i] * b_i @ (a_i @ x)      i = 1 .. E

    Arguments and results are those of `molora_linear`; no checks. In fp64 gates and gate sums
    are fp64 too. It writes a (T, N) tensor per expert; it is the truth, not an implementation.
    """
    shape, x_TK = x.shape, x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    a_RK, b_NR, router_GK = a.to(x.dtype), b.to(x.dtype), router.to(x.dtype)
    logits_TG = F.linear(*in_gate_dtype(x_TK, router_GK))
    kept_TE = choose_experts(logits_TG, top_k)
    gate_TG = gates(gate_probabilities(logits_TG, kept_TE, renormalize), kept_TE)

    x_in_TK = x_TK
    if dropout_p > 0:
        x_in_TK = x_TK * dropout_scale(
            x_TK.shape, dropout_p, dropout_seed, dtype=x.dtype, device=x.device
        )
    if weight is None:
        y_TN = x_TK.new_zeros(x_TK.shape[0], b.shape[0])
    else:
        y_TN = F.linear(x_TK, weight, bias)
    experts = zip(a_RK.chunk(num_experts), b_NR.chunk(num_experts, dim=1), strict=True)
    for i, (a_rK, b_Nr) in enumerate(experts):
        tokens = torch.arange(x_TK.shape[0], device=x.device)
        if kept_TE is not None:
            tokens = kept_TE[:, i].nonzero().squeeze(1)
        h_tr = F.linear(x_in_TK[tokens], a_rK)
        u_tr = (scaling * gate_TG[tokens, i + 1, None] * h_tr).to(x.dtype)
        y_TN = y_TN.index_add(0, tokens, F.linear(u_tr, b_Nr))

    gate_sums_BG = None
    if segment_ids is not None:
        gate_sums_BG = sum_over_segments(gate_TG, segment_ids.reshape(-1), num_segments)
    return y_TN.reshape(*shape[:-1], b.shape[0]), gate_sums_BG


def gate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for every compute dtype but fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_gate_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(gate_dtype(tensor.dtype)) for tensor in tensors)


def choose_experts(logits_TG: Tensor, top_k: int | None) -> Tensor | None:
    """(T, E) bool, the k largest expert logits of each token, ties to the lowest index.

    None where every expert is kept. Logits, not probabilities, which underflow to equal zeros.
    """
    num_experts = logits_TG.shape[1] - 1
    if top_k is None or top_k == num_experts:
        return None
    order = logits_TG.detach()[:, 1:].sort(dim=1, descending=True, stable=True).indices
    kept_TE = torch.zeros_like(order, dtype=torch.bool)
    return kept_TE.scatter_(1, order[:, :top_k], True)


def gate_probabilities(logits_TG: Tensor, kept_TE: Tensor | None, renormalize: bool) -> Tensor:
    """Softmax over all entries; with `renormalize`, over the backbone and the kept experts only."""
    if kept_TE is not None and renormalize:
        dropped_TG = F.pad(~kept_TE, (1, 0))
        logits_TG = logits_TG.masked_fill(dropped_TG, float("-inf"))
    return torch.softmax(logits_TG, dim=1)


def gates(probs_TG: Tensor, kept_TE: Tensor | None) -> Tensor:
    """The probabilities with those of dropped experts exactly 0."""
    if kept_TE is None:
        return probs_TG
    return probs_TG.masked_fill(F.pad(~kept_TE, (1, 0)), 0.0)


def sum_over_segments(gate_TG: Tensor, segment_ids_T: Tensor, num_segments: int) -> Tensor:
    """gate_sums[b] = sum of gate[t] over the tokens with segment_ids[t] == b; the same every run.

    Rows of segment -1 go to a row of their own that is cut off, so that a NaN there is lost.
    """
    sums_BG = gate_TG.new_zeros(num_segments + 1, gate_TG.shape[1])
    ids_T = torch.where(segment_ids_T < 0, num_segments, segment_ids_T)
    if gate_TG.is_cuda:  # index_add_ is atomic there; index_put_ sorts
        sums_BG = sums_BG.index_put((ids_T,), gate_TG, accumulate=True)
    else:
        sums_BG = sums_BG.index_add(0, ids_T, gate_TG)
    return sums_BG[:num_segments]


def dropout_scale(
    shape: tuple[int, int],
    dropout_p: float,
    dropout_seed: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """1 / (1 - p) where an input is kept, 0 where it is dropped; see `dropout_keeps`."""
    kept_TK = dropout_keeps(shape, dropout_p, dropout_seed, device=device)
    return kept_TK.to(dtype).mul_(1 / (1 - dropout_p))


def dropout_keeps(
    shape: tuple[int, int], dropout_p: float, dropout_seed: Tensor, *, device: torch.device
) -> Tensor:
    """(T, K) bool, whether x[t, k] is kept: a hash of (seed, t, k), so that no mask is ever stored.

        kept    = bits >= p * 2**32           bits[t, k] in uint32, see `counter_hash`

    The same on every backend, device and dtype; the mask of a token depends on its index t alone.
    """
    num_tokens, num_in = shape
    row_T = hash_of_rows(torch.arange(num_tokens, device=device), int(dropout_seed))
    k_K = torch.arange(num_in, device=device)
    kept_TK = torch.empty(shape, dtype=torch.bool, device=device)
    # int32 compares signed: flipping the top bit of both sides keeps the order of uint32
    least = as_int32(dropout_threshold(dropout_p) ^ 2**31)
    # block by block, so that the passes of the hash stay in the cache
    for block in range(0, num_tokens, _HASHED_ROWS):
        rows = slice(block, block + _HASHED_ROWS)
        bits = hash_of_columns(row_T[rows], k_K)
        torch.ge(bits.bitwise_xor_(-(2**31)), least, out=kept_TK[rows])
    return kept_TK


_HASHED_ROWS = 64


def dropout_threshold(dropout_p: float) -> int:
    """An input is kept where its hash, a uint32, is at least this."""
    return min(int(dropout_p * 2**32), 2**32 - 1)


def dropout_numbers(
    dropout_p: float, dropout_seed: Tensor | None
) -> tuple[int, int, int, float] | None:
    """As `citi_kernels._C` takes dropout: the halves of the seed, the threshold, 1 / (1 - p).

    None without dropout. dropout_seed: () int64 on the CPU.
    """
    if dropout_p == 0:
        return None
    seed, low = int(dropout_seed), 2**32 - 1
    return seed & low, seed >> 32 & low, dropout_threshold(dropout_p), 1 / (1 - dropout_p)
