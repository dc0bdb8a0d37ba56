"""Importance of every component for the tool ability and for general ones, and its files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from citi.components import SkippedModule
from citi.durable import write_bytes, write_json
from citi.importance.component_scores import ComponentScores
from citi.importance.score_tensors import bytes_of, read_tensors, sha256_of
from citi.saved_json import SavedFileError, check_types, content_sha256, read_object

FORMAT, VERSION = "citi.ability_scores", 2
_TYPES = {
    "estimator": str,
    "granularity": str,
    "fingerprint": dict,
    "components": list,
    "tool": dict,
    "general": dict,
    "tensors_sha256": str,
    "sha256": str,
}
_COUNTS = (
    "num_samples",
    "num_tokens",
    "num_answer_tokens",
    "num_batches",
    "num_empty_batches",
    "num_nonfinite_batches",
)
_ABILITY_TYPES = {**dict.fromkeys(_COUNTS, int), "skipped": list}


@dataclass(frozen=True)
class AbilityScores:
    """Component scores of one model for the tool ability and for general abilities.

    Attributes:
        tool: scores on the tool data.
        general: ability name -> scores; may be empty.
        fingerprint: the model's, see `citi.fingerprint.model_fingerprint`.

    Raises:
        ValueError: the abilities differ in components, estimator or granularity.
    """

    tool: ComponentScores
    general: dict[str, ComponentScores]
    fingerprint: dict[str, str | int]

    def __post_init__(self) -> None:
        for name, scores in self.general.items():
            wanted, got = _kind(self.tool), _kind(scores)
            if list(scores) != list(self.tool) or got != wanted:
                raise ValueError(
                    f"general[{name!r}] must score the components of tool in its way "
                    f"({len(self.tool)}, {wanted}), got {len(scores)} and {got}; score all "
                    "abilities of one model in one call"
                )

    @property
    def estimator(self) -> str:
        """The estimator that all abilities were scored with."""
        return self.tool.estimator

    @property
    def granularity(self) -> str:
        """The granularity that all abilities were scored at."""
        return self.tool.granularity

    @property
    def abilities(self) -> dict[str, ComponentScores]:
        """All of them by name, "tool" first."""
        return {"tool": self.tool} | self.general

    @property
    def tool_importance(self) -> dict[str, float]:
        """M_h = I_h(tool) / Σ_i I_i(tool); sums to 1.

        Raises: ValueError naming the component whose score is NaN or infinite, or if all are 0.
        """
        return _shares("tool", self.tool)

    @property
    def general_importance(self) -> dict[str, float]:
        """C_h = Σ_t I_h(t) / Σ_i I_i(t) over the general abilities t; sums to their number.

        Raises: ValueError as `tool_importance`, or without general abilities.
        """
        if not self.general:
            raise ValueError(
                "general must hold at least one ability, got none; score with general=[...]"
            )
        shares = [_shares(name, scores) for name, scores in self.general.items()]
        # fsum is exact, so that the order of the abilities cannot change a plan.
        return {name: math.fsum(share[name] for share in shares) for name in self.tool}

    def save(self, prefix: str | Path) -> None:
        """Write `prefix`.safetensors (all numbers) and then `prefix`.json (everything else).

        The tensors are `tool` and `general.NAME` (components,) fp64; with `/by_batch` and
        `/batch_counts` added, those of `ComponentScores`; with `/COMPONENT` added, the entries
        (P, Q) of a finer granularity. Equal scores give equal bytes. Each file is replaced in one
        step; a hash in the second proves that the two belong together.

        Raises: citi.durable.WriteError with the path.
        """
        tensors = bytes_of(self._keyed())
        content = {
            "estimator": self.estimator,
            "granularity": self.granularity,
            "fingerprint": dict(sorted(self.fingerprint.items())),
            "components": list(self.tool),
            "tool": _describe(self.tool),
            "general": {name: _describe(scores) for name, scores in self.general.items()},
            "tensors_sha256": sha256_of(tensors),
        }
        header = {"format": FORMAT, "version": VERSION}
        write_bytes(_with_suffix(prefix, ".safetensors"), tensors)
        write_json(
            _with_suffix(prefix, ".json"), header | content | {"sha256": content_sha256(content)}
        )

    @classmethod
    def load(cls, prefix: str | Path) -> AbilityScores:
        """Inverse of `save`.

        Raises:
            citi.saved_json.SavedFileError: a file is missing, cut short, changed, of another
                version, or not the other one's partner; names the file.
        """
        path = _with_suffix(prefix, ".json")
        content = read_object(path, file_format=FORMAT, version=VERSION, types=_TYPES)
        if content.pop("sha256") != content_sha256(content):
            raise SavedFileError(path, "was changed after it was written")
        described = {"tool": content["tool"]} | {
            _key(name): ability for name, ability in content["general"].items()
        }
        for key, ability in described.items():
            check_types(path, key, ability, _ABILITY_TYPES)
        tensors = read_tensors(
            _with_suffix(prefix, ".safetensors"),
            content["tensors_sha256"],
            abilities=described.keys(),
            components=content["components"],
            has_entries=content["granularity"] != "component",
        )
        restored = {
            key: ComponentScores(
                estimator=content["estimator"],
                granularity=content["granularity"],
                skipped=tuple(SkippedModule(**module) for module in ability["skipped"]),
                **{count: ability[count] for count in _COUNTS},
                **tensors[key],
            )
            for key, ability in described.items()
        }
        return cls(
            tool=restored["tool"],
            general={name: restored[_key(name)] for name in content["general"]},
            fingerprint=content["fingerprint"],
        )

    def plot(self, path: str | Path) -> None:
        """Draw the heat maps of tool and general importance, layer by component, into a file.

        At granularity "head", layer by head of every attention projection.

        Args:
            path: its suffix chooses the format: .png, .svg or .pdf.

        Raises:
            ImportError: matplotlib is missing; names the extra to install.
        """
        from citi.importance.picture import draw_head_importance, draw_importance

        panels = {"tool": self.tool_importance}
        if self.general:
            number = len(self.general)
            panels["general"] = {k: v / number for k, v in self.general_importance.items()}
        if self.granularity != "head":
            draw_importance(path, panels)
            return
        abilities = {"tool": [self.tool], "general": [*self.general.values()]}
        draw_head_importance(path, {kind: _head_shares(abilities[kind]) for kind in panels})

    def _keyed(self) -> dict[str, ComponentScores]:
        return {"tool": self.tool} | {_key(name): scores for name, scores in self.general.items()}


def _shares(ability: str, scores: ComponentScores) -> dict[str, float]:
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(
                f"the {ability} score of {name} must be finite, got {score}; score the data again"
            )
    total = math.fsum(scores.values())
    if total <= 0:
        raise ValueError(
            f"the {ability} scores must not all be 0, got {len(scores)} zeros; the data reach no "
            "component"
        )
    return {name: score / total for name, score in scores.items()}


def _head_shares(abilities: Sequence[ComponentScores]) -> dict[str, list[float]]:
    """Every head's share of the total, mean over the abilities."""
    totals = [math.fsum(scores.values()) for scores in abilities]
    return {
        name: sum(
            scores.entries[name].flatten() / (total * len(abilities))
            for scores, total in zip(abilities, totals, strict=True)
        ).tolist()
        for name in abilities[0]
    }


def _kind(scores: ComponentScores) -> str:
    return f"{scores.estimator} by {scores.granularity}"


def _describe(scores: ComponentScores) -> dict[str, object]:
    skipped = [asdict(module) for module in scores.skipped]
    return {count: getattr(scores, count) for count in _COUNTS} | {"skipped": skipped}


def _key(name: str) -> str:
    return f"general.{name}"


def _with_suffix(prefix: str | Path, suffix: str) -> Path:
    return Path(f"{prefix}{suffix}")
