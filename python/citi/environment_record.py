"""env.json: what a run ran on, so that its numbers can be judged and repeated."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import citi_kernels
from citi.processes import this_process

_PACKAGES = (
    "citi-kernels",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "triton",
    "liger-kernel",
    "scattermoe",
)


def environment_record(device: str | None = None) -> dict[str, Any]:
    """Versions (installed packages only), platform, device, threads, backends, commit if any.

    Args:
        device: that was used; None: this process's own.
    """
    processes = this_process()
    device = processes.device if device is None else torch.device(device)
    return {
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": _device_name(device),
        "num_processes": processes.num_processes,
        "num_threads": torch.get_num_threads(),
        "backends": list(citi_kernels.available_backends()),
        "commit": _commit(),
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name") or platform.machine()
    return device.type


def _commit() -> str | None:
    """The commit of a development checkout; None for an installed package."""
    source = Path(citi_kernels.__file__).resolve().parents[1]
    if not (source / ".git").exists():
        return None
    command = ["git", "-C", str(source), "rev-parse", "--verify", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
