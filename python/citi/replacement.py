"""The replacement experiment: a tuned model's components, put into the model it was tuned from.

How much of what fine-tuning taught, and of what it cost, sits in the most and the least important
components (arXiv 2409.13202, section on the importance of components).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from citi.components import find_components
from citi.shares import num_least, num_most

ENDS = ("top", "bottom")
Figures = TypeVar("Figures")


@dataclass(frozen=True)
class Replacement(Generic[Figures]):
    """One step of the experiment.

    Attributes:
        end: "top" (most important components) or "bottom".
        share: Of all components, asked for.
        components: Replaced ones, by name.
        figures: What the measure gave.
    """

    end: str
    share: float
    components: tuple[str, ...]
    figures: Figures


def replacement_experiment(
    model: nn.Module,
    tuned: nn.Module,
    importance: Mapping[str, float],
    measure: Callable[[nn.Module], Figures],
    *,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.5),
    ends: Sequence[str] = ENDS,
) -> list[Replacement[Figures]]:
    """Measure the original model with some of the tuned model's components, ever more of them.

    Args:
        model: The original; whole again afterwards.
        tuned: Fully fine-tuned from it, without adapters; not changed.
        importance: Component → importance, of every component.
        measure: Called with `model` while the components are replaced.
        shares: Of the components, each 0 to 1.
        ends: "top", "bottom" or both.
    Returns:
        One entry an end and share, in the order of the arguments.
    Raises:
        ValueError: As `chosen_components` and `components_replaced`.
    """
    found = []
    for end in ends:
        for share in shares:
            names = chosen_components(importance, share, end=end)
            with components_replaced(model, tuned, names):
                found.append(Replacement(end, share, names, measure(model)))
    return found


def chosen_components(
    importance: Mapping[str, float], share: float, *, end: str
) -> tuple[str, ...]:
    """The most ("top") or the least ("bottom") important share, as `citi.make_plan` rounds it.

    Raises:
        ValueError: Another end, or a share outside 0 to 1.
    """
    if end not in ENDS:
        raise ValueError(f"end must be one of {', '.join(ENDS)}, got {end!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    order = sorted(importance, key=lambda name: (importance[name], name))
    if end == "top":
        return tuple(order[len(order) - num_most(len(order), share) :])
    return tuple(order[: num_least(len(order), share)])


@contextmanager
def components_replaced(
    model: nn.Module, tuned: nn.Module, names: Sequence[str]
) -> Iterator[nn.Module]:
    """`model` with the weights and biases of `tuned` in the named components, inside the block.

    Raises:
        ValueError: A name is no component of both, or a shape differs; nothing was changed.
    """
    pairs = []
    for each in (model, tuned):
        known = {component.name for component in find_components(each)[0]}
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(f"names must be components of both models, got {unknown[:3]}")
    for name in names:
        theirs = dict(tuned.get_submodule(name).named_parameters())
        for key, ours in model.get_submodule(name).named_parameters():
            if key not in theirs or theirs[key].shape != ours.shape:
                raise ValueError(f"{name}.{key} must have one shape in both models")
            pairs.append((ours, theirs[key], ours.detach().clone()))
    try:
        with torch.no_grad():
            for ours, other, _ in pairs:
                ours.copy_(other)
        yield model
    finally:
        with torch.no_grad():
            for ours, _, before in pairs:
                ours.copy_(before)
