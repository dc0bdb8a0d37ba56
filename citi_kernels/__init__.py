"""Kernels of CITI (arXiv 2409.13202) on PyTorch alone: MOLoRA layers, router loss, importance."""

from citi_kernels import testing
from citi_kernels.backends import available_backends, use_backend
from citi_kernels.layers.molora_linear import MoLoRALinear
from citi_kernels.layers.routing import RoutingContext
from citi_kernels.ops.importance_parameters import accumulate_parameter_scores_
from citi_kernels.ops.importance_row_dots import accumulate_row_dots_
from citi_kernels.ops.molora_linear import molora_linear, molora_linear_ref
from citi_kernels.ops.molora_linear_group import molora_linear_group
from citi_kernels.ops.router_loss import router_loss
from citi_kernels.ops.scored_linear import scored_linear

__all__ = [
    "MoLoRALinear",
    "RoutingContext",
    "accumulate_parameter_scores_",
    "accumulate_row_dots_",
    "available_backends",
    "molora_linear",
    "molora_linear_group",
    "molora_linear_ref",
    "router_loss",
    "scored_linear",
    "testing",
    "use_backend",
]
