"""The accumulators of a scoring that is under way, in one file, so that a kill costs a minute."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import Dataset

from citi.durable import write_bytes
from citi.importance.totals import ScoreTotals
from citi.saved_json import SavedFileError, content_sha256

FORMAT, VERSION = "citi.scoring_progress", 1
SECONDS_BETWEEN_SAVES = 60.0


class ScoringProgress:
    """Keeps the totals of all abilities in a safetensors file, with the settings they belong to.

    Args:
        path: the file; need not be there.
        settings: JSON types; what must be the same for the totals to go on.
        totals: ability -> totals, all of one kind.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], totals: Mapping[str, ScoreTotals]
    ) -> None:
        self.path, self.totals = path, totals
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self._saved_at = time.monotonic()
        self._saved_batches: list[int] | None = None

    def restore(self) -> bool:
        """Put what the file holds into the totals; False if there is none.

        Raises:
            ValueError: it belongs to another scoring; says in what it differs.
            SavedFileError: it is damaged.
        """
        if not self.path.exists():
            return False
        header, tensors = self._read()
        if header["settings"] != self.settings:
            theirs, ours = header["settings"], self.settings
            differing = sorted(k for k in theirs.keys() | ours if theirs.get(k) != ours.get(k))
            raise ValueError(
                f"{self.path} holds the progress of another scoring: it differs in "
                f"{', '.join(differing)}; remove it to start over, or score as before"
            )
        try:
            for index, (name, totals) in enumerate(self.totals.items()):
                prefix = f"{index}/"
                own = {
                    k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)
                }
                totals.restore(header["abilities"][name], own)
        except (KeyError, TypeError, ValueError) as error:
            raise SavedFileError(self.path, f"is damaged ({error!r})") from error
        self._saved_batches = self._num_seen()
        return True

    def save_now_and_then(self) -> None:
        """`save`, if the last one was a minute ago."""
        if time.monotonic() - self._saved_at >= SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Write the file in one step, unless it holds the same.

        Totals that an interruption left with a part of a batch are not written: what was saved
        last stands. Raises: WriteError.
        """
        is_whole = all(totals.is_whole for totals in self.totals.values())
        if not is_whole or self._saved_batches == self._num_seen():
            return
        described, tensors = {}, {}
        for index, (name, totals) in enumerate(self.totals.items()):
            described[name], own = totals.state()
            tensors |= {f"{index}/{key}": tensor.contiguous() for key, tensor in own.items()}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "abilities": described,
            "tensors_sha256": _hash_of(tensors),
        }
        header["sha256"] = content_sha256(header)
        write_bytes(self.path, save(tensors, metadata={"citi": json.dumps(header)}))
        self._saved_at, self._saved_batches = time.monotonic(), self._num_seen()

    def _num_seen(self) -> list[int]:
        return [totals.num_seen for totals in self.totals.values()]

    def _read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        with _opened(self.path) as (header, file):
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header.get("tensors_sha256") != _hash_of(tensors):
            raise SavedFileError(self.path, "was changed after it was written")
        return header, tensors


def batches_done(path: Path) -> dict[str, int]:
    """Ability -> batches that a progress file has seen; its numbers are not read.

    Raises: SavedFileError.
    """
    with _opened(path) as (header, file):
        try:
            return {
                name: file.get_slice(f"{index}/counts").get_shape()[0]
                + described["num_empty"]
                + described["num_nonfinite"]
                for index, (name, described) in enumerate(header["abilities"].items())
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise SavedFileError(path, f"is damaged ({error!r})") from error


def remove_progress(path: str | Path) -> None:
    """Remove a progress file, and those that several processes keep beside it."""
    path = Path(path)
    name = re.compile(re.escape(path.name) + r"(\.\d+-of-\d+)?")
    for found in path.parent.glob("*"):
        if name.fullmatch(found.name):
            found.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, Any], safe_open]]:
    """The header and the open file. Raises: SavedFileError, also for what is read inside."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("citi", "null"))
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise SavedFileError(path, f"must be a file of format {FORMAT}, but is none")
            if header.get("version") != VERSION:
                got = header.get("version")
                raise SavedFileError(path, f"must have version {VERSION}, got {got!r}")
            if header.pop("sha256", None) != content_sha256(header):
                raise SavedFileError(path, "was changed after it was written")
            yield header, file
    except SavedFileError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise SavedFileError(path, f"is no safetensors file of ours ({error})") from error


def content_of(dataset: Dataset) -> str:
    """Hash of a rendered data set: its tokens and labels, in order."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        item = dataset[index]
        digest.update(json.dumps([item["input_ids"], item["labels"]]).encode())
    return digest.hexdigest()


def _hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
