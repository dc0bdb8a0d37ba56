"""Top-k experts by PyTorch's grouped product: tokens sorted by expert, two products, a sum.

Source: torch.nn.functional.grouped_mm, as mixtures of experts in torchtitan use it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def why_not() -> str | None:
    """Why this PyTorch cannot run it, or None."""
    if hasattr(F, "grouped_mm"):
        return None
    return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"


def grouped_experts(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    *,
    num_experts: int,
    scaling: float,
    top_k: int,
) -> Tensor:
    """y of `citi_kernels.molora_linear` with top_k."""
    logits_TG = F.linear(x, router).float()
    gate_TG = torch.softmax(logits_TG, dim=-1)
    chosen_TC = logits_TG[:, 1:].topk(top_k, dim=-1).indices
    expert_S, order_S = chosen_TC.flatten().sort(stable=True)
    token_S = order_S // top_k
    ends_E = torch.searchsorted(
        expert_S, torch.arange(num_experts, device=x.device), right=True
    ).int()
    h_Sr = F.grouped_mm(x[token_S], a.unflatten(0, (num_experts, -1)).mT, offs=ends_E)
    gate_S = gate_TG[token_S, expert_S + 1].to(x.dtype)
    b_ErN = b.unflatten(1, (num_experts, -1)).permute(1, 2, 0)
    y_SN = F.grouped_mm(h_Sr * (scaling * gate_S)[:, None], b_ErN.contiguous(), offs=ends_E)
    return F.linear(x, weight).index_add(0, token_S, y_SN)
