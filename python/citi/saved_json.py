"""Reading back the JSON files that this package wrote: strictly, or with one named error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


class SavedFileError(ValueError):
    """A file that this package wrote cannot be used; says which, why, and what to do."""

    def __init__(self, path: str | Path, problem: str) -> None:
        super().__init__(f"{path} {problem}; make it again, or restore a copy of it")
        self.path = Path(path)


def read_object(
    path: str | Path, *, file_format: str, version: int, types: Mapping[str, type]
) -> dict[str, object]:
    """Read a JSON object that has exactly the keys of `types`, `format` and `version`.

    Args:
        path: the file.
        file_format: wanted value of its key `format`.
        version: wanted value of its key `version`.
        types: every other key with the type of its value.

    Returns:
        the object without `format` and `version`.

    Raises:
        SavedFileError: no file, not JSON, other format or version, missing or unknown keys, a value
            of another type.
    """
    obj = _parse(path)
    if obj.pop("format", None) != file_format:
        raise SavedFileError(path, f"must be a file of format {file_format}, but is none")
    found = obj.pop("version", None)
    if found != version:
        raise SavedFileError(path, f"must have version {version}, got {found!r}")
    check_types(path, "the file", obj, types)
    return obj


def check_types(
    path: str | Path, what: str, obj: Mapping[str, object], types: Mapping[str, type]
) -> None:
    """Raises SavedFileError unless `obj` has just the keys and types of `types`; 1 is a float."""
    unknown, missing = sorted(obj.keys() - types.keys()), sorted(types.keys() - obj.keys())
    if unknown or missing:
        raise SavedFileError(path, f"has unknown keys {unknown} and lacks {missing} in {what}")
    for key, wanted in types.items():
        is_whole_float = wanted is float and type(obj[key]) is int
        if type(obj[key]) is not wanted and not is_whole_float:
            raise SavedFileError(
                path, f"must hold a {wanted.__name__} as {key!r}, got {obj[key]!r:.80}"
            )


def content_sha256(obj: Mapping[str, object]) -> str:
    """Hash of an object's JSON content, whatever the order of its keys."""
    text = json.dumps(obj, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(path: str | Path) -> dict[str, object]:
    try:
        obj = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise SavedFileError(path, "is missing") from None
    except OSError as error:
        raise SavedFileError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SavedFileError(path, f"is no JSON: cut short or damaged ({error})") from error
    if not isinstance(obj, dict):
        raise SavedFileError(path, f"must hold a JSON object, got a {type(obj).__name__}")
    return obj
