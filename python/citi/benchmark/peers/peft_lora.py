"""PEFT's LoRA: adapters of rank 8, no router; several active at once are added up."""

from __future__ import annotations

import warnings

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn


def peft_lora(weight: Tensor, *, r: int = 8, num_adapters: int = 1) -> nn.Module:
    """A frozen linear with LoRA adapters in the dtype of `weight`, b drawn at random."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    model = nn.Sequential(linear)
    names = [f"adapter{i}" for i in range(num_adapters)]
    with warnings.catch_warnings():
        # of a second adapter, which is what was asked for
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name in names:
            config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
            inject_adapter_in_model(config, model, adapter_name=name)
    layer = model[0]
    layer.set_adapter(names)
    for adapter in (*layer.lora_A.values(), *layer.lora_B.values()):
        adapter.to(weight.device, weight.dtype)
        nn.init.normal_(adapter.weight, std=adapter.weight.shape[1] ** -0.5)
    return layer
