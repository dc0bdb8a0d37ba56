"""A file of results: the machine, the command, and every group that was measured."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from citi.benchmark.group import Result
from citi.durable import write_json
from citi.environment_record import environment_record
from citi.saved_json import SavedFileError, read_object

FORMAT, VERSION = "citi.benchmark", 1
_CPU_FLAGS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
_TYPES = {"machine": dict, "command": str, "results": list}


@dataclass(frozen=True)
class Record:
    """One run of `citi bench`."""

    machine: dict[str, Any]
    command: str
    results: tuple[Result, ...]

    def save(self, path: str | Path) -> None:
        """Write as JSON in one step. Raises: citi.durable.WriteError with the path."""
        content = {"format": FORMAT, "version": VERSION, "machine": self.machine}
        content |= {"command": self.command, "results": [each.as_json() for each in self.results]}
        write_json(path, content)

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Raises: citi.saved_json.SavedFileError, a ValueError that names path and problem."""
        content = read_object(path, file_format=FORMAT, version=VERSION, types=_TYPES)
        try:
            results = tuple(map(Result.from_json, content["results"]))
        except (KeyError, TypeError) as error:
            raise SavedFileError(path, f"holds a result of other fields: {error}") from None
        return cls(content["machine"], content["command"], results)

    def of(self, suite: str, **settings: Any) -> list[Result]:
        """Results of a suite that have these settings."""
        return [
            each
            for each in self.results
            if each.suite == suite and settings.items() <= each.settings.items()
        ]


def machine(device: str, clock: str) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    info = environment_record(device) | {
        "date": datetime.date.today().isoformat(),
        "clock": clock,
        "cpu_flags": _cpu_flags(),
    }
    if device == "cuda":
        info |= {
            "device_name": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return info


def machine_line(info: dict[str, Any], names: Sequence[str] = ("torch", "peft")) -> str:
    """The machine in one line, for a reader."""
    versions = ", ".join(f"{name} {info['versions'][name]}" for name in names)
    flags = f" ({', '.join(info['cpu_flags'])})" if info["device"] == "cpu" else ""
    threads = "" if info["device"] != "cpu" else f", {info['num_threads']} threads"
    return f"{info['device_name']}{flags}{threads}, {versions}, {info['date']}"


def _driver() -> str | None:
    """Version of the GPU's driver; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None


def _cpu_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return []
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return sorted(_CPU_FLAGS & set(flags[1].split())) if flags else []
