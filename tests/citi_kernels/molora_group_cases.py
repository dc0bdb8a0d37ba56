"""Layers that share one input: random arguments, and outputs and gradients of both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from citi_kernels import molora_linear
from citi_kernels.testing import random_case

Result = list[tuple[Tensor, Tensor | None]]
OF_A_LAYER = ("weight", "bias", "a", "b", "router")
WIDTHS = (40, 24, 40, 17)


@dataclass(frozen=True)
class Group:
    """x, each layer's operands (weight, bias, a, b, router), incoming gradients, options."""

    x: Tensor
    layers: list[tuple[Tensor | None, ...]]
    incoming: list[tuple[Tensor, Tensor | None]]
    options: dict[str, Any]
    seeds: list[Tensor] | None

    def lists(self, layers: Sequence[Sequence[Tensor | None]]) -> list[list[Tensor | None]]:
        return [list(each) for each in zip(*layers, strict=True)]


def random_group(
    num_layers: int, *, num_tokens: int = 21, num_in: int = 48, **options: Any
) -> Group:
    """Layers of `random_case` with the first one's x and options; `dropout_p` brings seeds."""
    dropout_p = options.pop("dropout_p", 0.0)
    cases = [
        random_case(num_tokens, num_in, WIDTHS[i], seed=i, **options) for i in range(num_layers)
    ]
    seeds = [torch.tensor(2**40 + i, device="cpu") for i in range(num_layers)]
    return Group(
        x=cases[0].x,
        layers=[case.operands[1:] for case in cases],
        incoming=[(case.dy, case.dgate_sums) for case in cases],
        options=cases[0].options | {"dropout_p": dropout_p},
        seeds=seeds if dropout_p else None,
    )


def one_by_one(
    x: Tensor, *lists: Sequence[Tensor | None], dropout_seeds: Any = None, **options: Any
) -> Result:
    """What `molora_linear_group` must equal."""
    seeds = dropout_seeds or [None] * len(lists[0])
    return [
        molora_linear(x, *layer, **options, dropout_seed=seed)
        for *layer, seed in zip(*lists, seeds, strict=True)
    ]


def evaluate_group(
    function: Callable[..., Result],
    group: Group,
    *,
    trained: Callable[[int, str], bool] = lambda layer, name: True,
    used: Callable[[int, str], bool] = lambda layer, name: True,
) -> dict[str, Tensor | None]:
    """Outputs, and gradients by name: dx, and da[0], db[0], … of the operands that train.

    Args:
        trained: of (layer, operand's name); x is asked for as (0, "x").
        used: of (layer, "y" or "gate_sums"): whether the loss sees that output.
    """

    def leaf(tensor: Tensor | None, layer: int, name: str) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().clone().requires_grad_(trained(layer, name))

    x = leaf(group.x, 0, "x")
    layers = [
        [leaf(each, i, name) for name, each in zip(OF_A_LAYER, layer, strict=True)]
        for i, layer in enumerate(group.layers)
    ]
    outputs = function(x, *group.lists(layers), **group.options, dropout_seeds=group.seeds)
    results: dict[str, Tensor | None] = {}
    seen, gradients = [], []
    for i, (pair, incoming) in enumerate(zip(outputs, group.incoming, strict=True)):
        for name, out, gradient in zip(("y", "gate_sums"), pair, incoming, strict=True):
            if out is None:
                continue
            results[f"{name}[{i}]"] = out.detach()
            if used(i, name) and out.requires_grad:
                seen.append(out)
                gradients.append(gradient)
    if seen:
        torch.autograd.backward(seen, gradients)
    named = {"dx": x} | {
        f"d{name}[{i}]": each
        for i, layer in enumerate(layers)
        for name, each in zip(OF_A_LAYER, layer, strict=True)
    }
    return results | {
        name: each.grad for name, each in named.items() if each is not None and each.requires_grad
    }
