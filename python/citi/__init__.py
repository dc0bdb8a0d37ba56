"""CITI: tool use for a language model without making it worse at everything else.

The PEFT method `molora` is registered as soon as `peft` is there too, now or when it is imported
later, so that `PeftModel.from_pretrained` finds it. Every public name is loaded when it is first
used: `import citi` alone loads neither torch nor PEFT, which take seconds.
Source: arXiv 2409.13202.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook

_HOMES = {
    "citi.adapters": (
        "AdapterError",
        "MoLoraConfig",
        "MoLoraLinear",
        "MoLoraModel",
        "load_adapter",
        "routing_names",
        "without_adapters",
    ),
    "citi.components": ("Component", "SkippedModule", "find_components"),
    "citi.data": ("Collator", "DataError", "RenderedDataset", "Sample", "mix", "read_samples"),
    "citi.evaluation": ("EvalResult", "EvalSettings", "comparison_table", "evaluate"),
    "citi.export": ("ExportResult", "convert_to_lora", "export_run", "mean_gates"),
    "citi.fingerprint": ("model_fingerprint",),
    "citi.importance": (
        "BatchCounts",
        "ComponentScores",
        "ImportanceRecorder",
        "component_importance",
    ),
    "citi.importance.ability_scores": ("AbilityScores",),
    "citi.importance.score_components": ("score_components",),
    "citi.importance.stability": ("RankingStability", "ranking_stability"),
    "citi.observer": ("RunObserver",),
    "citi.plan": ("Plan", "make_plan"),
    "citi.recipe": ("Recipe", "RecipeError", "load_recipe"),
    "citi.run": ("evaluate_run", "load_run", "train"),
    "citi.run_directory": ("RunDirectory", "RunError"),
    "citi.stages": ("STAGES", "Stage", "apply_stage"),
    "citi.trainer": ("CitiTrainer", "RouterLossMixin", "TrainingError"),
    "citi.verify": ("Finding", "verify_run"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.6.0"
__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'citi' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


def _register_molora(_peft: ModuleType) -> None:
    importlib.import_module("citi.adapters")


register_post_import_hook(_register_molora, "peft")
