"""What nvcc made of the CUDA kernels in the built module: their resources and their SASS."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Usage(NamedTuple):
    """What a kernel takes on an architecture; sizes in bytes."""

    arch: str  # such as sm_90a
    function: str  # its mangled name
    registers: int
    stack: int
    shared: int  # of which 1024 may be the system's
    local: int


class Function(NamedTuple):
    """A kernel, disassembled."""

    arch: str
    name: str  # mangled
    code: str

    @property
    def instructions(self) -> list[str]:
        """In their order, without their addresses."""
        return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(\S.*?) ?;", self.code)


def run(*command: str | Path) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


def cuobjdump() -> str:
    """Of the CUDA toolkit, or the one that Triton brings."""
    if program := shutil.which("cuobjdump"):
        return program
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else Path()
    if not bundled.is_file():
        pytest.skip("cuobjdump is neither on PATH nor in Triton")
    return str(bundled)


@functools.cache
def usages(module: str, kernel: str = "") -> tuple[Usage, ...]:
    """Of the kernels whose mangled names hold `kernel`, on every architecture."""
    report = run(cuobjdump(), "--dump-resource-usage", module)
    numbers = r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found, arch = [], ""
    for match in re.finditer(rf"arch = (sm_\w+)|Function (\S+):\s+{numbers}", report):
        if match[1]:
            arch = match[1]
        elif kernel in match[2]:
            found.append(Usage(arch, match[2], *map(int, match.groups()[2:])))
    return tuple(found)


@functools.cache
def disassembled(module: str, kernel: str) -> tuple[Function, ...]:
    """The kernels whose mangled names hold `kernel`, on every architecture.

    These alone: the whole module takes a quarter of a minute an architecture.
    """
    names = sorted({usage.function for usage in usages(module, kernel)})
    if not names:
        return ()
    report = run(cuobjdump(), "--dump-sass", "--function", ",".join(names), module)
    found, arch = [], ""
    for part in re.split(r"^(?=\s*(?:arch = |Function : ))", report, flags=re.M):
        if match := re.match(r"\s*arch = (sm_\w+)", part):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)\n", part):
            found.append(Function(arch, match[1], part[match.end() :]))
    return tuple(found)
