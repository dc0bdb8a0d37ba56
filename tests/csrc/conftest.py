"""The compiled extension of this installation, or a reason to skip what is about it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from citi_kernels import compiled

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def extension() -> ModuleType:
    if reason := compiled.why_missing("native"):
        pytest.skip(reason)
    return compiled.extension()


@pytest.fixture
def cuda_extension(extension: ModuleType) -> ModuleType:
    if reason := compiled.why_missing("cuda"):
        pytest.skip(reason)
    return extension
