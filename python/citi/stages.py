"""The three training stages as data, and the one function that makes a model ready for one.

| stage | trained | learning rate | epochs |
| --- | --- | --- | --- |
| RP, router pre-training | routers | 2e-4 | 1 |
| MI, MOLoRA improvement | routers and experts | 2e-4 | 2 |
| UCO, unimportant components optimisation | the unimportant components | 2e-5 | 1 |

(arXiv 2409.13202, section 4.) Each stage is a Trainer run of its own with an optimizer of its own.
To add a stage: add a `Stage` here, its epochs and rate to the recipe, and its phase to `citi.run`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

ROUTER, EXPERTS, UNIMPORTANT, LORA = "router", "experts", "unimportant", "lora"
_GROUP_OF_PART = {
    "molora_router": ROUTER,
    "molora_A": EXPERTS,
    "molora_B": EXPERTS,
    "lora_A": LORA,
    "lora_B": LORA,
    "modules_to_save": UNIMPORTANT,
}
_HALF = (torch.float16, torch.bfloat16)


class StageError(ValueError):
    """A stage cannot run on this model, or the model trains something else than the stage says."""


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        name: Key in file names, metrics and the manifest.
        title: What a person reads.
        directory: Folder of its adapter inside a run directory.
        trains: Parameter groups it trains: "router", "experts", "unimportant"; "lora" for PEFT's
            plain LoRA, which is no part of CITI.
        learning_rate: Peak of the cosine schedule.
        epochs: Passes over the mixed data.
    """

    name: str
    title: str
    directory: str
    trains: frozenset[str]
    learning_rate: float
    epochs: float


RP = Stage("rp", "router pre-training", "stage1_rp", frozenset({ROUTER}), 2e-4, 1.0)
MI = Stage("mi", "MOLoRA improvement", "stage2_mi", frozenset({ROUTER, EXPERTS}), 2e-4, 2.0)
UCO = Stage(
    "uco",
    "unimportant components optimisation",
    "stage3_uco",
    frozenset({UNIMPORTANT}),
    2e-5,
    1.0,
)
STAGES = (RP, MI, UCO)


def parameter_group(name: str, adapter: str = "default") -> str | None:
    """The group of a parameter by its full name; None for the frozen rest and other adapters.

    Names are `….molora_A.<adapter>` and `….modules_to_save.<adapter>.weight`.
    """
    parts = name.split(".")
    for part, follower in itertools.pairwise(parts):
        if part in _GROUP_OF_PART and follower == adapter:
            return _GROUP_OF_PART[part]
    return None


def stage_parameters(model: nn.Module, stage: Stage, adapter: str = "default") -> list[str]:
    """Names of the parameters that `stage` trains, in model order; may be empty."""
    return [
        name
        for name, _ in model.named_parameters()
        if parameter_group(name, adapter) in stage.trains
    ]


def skip_reason(model: nn.Module, stage: Stage, adapter: str = "default") -> str | None:
    """Why `stage` has nothing to do on this model; None when it must run.

    Only UCO may be empty: a plan with an unimportant share of 0, or one whose unimportant
    components all got MOLoRA. A stage without routers or experts is an error (`apply_stage`).
    """
    if stage.epochs == 0:
        return "its epochs are 0"
    if stage.trains == {UNIMPORTANT} and not stage_parameters(model, stage, adapter):
        return "the plan unfreezes no unimportant component"
    return None


def apply_stage(model: nn.Module, stage: Stage, adapter: str = "default") -> list[str]:
    """Set `requires_grad` so that exactly the stage's parameters train.

    Args:
        model: A PEFT model with a MOLoRA or LoRA adapter.
        stage: Which groups train; every other parameter is frozen.
        adapter: Name of the adapter.
    Returns:
        Names of the trainable parameters, in model order.
    Raises:
        StageError: A group that the stage trains has no parameter in the model. Nothing was
            changed.
    """
    groups = {name: parameter_group(name, adapter) for name, _ in model.named_parameters()}
    missing = sorted(stage.trains - set(groups.values()))
    if missing:
        found = sorted({group for group in groups.values() if group}) or ["none"]
        raise StageError(
            f"stage {stage.name} trains {', '.join(sorted(stage.trains))}, but adapter "
            f"{adapter!r} has no {' and no '.join(missing)} parameters (found: {', '.join(found)});"
            " was the model built with get_peft_model(model, MoLoraConfig.from_plan(plan))?"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(groups[name] in stage.trains)
    return [name for name, group in groups.items() if group in stage.trains]


def check_trainable(model: nn.Module, expected: list[str], when: str) -> None:
    """Raise StageError unless exactly the parameters named in `expected` require gradients."""
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    extra, missing = sorted(found - set(expected)), sorted(set(expected) - found)
    if extra or missing:
        raise StageError(
            f"{when}: {len(extra)} parameters train that must not {extra[:3]}, and {len(missing)} "
            f"that must train are frozen {missing[:3]}"
        )


def raise_trainables_to_fp32(model: nn.Module) -> list[str]:
    """Turn trainable fp16 and bf16 parameters into fp32 masters, in place.

    A GradScaler refuses fp16 gradients, and an update of 1e-5 of a bf16 weight rounds to nothing.
    PEFT makes adapters fp32 but leaves `modules_to_save` copies in the base's dtype. Such a model
    runs under autocast.

    Returns:
        Names of the parameters that were raised.
    """
    raised = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in _HALF:
            parameter.data = parameter.data.float()
            raised.append(name)
    return raised


def lower_to_base_dtype(model: nn.Module) -> None:
    """Cast every `modules_to_save` copy to the dtype of the base module it stands for, in place."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtypes = {name: p.dtype for name, p in module.original_module.named_parameters()}
            for copy in module.modules_to_save.values():
                for name, parameter in copy.named_parameters():
                    parameter.data = parameter.data.to(dtypes[name])
