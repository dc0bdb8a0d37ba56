"""PEFT's LoRA: one adapter of rank 8, no router."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn


def peft_lora(weight: Tensor, *, r: int = 8) -> nn.Module:
    """A frozen linear with a LoRA adapter in the dtype of `weight`, b drawn at random."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.Sequential(linear)
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=["0"]), model)
    layer = model[0]
    for adapter in (*layer.lora_A.values(), *layer.lora_B.values()):
        adapter.to(weight.device, weight.dtype)
        nn.init.normal_(adapter.weight, std=adapter.weight.shape[1] ** -0.5)
    return layer
