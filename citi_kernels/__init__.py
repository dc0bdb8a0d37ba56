"""Kernels of CITI (arXiv 2409.13202): MOLoRA layers and their router loss on PyTorch alone."""

from citi_kernels import testing
from citi_kernels.backends import available_backends, use_backend
from citi_kernels.layers.molora_linear import MoLoRALinear
from citi_kernels.layers.routing import RoutingContext
from citi_kernels.ops.molora_linear import molora_linear, molora_linear_ref
from citi_kernels.ops.molora_linear_group import molora_linear_group
from citi_kernels.ops.router_loss import router_loss

__all__ = [
    "MoLoRALinear",
    "RoutingContext",
    "available_backends",
    "molora_linear",
    "molora_linear_group",
    "molora_linear_ref",
    "router_loss",
    "testing",
    "use_backend",
]
