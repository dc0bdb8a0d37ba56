"""The modules that PEFT's wrappers stand for, with any method: found, and put back for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its original modules under their original names, while the block lasts.

    Every adapted layer and every `modules_to_save` wrapper is taken out and put back.
    """
    wrappers = wrappers_of(model)
    # peft_config marks the model as adapted, for transformers and for find_components.
    mark = model.__dict__.pop("peft_config", None)
    try:
        for parent, name, wrapper in wrappers:
            setattr(parent, name, original_of(wrapper))
        yield model
    finally:
        if mark is not None:
            model.__dict__["peft_config"] = mark
        for parent, name, wrapper in wrappers:
            setattr(parent, name, wrapper)


def has_adapters(model: nn.Module) -> bool:
    """Whether there is anything that `without_adapters` would take out."""
    return any(isinstance(module, _WRAPPERS) for module in model.modules())


def wrappers_of(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, wrapper) of every PEFT module that stands for one of the model's own."""
    return [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, _WRAPPERS)
        for name, child in parent.named_children()
        if isinstance(child, _WRAPPERS)
    ]


def original_of(wrapper: nn.Module) -> nn.Module:
    """The model's own module in a wrapper."""
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        return wrapper.original_module
    return wrapper.get_base_layer()
