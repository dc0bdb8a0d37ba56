"""Where a module's weights are: in memory, or fetched by Accelerate for every forward."""

from __future__ import annotations

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether Accelerate keeps the weights elsewhere (CPU or disk) between forwards."""
    return _offloading_hook(module) is not None


def fetch(module: nn.Module, name: str) -> Tensor:
    """The module's own tensor `name`, brought to where the module runs if it is offloaded."""
    hook = _offloading_hook(module)
    if hook is None:
        return getattr(module, name)
    return hook.weights_map[name].to(hook.execution_device)


def runs_on(module: nn.Module) -> torch.device:
    """Where the module computes with its own parameters."""
    hook = _offloading_hook(module)
    return next(module.parameters()).device if hook is None else torch.device(hook.execution_device)


def check_whole(what: str, tensor: Tensor) -> None:
    """Raises: ValueError for a tensor on the meta device, an empty shard or a sharded one."""
    if tensor.is_meta or tensor.numel() == 0 or hasattr(tensor, "full_tensor"):
        where = "on the meta device" if tensor.is_meta else "sharded"
        raise ValueError(
            f"{what} must be whole and in memory, got one that is {where}; load the model as a "
            "whole, or place it with device_map (Accelerate)"
        )


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", None) or [hook]:
        if isinstance(each, AlignDevicesHook) and each.offload and each.weights_map is not None:
            return each
    return None
