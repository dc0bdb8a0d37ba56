"""Case 59: what users' code and files rest on changes with a version, never by the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

import citi
import citi_kernels
from citi.adapters import MoLoraConfig
from citi.evaluation import EvalResult
from citi.gates import GateSummary
from citi.importance import ComponentScores
from citi.plan import Plan
from citi.recipe import Recipe

FROZEN = Path(__file__).with_name("public_interface.json")


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _interface() -> dict[str, object]:
    names = ("molora_linear", "molora_linear_group")
    ops = [name for each in names for name in (each, f"{each}_backward")]
    ops += ["accumulate_row_dots_", "accumulate_parameter_scores_"]
    return {
        "version": citi.__version__,
        "citi_kernels": sorted(citi_kernels.__all__),
        "citi": sorted(citi.__all__),
        "ops": [str(getattr(torch.ops.citi, op).default._schema) for op in ops],
        "recipe": _fields(Recipe),
        "adapter_config": sorted(set(_fields(MoLoraConfig)) - {"peft_type", "peft_version"}),
        "plan": _fields(Plan),
        "component_scores": _fields(ComponentScores),
        "eval_result": _fields(EvalResult),
        "gates": _fields(GateSummary),
    }


def test_case_59_names_schemas_and_keys_are_frozen() -> None:
    interface, frozen = _interface(), json.loads(FROZEN.read_text(encoding="utf-8"))
    changed = [key for key in interface if interface[key] != frozen.get(key)]
    assert not changed, (
        f"{', '.join(changed)} changed: bump the version in pyproject.toml and citi/__init__.py, "
        f"and write what is now public to {FROZEN.name}:\n{json.dumps(interface, indent=2)}"
    )


def test_every_public_name_is_there() -> None:
    for module in (citi, citi_kernels):
        for name in module.__all__:
            assert getattr(module, name) is not None
