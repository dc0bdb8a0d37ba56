"""Top-k experts by ScatterMoE: Triton products that read and write tokens in the order of experts.

Rows of x are gathered inside the first product and scattered inside the second, without a sorted
copy of x; y of every choice is written before it is weighed and summed. A mixture of LoRA as its
examples/molora.py sets it up, two linear maps with nothing in between, with MOLoRA's router. In
fp32 its products round to TF32. Importing the package also changes transformers' GPT-OSS and
Granite hybrid models, which no row uses.

Source: arXiv 2403.08245; scattermoe.flatten_sort_count and scattermoe.parallel_linear, 0.3.0,
github.com/shawntan/scattermoe at 47b5e15, which are called, not copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi.benchmark.peers.installed import why_not_installed

INSTALL = (
    "pip install git+https://github.com/shawntan/scattermoe"
    "@47b5e1502e5a10e82c8e5945d761b877849871e7"
)


def why_not(device: str) -> str | None:
    """Why it cannot run on this device, or None."""
    return why_not_installed("scattermoe", INSTALL, device)


def scattermoe_experts(
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
    from scattermoe import flatten_sort_count, parallel_linear

    logits_TG = F.linear(x, router).float()
    chosen_TC = logits_TG[:, 1:].topk(top_k, dim=-1).indices
    gate_TC = torch.softmax(logits_TG, dim=-1).gather(1, chosen_TC + 1)
    # expert of each choice, choices in the order of experts, ends of experts
    order = flatten_sort_count(chosen_TC, num_experts=num_experts)
    a_EKr = a.unflatten(0, (num_experts, -1)).mT
    b_ErN = b.unflatten(1, (num_experts, -1)).permute(1, 2, 0)
    h_Sr = parallel_linear(x, a_EKr, top_k, *order, grouped_out=True)
    gate_TC = (scaling * gate_TC).to(x.dtype)
    return F.linear(x, weight) + parallel_linear(
        h_Sr, b_ErN, 1, *order, gates=gate_TC, grouped_in=True
    )
