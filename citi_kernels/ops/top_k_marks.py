"""Marked probabilities, as `citi_kernels._C` has them with top_k: the sign of a dropped expert's.

The twin of csrc/top_k.h. One tensor says what the probabilities are and which experts were dropped;
a NaN is never marked.

Shapes: T tokens, E experts, G = E + 1 gate entries.
"""

from __future__ import annotations

from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Settings


def top_k_numbers(settings: Settings) -> dict[str, int | bool]:
    """As `_C` takes the choice of experts: a top_k of 0 where all are kept."""
    if not settings.is_sparse:
        return {"top_k": 0, "renormalizes": False}
    return {"top_k": settings.top_k, "renormalizes": settings.renormalize}


def gates_of_marked(probs_TG: Tensor, settings: Settings) -> Tensor:
    """(T, G): the probabilities, 0 where one is marked, which is below 0 or -0."""
    return probs_TG.clamp_min(0.0) if settings.is_sparse else probs_TG


def kept_experts(probs_TG: Tensor) -> Tensor:
    """(T, E) bool: whose probabilities are not marked."""
    probs_TE = probs_TG[:, 1:]
    return ~probs_TE.signbit() | probs_TE.isnan()
