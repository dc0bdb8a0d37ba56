"""MOLoRA as its authors released it: a Python loop over the experts, under autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def expert_loop(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    *,
    num_experts: int,
    scaling: float,
) -> Tensor:
    """y of `citi_kernels.molora_linear`; writes and keeps a (T, N) tensor per expert."""
    y = F.linear(x, weight)
    gate = torch.softmax(F.linear(x, router), dim=-1, dtype=torch.float32).to(x.dtype)
    experts = zip(a.chunk(num_experts), b.chunk(num_experts, dim=1), strict=True)
    for i, (a_i, b_i) in enumerate(experts):
        y = y + gate[:, i + 1, None] * F.linear(F.linear(x, a_i), b_i) * scaling
    return y
