"""A model whose linear modules run through `scored_linear` for a while; no edits, all undone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from citi.components import is_linear, matrices
from citi.placement import fetch, is_offloaded

LinearForward = Callable[[nn.Module, Callable[[Tensor], Tensor], Tensor], Tensor]


@contextmanager
def instrumented(model: nn.Module, forward_of: Callable[[nn.Module], LinearForward | None]):
    """Freeze the model, put it in eval mode and replace the forward of modules, then restore it.

    Activation checkpointing that is switched on stays on, in eval mode too, non-reentrant.

    Args:
        forward_of: for every linear module, what is called in place of its forward as
            `f(module, forward, x)`; None leaves it alone.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
            module.training = False
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for module in model.modules():
            replacement = forward_of(module) if is_linear(module) else None
            if replacement is not None:
                _override_forward(stack, module, partial(replacement, module))
            # transformers' own switch is off in eval mode.
            elif getattr(module, "gradient_checkpointing", False) and isinstance(
                module, GradientCheckpointingLayer
            ):
                _override_forward(stack, module, _checkpointed)
        yield


def identities(module: nn.Module) -> list[int]:
    """Of a linear module and its matrices: two modules with one in common share their weight."""
    return [id(owned) for owned in (module, *matrices(module))] if is_linear(module) else []


def weight_getter(module: nn.Module, forward: Callable) -> Callable[[], Tensor] | None:
    """Gives the (N, K) weight if `forward` is x Wᵀ + b with it; None if it is something else."""
    function = getattr(forward, "__func__", None)
    if function not in (nn.Linear.forward, Conv1D.forward):
        return None
    if is_traceable_wrapper_subclass(module.weight):  # a quantised tensor under the plain forward
        return None
    if isinstance(module, Conv1D):
        return lambda: fetch(module, "weight").T
    return lambda: fetch(module, "weight")


def bias_of(module: nn.Module) -> Tensor | None:
    """The (N,) bias where the module runs, None without one."""
    if getattr(module, "bias", None) is None:
        return None
    return fetch(module, "bias") if is_offloaded(module) else module.bias


def _checkpointed(forward: Callable, *args: object, **kwargs: object) -> object:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _override_forward(stack: ExitStack, module: nn.Module, replacement: Callable) -> None:
    """Put `replacement(original, ...)` before this instance's forward until the stack unwinds."""
    # Accelerate's placement hooks own `forward` and call `_old_forward` on the right device.
    attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    original = getattr(module, attribute)
    if attribute in module.__dict__:
        stack.callback(setattr, module, attribute, original)
    else:
        stack.callback(delattr, module, attribute)
    setattr(module, attribute, partial(replacement, original))
