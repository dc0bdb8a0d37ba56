"""Whether a peer that comes as a package of its own, for a GPU alone, can run here."""

from __future__ import annotations

from importlib.util import find_spec


def why_not_installed(package: str, install: str, device: str) -> str | None:
    """Why `package` cannot run on this device, with the line that installs it, or None."""
    if device != "cuda":
        return "needs a GPU"
    if find_spec(package) is None:
        return f"{package} is not installed: {install}"
    return None
