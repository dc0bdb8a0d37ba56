"""The files of a saved adapter: reading them with one named error instead of a partial load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_FLOATING = ("F64", "F32", "F16", "BF16")
_SHOWN = 8

Shapes = Mapping[str, tuple[int, ...]]


class AdapterError(ValueError):
    """An adapter's files are damaged, or do not belong to the model; the message names which."""


def read_adapter_config(directory: str | Path, known_keys: set[str]) -> dict:
    """The settings in `adapter_config.json`.

    Args:
        directory: a saved adapter.
        known_keys: the fields of the configuration class.

    Raises:
        AdapterError: the file is missing, is not JSON, or has a key that is not known here.
    """
    path = Path(directory) / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise AdapterError(f"{path}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{path}: wanted a JSON object, got {type(settings).__name__}")
    unknown = sorted(set(settings) - known_keys)
    if unknown:
        raise AdapterError(
            f"{path}: unknown keys {unknown}; written by another version (the file says peft "
            f"{settings.get('peft_version')})? Install that one, or remove the keys"
        )
    return settings


def read_adapter_shapes(directory: str | Path, weights_sha256: str | None) -> Shapes:
    """Names and shapes of the tensors in `adapter_model.safetensors`, after checking the file.

    Args:
        directory: a saved adapter.
        weights_sha256: hash of the file when it was saved; None skips that check.

    Raises:
        AdapterError: the file is missing, cut short, changed since it was saved, or holds a tensor
            that is not floating.
    """
    path = Path(directory) / WEIGHTS_FILE
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; is {directory} a saved MOLoRA adapter?")
    try:
        if weights_sha256 is not None and file_sha256(path) != weights_sha256:
            raise AdapterError(
                f"{path}: cut short or changed since it was saved (sha256 is not the one in "
                f"{CONFIG_FILE}); restore it, or, if the change was meant, remove weights_sha256 "
                "there"
            )
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path}: not a complete safetensors file ({error}); save or copy it again"
        ) from error
    strange = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _FLOATING]
    if strange:
        raise AdapterError(f"{path}: tensors must be {', '.join(_FLOATING)}, got {_list(strange)}")
    return shapes


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare_shapes(source: str, expected: Shapes, found: Shapes) -> None:
    """Raises unless exactly the expected tensors were found, each with its shape.

    Args:
        source: where `found` comes from, for the message.
        expected: what the model with its adapter wants.
        found: what is to be loaded.

    Raises:
        AdapterError: names what is missing, what is extra, and what has another shape.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    other = [
        f"{name} (wanted {tuple(shape)}, got {tuple(found[name])})"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    parts = [
        f"{title}: {_list(names)}"
        for title, names in (("missing", missing), ("extra", extra), ("of another shape", other))
        if names
    ]
    if parts:
        raise AdapterError(
            f"{source} does not fit the model and its adapter configuration; {'; '.join(parts)}. "
            "Nothing was loaded"
        )


def _list(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
