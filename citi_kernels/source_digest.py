"""What `citi_kernels._C` is built from, as one number; pip runs this file by itself when it builds.

An editable installation runs the Python of its tree, which may be newer than the `_C` that pip put
there. An installed wheel has no sources beside it, and its `_C` is of one piece with it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_SUFFIXES = (".h", ".cpp", ".cu", ".map")


def source_digest(root: Path) -> str | None:
    """Of the compiled files in root/csrc, by their names and bytes; None where they are not."""
    folder = root / "csrc"
    if not (folder / "extension_build.py").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SUFFIXES:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]
