"""manifest.json: which phases of a run are finished, and for which recipe and data.

A phase is recorded after its files are on the disk, so a phase that stands here is whole, whenever
the run was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from citi.durable import write_json

FORMAT = 1


class ManifestError(ValueError):
    """A manifest that cannot be read; the message has its path."""


@dataclass
class Manifest:
    """The state of a run, written back to its file by `record`.

    Attributes:
        path: The file.
        recipe_sha256: Of the recipe's result-relevant keys.
        data_sha256: `key.name` of a data file → digest of its content.
        phases: Name of a finished phase → facts about it.
        started, finished: UTC times; `finished` is set by the last phase.
    """

    path: Path
    recipe_sha256: str
    data_sha256: dict[str, str]
    phases: dict[str, dict] = field(default_factory=dict)
    started: str = field(default_factory=lambda: _now())
    finished: str | None = None

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """The manifest at `path`, or None when there is none.

        Raises: ManifestError for anything but a manifest of this format.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ManifestError(f"{path} is not JSON: {error}; choose another output") from error
        wanted = {
            "format": int,
            "recipe_sha256": str,
            "data_sha256": dict,
            "phases": dict,
            "started": str,
            "finished": str | None,
        }
        if not isinstance(content, dict) or set(content) != set(wanted):
            raise ManifestError(f"{path}: wanted the keys {', '.join(wanted)}, got {content!r:.80}")
        for key, kind in wanted.items():
            if not isinstance(content[key], kind):
                raise ManifestError(f"{path}: {key} has the wrong type, got {content[key]!r:.80}")
        if content.pop("format") != FORMAT:
            raise ManifestError(f"{path} has another format than {FORMAT}; use the citi of its run")
        return cls(path=path, **content)

    def save(self) -> None:
        """Write the file in one step. Raises: WriteError."""
        content = {
            "format": FORMAT,
            "recipe_sha256": self.recipe_sha256,
            "data_sha256": self.data_sha256,
            "phases": self.phases,
            "started": self.started,
            "finished": self.finished,
        }
        write_json(self.path, content)

    def record(self, phase: str, facts: Mapping[str, object], *, ends_run: bool = False) -> None:
        """Note that `phase` is finished; its files must be on the disk. Raises: WriteError."""
        self.phases[phase] = {"finished": _now(), **facts}
        if ends_run:
            self.finished = self.phases[phase]["finished"]
        self.save()


def digest_of(content: object) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_files(files: Mapping[str, Path]) -> dict[str, str]:
    """sha256 of each file's content."""
    digests = {}
    for name, path in files.items():
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
