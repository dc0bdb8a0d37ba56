"""Autocast, as the ops of this package see it: what F.linear would cast, they cast."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

# asked once: torch.compile of PyTorch 2.11 cannot trace the question
_AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


def autocast_is_on(x: Tensor) -> bool:
    kind = x.device.type
    return kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)


def as_autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As autocast treats an argument of F.linear: fp64 and integers stay."""
    if tensor is None or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return tensor
    return tensor.to(dtype)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast does not see into an op: the fp32 products of the router must stay fp32."""
    if not autocast_is_on(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
