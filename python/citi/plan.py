"""The plan: which components get MOLoRA adapters, and which are trained whole in stage 3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from citi.components import find_components
from citi.durable import write_json
from citi.fingerprint import differing_fields, model_fingerprint
from citi.importance.ability_scores import AbilityScores
from citi.saved_json import SavedFileError, read_object
from citi.shares import num_least, num_most

FORMAT, VERSION = "citi.plan", 1
_TYPES = {
    "important": list,
    "unimportant": list,
    "overlap": list,
    "important_share": float,
    "unimportant_share": float,
    "num_components": int,
    "estimator": str,
    "fingerprint": dict,
}


@dataclass(frozen=True)
class Plan:
    """Which components are important for tools, and which are unimportant for general abilities.

    Attributes:
        important: full names, ascending by (M_h, name); they get MOLoRA adapters.
        unimportant: full names, ascending by (C_h, name), without those that are important; they
            are trained whole in stage 3.
        overlap: names that fell in both sets; they stand in `important` only.
        important_share, unimportant_share: shares asked for.
        num_components: of the model.
        estimator: of the scores.
        fingerprint: of the model, see `citi.fingerprint.model_fingerprint`.
    """

    important: tuple[str, ...]
    unimportant: tuple[str, ...]
    overlap: tuple[str, ...]
    important_share: float
    unimportant_share: float
    num_components: int
    estimator: str
    fingerprint: dict[str, str | int]

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON in one step; equal plans give equal bytes.

        Raises: citi.durable.WriteError with the path.
        """
        fields = asdict(self) | {"fingerprint": dict(sorted(self.fingerprint.items()))}
        write_json(path, {"format": FORMAT, "version": VERSION, **fields})

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Inverse of `save`. A plan may be edited by hand, within its rules.

        Raises:
            citi.saved_json.SavedFileError: missing, cut short, another version, unknown keys, or a
                plan that contradicts itself; names the file.
        """
        fields = read_object(path, file_format=FORMAT, version=VERSION, types=_TYPES)
        for key in ("important", "unimportant", "overlap"):
            fields[key] = tuple(fields[key])
        plan = cls(**fields)
        problem = plan._contradiction()
        if problem is not None:
            raise SavedFileError(path, problem)
        return plan

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            ValueError: names what differs: the model's type, components or weights, or a component
                of the plan that the model lacks.
        """
        got = model_fingerprint(model)
        differing = differing_fields(self.fingerprint, got)
        if differing:
            listed = ", ".join(
                f"{key} (plan {self.fingerprint.get(key)}, model {got.get(key)})"
                for key in differing
            )
            raise ValueError(
                f"model must be the one that the plan was made for, got one that differs in "
                f"{listed}; score this model and make a new plan"
            )
        known = {component.name for component in find_components(model)[0]}
        unknown = [name for name in (*self.important, *self.unimportant) if name not in known]
        if unknown:
            raise ValueError(f"the plan names components that model lacks: {unknown}; correct them")

    def _contradiction(self) -> str | None:
        names = (*self.important, *self.unimportant)
        if not all(isinstance(name, str) for name in (*names, *self.overlap)):
            return "must name components by strings"
        if len(set(names)) != len(names):
            return "names a component twice"
        if not set(self.overlap) <= set(self.important):
            return "lists under overlap what is not important"
        if len(names) > self.num_components:
            return f"names {len(names)} components of {self.num_components}"
        shares = (self.important_share, self.unimportant_share)
        if not all(0 <= share <= 1 for share in shares):
            return f"must have shares between 0 and 1, got {shares}"
        return None


def make_plan(scores: AbilityScores, important: float = 0.20, unimportant: float = 0.10) -> Plan:
    """Choose the important and the unimportant components.

        by M_h ascending:  important   = order[int((1 - share) * n):]
        by C_h ascending:  unimportant = order[:int(share * n)], without the important ones

    Ties are broken by name, so that equal scores give an equal plan. A component that scores 0
    because nothing reached it (see `skipped` of the scores) is never unimportant: its importance
    is not known, as where a model reads its weight without calling it.

    Args:
        scores: of the tool ability and, unless `unimportant` is 0, of general ones.
        important: share of all components, 0 to 1.
        unimportant: share of all components, 0 to 1.

    Returns:
        the plan, with the components that fell in both sets under `overlap`.

    Raises:
        ValueError: a share outside 0 to 1, a score that is NaN or infinite (names the component),
            or no general ability to choose unimportant components by.

    Source: arXiv 2409.13202 and the authors' code for the rounding; MOLoRA wins an overlap.
    """
    shares = {"important": important, "unimportant": unimportant}
    for name, share in shares.items():
        if not (isinstance(share, (int, float)) and math.isfinite(share) and 0 <= share <= 1):
            raise ValueError(f"{name} must be a share between 0 and 1, got {share!r}")
    num_components = len(scores.tool)
    by_tool = _ascending(scores.tool_importance)
    chosen = by_tool[num_components - num_most(num_components, important) :]
    num_unimportant = num_least(num_components, unimportant)
    least = _known_ascending(scores)[:num_unimportant] if num_unimportant else []
    return Plan(
        important=tuple(chosen),
        unimportant=tuple(name for name in least if name not in set(chosen)),
        overlap=tuple(name for name in least if name in set(chosen)),
        important_share=float(important),
        unimportant_share=float(unimportant),
        num_components=num_components,
        estimator=scores.estimator,
        fingerprint=dict(scores.fingerprint),
    )


def _known_ascending(scores: AbilityScores) -> list[str]:
    """By general importance, without the components that no ability's scoring reached."""
    unknown = {
        module.name
        for ability in scores.abilities.values()
        for module in ability.skipped
        if module.name in ability
    }
    return [name for name in _ascending(scores.general_importance) if name not in unknown]


def _ascending(importance: Mapping[str, float]) -> list[str]:
    return sorted(importance, key=lambda name: (importance[name], name))
