"""Which Trainer checkpoints are whole.

The Trainer writes the files of a checkpoint one after the other, in place. A seal, written last,
lists them with their sizes: a checkpoint that was killed at any write has no seal or does not fit
it, and is never resumed from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from citi.durable import write_json

SEAL = "complete.json"


def seal_checkpoint(folder: str | Path, step: int, *, stage: str | None) -> None:
    """Flush the files of `folder`/checkpoint-`step` to the disk and list them in its seal.

    Raises: WriteError when the seal cannot be written.
    """
    checkpoint = Path(folder, f"checkpoint-{step}")
    for path in _files(checkpoint):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in _files(checkpoint)}
    write_json(checkpoint / SEAL, {"format": 1, "stage": stage, "step": step, "files": sizes})


def is_complete(checkpoint: str | Path) -> bool:
    """Whether the seal is there and every file it lists has its size."""
    seal = _read_seal(checkpoint)
    if seal is None:
        return False
    files = {name: Path(checkpoint, name) for name in seal["files"]}
    return all(
        path.is_file() and path.stat().st_size == seal["files"][name]
        for name, path in files.items()
    )


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, or None."""
    complete = [path for path in _checkpoints(folder) if is_complete(path)]
    return max(complete, key=_step, default=None)


def discard_incomplete(folder: str | Path) -> list[Path]:
    """Remove what a killed save left in `folder`.

    Returns: The checkpoints that were removed.
    """
    removed = [path for path in _checkpoints(folder) if not is_complete(path)]
    for path in removed:
        shutil.rmtree(path)
    return removed


def discard_older(folder: str | Path) -> None:
    """Remove the checkpoints before the last complete one."""
    last = last_complete_checkpoint(folder)
    for path in _checkpoints(folder):
        if last is not None and _step(path) < _step(last):
            shutil.rmtree(path)


def checkpoint_stage(checkpoint: str | Path) -> str | None:
    """Name of the stage that saved it; None when it carries no seal, or no stage."""
    seal = _read_seal(checkpoint)
    return seal["stage"] if seal else None


def checkpoint_step(checkpoint: str | Path) -> int:
    """The optimizer step in its name."""
    return _step(Path(checkpoint))


def _checkpoints(folder: str | Path) -> list[Path]:
    if not Path(folder).is_dir():
        return []
    return [p for p in Path(folder).iterdir() if re.fullmatch(r"checkpoint-\d+", p.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _files(checkpoint: Path) -> list[Path]:
    return sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != SEAL)


def _read_seal(checkpoint: str | Path) -> dict | None:
    try:
        seal = json.loads(Path(checkpoint, SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_seal = isinstance(seal, dict) and seal.get("format") == 1 and "stage" in seal
    return seal if is_seal and isinstance(seal.get("files"), dict) else None
