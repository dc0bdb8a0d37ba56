"""Importance of every component for the tool ability and for general ones, from data files."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as bytes_from_tensors
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from citi.components import SkippedModule
from citi.durable import write_bytes, write_json
from citi.fingerprint import model_fingerprint
from citi.importance import ESTIMATORS, ComponentScores, Progress, component_importance
from citi.saved_json import SavedFileError, check_types, content_sha256, read_object

if TYPE_CHECKING:
    from citi.data import Sample

FORMAT, VERSION = "citi.ability_scores", 1
_TYPES = {
    "estimator": str,
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
        ValueError: the abilities differ in components or estimator.
    """

    tool: ComponentScores
    general: dict[str, ComponentScores]
    fingerprint: dict[str, str | int]

    def __post_init__(self) -> None:
        for name, scores in self.general.items():
            if list(scores) != list(self.tool) or scores.estimator != self.tool.estimator:
                raise ValueError(
                    f"general[{name!r}] must score the components of tool with its estimator "
                    f"({len(self.tool)}, {self.tool.estimator}), got {len(scores)} and "
                    f"{scores.estimator}; score all abilities of one model in one call"
                )

    @property
    def estimator(self) -> str:
        """The estimator that all abilities were scored with."""
        return self.tool.estimator

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
        """Write `prefix`.safetensors (fp64 scores) and then `prefix`.json (everything else).

        Equal scores give equal bytes. Each file is replaced in one step; a hash in the second
        proves that the two belong together. Raises: citi.durable.WriteError with the path.
        """
        tensors = bytes_from_tensors(
            {
                key: torch.tensor(list(scores.values()), dtype=torch.float64)
                for key, scores in self._keyed().items()
            }
        )
        content = {
            "estimator": self.estimator,
            "fingerprint": dict(sorted(self.fingerprint.items())),
            "components": list(self.tool),
            "tool": _describe(self.tool),
            "general": {name: _describe(scores) for name, scores in self.general.items()},
            "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
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
        abilities = {"tool": content["tool"]} | {
            _key(name): ability for name, ability in content["general"].items()
        }
        for key, ability in abilities.items():
            check_types(path, key, ability, _ABILITY_TYPES)
        tensors = _read_tensors(
            _with_suffix(prefix, ".safetensors"),
            content["tensors_sha256"],
            keys=abilities.keys(),
            num_components=len(content["components"]),
        )
        restored = {
            key: _restore(content, ability, tensors[key]) for key, ability in abilities.items()
        }
        return cls(
            tool=restored["tool"],
            general={name: restored[_key(name)] for name in content["general"]},
            fingerprint=content["fingerprint"],
        )

    def plot(self, path: str | Path) -> None:
        """Draw the heat maps of tool and general importance, layer by component, into a file.

        Args:
            path: its suffix chooses the format: .png, .svg or .pdf.

        Raises:
            ImportError: matplotlib is missing; names the extra to install.
        """
        from citi.importance_picture import draw_importance

        panels = {"tool": self.tool_importance}
        if self.general:
            number = len(self.general)
            panels["general"] = {k: v / number for k, v in self.general_importance.items()}
        draw_importance(path, panels)

    def _keyed(self) -> dict[str, ComponentScores]:
        return {"tool": self.tool} | {_key(name): scores for name, scores in self.general.items()}


def score_components(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tool: str | Path | Sequence[Sample],
    general: Mapping[str, str | Path | Sequence[Sample]] | Iterable[str | Path],
    max_samples: int | None = 256,
    estimator: str = "token",
    batch_size: int = 1,
    max_length: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> AbilityScores:
    """Score a model's components for the tool ability and for general ones.

    Args:
        model: a `transformers` causal LM without PEFT adapters.
        tokenizer: its tokenizer, with a chat template.
        tool: data file (any format that `citi.read_samples` knows), or samples.
        general: ability name -> data file or samples; or data files, which name the abilities.
        max_samples: at most so many per ability, chosen by `seed`; None takes all.
        estimator: "token", "batch" or "parameter", see `citi.component_importance`.
        batch_size: sequences per micro-batch; changes `batch` and `parameter` scores.
        max_length: tokens per sample; longer prompts are cut at the front.
        seed: of the choice of samples.
        progress: called as `progress(done, total, "ability: ...")` after every batch.

    Returns:
        the scores with the model's fingerprint. The loss is on each sample's last assistant turn.

    Raises:
        ValueError: unknown estimator, two abilities of one name, or as `component_importance`.
        citi.data.DataError: a data file cannot be read, or holds nothing to score.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    fingerprint = model_fingerprint(model)
    score = partial(
        _score_ability,
        model,
        tokenizer,
        max_samples=max_samples,
        estimator=estimator,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        progress=progress,
    )
    abilities = _named(general)
    tool_scores = score("tool", tool, task_type=1)
    general_scores = {name: score(name, data, task_type=0) for name, data in abilities.items()}
    return AbilityScores(tool_scores, general_scores, fingerprint)


def _score_ability(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    data: str | Path | Sequence[Sample],
    *,
    task_type: int,
    max_samples: int | None,
    estimator: str,
    batch_size: int,
    max_length: int,
    seed: int,
    progress: Progress | None,
) -> ComponentScores:
    from citi.data import Collator, RenderedDataset, read_samples

    if isinstance(data, (str, Path)):
        data = read_samples(data, task_type=task_type, max_samples=max_samples, seed=seed)
    elif max_samples is not None and max_samples < len(data):
        chosen = random.Random(seed).sample(range(len(data)), max_samples)
        data = [data[index] for index in sorted(chosen)]
    batches = DataLoader(
        RenderedDataset(data, tokenizer, max_length=max_length),
        batch_size=batch_size,
        collate_fn=Collator(_padding_id(tokenizer)),
        generator=torch.Generator(),  # the global random state is the caller's
    )
    return component_importance(
        model, batches, estimator=estimator, progress=_prefixed(progress, name)
    )


def _prefixed(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, note: progress(done, total, f"{name}: {note}")


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id does: padding is known by the mask."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def _named(
    general: Mapping[str, str | Path | Sequence[Sample]] | Iterable[str | Path],
) -> dict[str, str | Path | Sequence[Sample]]:
    if isinstance(general, Mapping):
        return dict(general)
    if isinstance(general, (str, Path)):
        raise ValueError(
            f"general must be a list or a mapping, got {general!r}; write [{general!r}]"
        )
    named: dict[str, str | Path | Sequence[Sample]] = {}
    for path in general:
        name = Path(path).name.split(".")[0]
        if name in named:
            raise ValueError(
                f"general must name every ability once, got {named[name]} and {path}; give a "
                "mapping from ability name to file"
            )
        named[name] = path
    return named


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


def _describe(scores: ComponentScores) -> dict[str, object]:
    obj = scores.to_json()
    return {key: obj[key] for key in _ABILITY_TYPES}


def _restore(
    content: Mapping[str, object], ability: Mapping[str, object], values: torch.Tensor
) -> ComponentScores:
    return ComponentScores(
        scores=dict(zip(content["components"], values.tolist(), strict=True)),
        estimator=content["estimator"],
        skipped=tuple(SkippedModule(**module) for module in ability["skipped"]),
        **{key: ability[key] for key in _COUNTS},
    )


def _read_tensors(
    path: Path, sha256: str, *, keys: Iterable[str], num_components: int
) -> dict[str, torch.Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SavedFileError(path, f"cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SavedFileError(path, "is not the file that its .json was written with")
    try:
        tensors = tensors_from_bytes(data)
    except SafetensorError as error:
        raise SavedFileError(path, f"is no safetensors file ({error})") from error
    if tensors.keys() != set(keys):
        raise SavedFileError(path, f"must hold {sorted(keys)}, got {sorted(tensors)}")
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float64 or tensor.shape != (num_components,):
            raise SavedFileError(
                path,
                f"must hold {key} as {num_components} fp64 numbers, got "
                f"{tuple(tensor.shape)} of {tensor.dtype}",
            )
    return tensors


def _key(name: str) -> str:
    return f"general.{name}"


def _with_suffix(prefix: str | Path, suffix: str) -> Path:
    return Path(f"{prefix}{suffix}")
