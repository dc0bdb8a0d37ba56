"""The components of a model: the linear modules of its decoder, found by module type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ROUTER_ROLES = ("gate", "router")


@dataclass(frozen=True)
class Component:
    """One linear module of the decoder.

    Attributes:
        name: full dotted module name.
        kind: "linear" (weight (out, in)) or "conv1d" (weight (in, out)).
        in_features: K.
        out_features: N.
        layer: the first part of the name that is an integer, None without one.
        role: the last part of the name, such as q_proj.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    layer: int | None
    role: str


@dataclass(frozen=True)
class SkippedModule:
    """A module that holds weights but is not scored, or scored 0, and why."""

    name: str
    reason: str


def find_components(model: nn.Module) -> tuple[list[Component], list[SkippedModule]]:
    """Enumerate the linear components of a causal LM, in the order of its modules.

    `nn.Linear` with its subclasses and transformers' `Conv1D` count, whatever they are called. Left
    out, each with its reason: the output head (tied or not), embeddings, routers of a mixture of
    experts (an adapter there would change which experts run), expert weights that are one 3-D
    parameter, and modules that share the weight of one listed before (a weight is counted once).
    Modules with only vectors (norms) are not listed.

    Args:
        model: any `transformers` causal LM without PEFT adapters.

    Returns:
        components and skipped modules.

    Raises:
        ValueError: `model` already carries PEFT adapters.
    """
    _check_base_model(model)
    components: list[Component] = []
    skipped: list[SkippedModule] = []
    owners: dict[int, str] = {}
    for name, module, weights in _modules_with_matrices(model):
        owner = next((owners[id(w)] for w in weights if id(w) in owners), None)
        reason = _reason_to_skip(model, name, module, owner)
        for weight in weights:
            owners.setdefault(id(weight), name)
        if reason is None:
            components.append(_describe(name, module))
        else:
            skipped.append(SkippedModule(name, reason))
    return components, skipped


def is_linear(module: nn.Module) -> bool:
    """Whether the module's type is one that components have."""
    return isinstance(module, (nn.Linear, Conv1D))


def split_layer(name: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.up_proj` -> (3, `mlp.up_proj`); without a number (None, name)."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return int(part), ".".join(parts[index + 1 :])
    return None, name


def matrices(module: nn.Module) -> list[Tensor]:
    """The parameters that the module itself holds, vectors left out."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() >= 2]


def _modules_with_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Tensor]]]:
    for name, module in model.named_modules():
        weights = matrices(module)
        if weights or is_linear(module):
            yield name, module, weights


def _reason_to_skip(
    model: nn.Module, name: str, module: nn.Module, owner: str | None
) -> str | None:
    if module is _call(model, "get_output_embeddings"):
        return "output head" if owner is None else f"output head, tied to {owner}"
    if isinstance(module, nn.Embedding) or module is _call(model, "get_input_embeddings"):
        return "embedding, not a linear module"
    if _is_router(model, name):
        return "router of a mixture of experts: it chooses experts, it does not compute with them"
    if is_linear(module):
        return None if owner is None else f"shares its weight with {owner}, which counts for both"
    return _not_linear(module)


def _not_linear(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"convolution ({kind}), not a linear module"
    if any(weight.dim() >= 3 for weight in matrices(module)):
        return "expert weights are one 3-D parameter, not a linear module"
    return f"its weight is held by a {kind}, which is not a linear module"


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether it, or a module that holds it, is one."""
    parent = model
    for role in name.split("."):
        child = getattr(parent, role)
        if "router" in type(child).__name__.lower() or role == "router":
            return True
        if (role in _ROUTER_ROLES or role.endswith("_gate")) and hasattr(parent, "experts"):
            return True
        parent = child
    return False


def _describe(name: str, module: nn.Module) -> Component:
    layer, inner = split_layer(name)
    role = inner.rpartition(".")[-1]
    if isinstance(module, Conv1D):
        kind, in_features, out_features = "conv1d", module.nx, module.nf
    else:
        kind, in_features, out_features = "linear", module.in_features, module.out_features
    return Component(name, kind, in_features, out_features, layer, role)


def _check_base_model(model: nn.Module) -> None:
    # An injected adapter leaves `peft_config` on the base model, unloading takes it away again.
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"model must be a base model without PEFT adapters, got a {type(model).__name__} with "
            f"adapters {sorted(model.peft_config)}; use it before get_peft_model, or call unload()"
        )


def _call(model: nn.Module, method: str) -> nn.Module | None:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
