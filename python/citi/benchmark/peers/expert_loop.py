"""MOLoRA as its authors released it: a Python loop over the experts, under autograd.

Source: arXiv 2409.13202, section 4, and github.com/hypasd-art/CITI at 2bfc64b.
"""

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
    dropout_p: float = 0.0,
) -> Tensor:
    """y of `citi_kernels.molora_linear`; writes and keeps a (T, N) tensor per expert.

    With dropout every expert draws a mask of its own, as an nn.Dropout in each LoRA does.
    """
    y = F.linear(x, weight)
    gate = torch.softmax(F.linear(x, router), dim=-1, dtype=torch.float32).to(x.dtype)
    experts = zip(a.chunk(num_experts), b.chunk(num_experts, dim=1), strict=True)
    for i, (a_i, b_i) in enumerate(experts):
        x_i = F.dropout(x, dropout_p) if dropout_p > 0 else x
        y = y + gate[:, i + 1, None] * F.linear(F.linear(x_i, a_i), b_i) * scaling
    return y
