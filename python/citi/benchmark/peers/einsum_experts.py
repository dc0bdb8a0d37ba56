"""Experts by einsum over stacked weights, as PEFT's Arrow routing computes its adapters.

Forms y of every expert, (T, E, N), before it is weighed and summed; the backward keeps it.

Source: ArrowLoraLinearLayer.forward, peft/tuners/lora/arrow.py, PEFT 0.21, with MOLoRA's router.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def einsum_experts(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    *,
    num_experts: int,
    scaling: float,
) -> Tensor:
    """y of `citi_kernels.molora_linear`."""
    gate_TG = torch.softmax(F.linear(x, router), dim=-1, dtype=torch.float32).to(x.dtype)
    a_ErK = a.unflatten(0, (num_experts, -1))
    b_ENr = b.unflatten(1, (num_experts, -1)).transpose(0, 1)
    h_TEr = torch.einsum("tk,erk->ter", x, a_ErK)
    y_TEN = torch.einsum("ter,enr->ten", h_TEr, b_ENr) * scaling
    return F.linear(x, weight) + torch.einsum("te,ten->tn", gate_TG[:, 1:], y_TEN)
