"""`pytest benchmarks/`: the suites' rows under pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_benchmarks(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-p", "no:cacheprovider", *options]
    # pytest-benchmark times nothing in a worker of pytest-xdist, which this is not one of
    environ = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environ
    )


def test_a_row_is_timed_beside_its_baseline_and_keeps_the_ratio(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    file = tmp_path / "benchmarks.json"
    options = ("--suite", "decode", "--dtype", "fp32", f"--benchmark-json={file}")
    result = pytest_benchmarks(*options)
    assert result.returncode == 0, result.stdout[-2000:]
    rows = json.loads(file.read_text())["benchmarks"]
    ours = next(
        row
        for row in rows
        if row["group"] == "decode, T 1, K 1024, N 1024, dtype fp32"
        and row["extra_info"]["stands for"].startswith("citi_kernels.molora_linear")
    )
    assert ours["extra_info"]["both over frozen linear"] > 0
    assert "backward over frozen linear" not in ours["extra_info"]


def test_every_suite_is_collected() -> None:
    result = pytest_benchmarks("--collect-only", "--dtype", "fp32")
    assert result.returncode == 0, result.stdout[-2000:]
    for suite in ("layer", "scaling", "top-k", "importance ops", "training", "generation"):
        assert f"test_row[{suite}, " in result.stdout
