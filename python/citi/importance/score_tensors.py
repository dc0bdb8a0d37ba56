"""The numbers of component scores as one safetensors file.

KEY                 (components,) fp64
KEY/by_batch        (batches, components) fp64; (0, 0) for elements
KEY/batch_counts    (batches, 3) int64
KEY/COMPONENT       (P, Q), the entries of a granularity finer than the component
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from citi.importance.component_scores import ComponentScores
from citi.saved_json import SavedFileError

_BATCHES = ("by_batch", "batch_counts")


def bytes_of(scores_by_key: Mapping[str, ComponentScores]) -> bytes:
    """The file's content; equal scores give equal bytes."""
    tensors: dict[str, Tensor] = {}
    for key, scores in scores_by_key.items():
        tensors[key] = torch.tensor(list(scores.values()), dtype=torch.float64)
        tensors |= {f"{key}/{name}": getattr(scores, name).contiguous() for name in _BATCHES}
        tensors |= {f"{key}/{name}": t.contiguous() for name, t in scores.entries.items()}
    return save(tensors)


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_tensors(
    path: Path,
    sha256: str,
    *,
    abilities: Iterable[str],
    components: Sequence[str],
    has_entries: bool,
) -> dict[str, dict[str, Any]]:
    """Ability key -> the fields of `ComponentScores` that are numbers.

    Raises: SavedFileError naming the file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SavedFileError(path, f"cannot be read: {error.strerror}") from error
    if sha256_of(data) != sha256:
        raise SavedFileError(path, "is not the file that its .json was written with")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise SavedFileError(path, f"is no safetensors file ({error})") from error
    parts = [*_BATCHES, *(components if has_entries else ())]
    wanted = {key for a in abilities for key in (a, *(f"{a}/{part}" for part in parts))}
    if tensors.keys() != wanted:
        differing = sorted(tensors.keys() ^ wanted)
        raise SavedFileError(path, f"lacks, or should not hold, {', '.join(differing[:5])}")
    fields = {}
    for key in abilities:
        scores = tensors[key]
        if scores.dtype != torch.float64 or scores.shape != (len(components),):
            raise SavedFileError(
                path,
                f"must hold {key} as {len(components)} fp64 numbers, got "
                f"{tuple(scores.shape)} of {scores.dtype}",
            )
        fields[key] = {
            "scores": dict(zip(components, scores.tolist(), strict=True)),
            "entries": {n: tensors[f"{key}/{n}"] for n in components} if has_entries else {},
            **{name: tensors[f"{key}/{name}"] for name in _BATCHES},
        }
    return fields
