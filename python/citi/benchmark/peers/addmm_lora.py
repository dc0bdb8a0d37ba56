"""One LoRA by a sequence of in-place matrix products and a backward written by hand.

The fastest that one does without kernels of one's own; no router, no experts, one rank.

Source: matmul_lora in unsloth/kernels/utils.py and LoRA_W in unsloth/kernels/fast_lora.py,
github.com/unslothai/unsloth, written anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AddmmLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return (x @ weight.T).addmm_(x @ a.T, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, weight, a, b = ctx.saved_tensors
        du = dy @ b
        da = torch.empty_like(a).addmm_(du.T, x, alpha=ctx.scaling, beta=0)
        db = torch.empty_like(b).addmm_(dy.T, x @ a.T, alpha=ctx.scaling, beta=0)
        dx = (dy @ weight).addmm_(du, a, alpha=ctx.scaling)
        return dx, None, da, db, None


def addmm_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """y = x weightᵀ + scaling x aᵀ bᵀ; a (R, K), b (N, R)."""
    return _AddmmLora.apply(x, weight, a, b, scaling)
