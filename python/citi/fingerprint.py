"""A model's fingerprint: is this the base model that scores, plan or adapter were made for?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from citi.components import Component, find_components
from citi.placement import check_whole, fetch

_VALUES_PER_WEIGHT = 64


def model_fingerprint(model: nn.Module) -> dict[str, str | int]:
    """Identify a base model by its type, its components and a sample of their weights.

    64 values, evenly spread, of every component's weight are rounded to bf16 and hashed: an fp32
    and a bf16 load of one checkpoint agree. An fp16 load agrees with another fp16 load (rounding
    twice may differ in the last bit). Values of quantised weights are hashed as they are stored.

    Args:
        model: any `transformers` causal LM without PEFT adapters, weights in memory.

    Returns:
        model_type, num_components, components_sha256 (names, kinds and shapes), weights_sha256.

    Raises:
        ValueError: the model carries adapters, or a weight is not in memory (meta, sharded).
    """
    components, _ = find_components(model)
    weights = hashlib.sha256()
    for component in components:
        weights.update(_sample(component.name, model.get_submodule(component.name)))
    return {
        "model_type": _model_type(model),
        "num_components": len(components),
        "components_sha256": components_sha256(components),
        "weights_sha256": weights.hexdigest(),
    }


def components_sha256(components: Iterable[Component]) -> str:
    """Hash of names, kinds and shapes, in the order given."""
    lines = (f"{c.name} {c.kind} {c.in_features} {c.out_features}\n" for c in components)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def differing_fields(wanted: dict[str, str | int], got: dict[str, str | int]) -> list[str]:
    """Names of the fingerprint fields in which two models differ, sorted; empty if none do."""
    return sorted(key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key))


def _sample(name: str, module: nn.Module) -> bytes:
    weight = fetch(module, "weight")
    check_whole(f"the weight of {name}", weight)
    if is_traceable_wrapper_subclass(weight):  # torchao's quantised tensors
        weight = weight.dequantize()
    flat = weight.detach().reshape(-1)
    picked = torch.arange(_VALUES_PER_WEIGHT) * (flat.numel() - 1) // (_VALUES_PER_WEIGHT - 1)
    values = flat[picked.to(flat.device)]
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
