"""benchmarks/gpu_suite.sh without a GPU: what it would run, what it skips, what it writes."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_suite.sh"
IMPORTANCE_PARTS = ("importance", "importance_ops", "importance_8b")
PARTS = ("tests", "base_product", "molora", "routing", *IMPORTANCE_PARTS, "sanitizer")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SUITE), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OUT": str(out), "PYTHON": sys.executable},
    )


def test_dry_run_prints_a_command_for_every_part_and_runs_none(tmp_path: Path) -> None:
    result = run(tmp_path / "out", "--dry-run")
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert tuple(lines) == PARTS
    assert "CITI_TEST_DEVICE=cuda" in lines["tests"]
    for word in " ".join(lines.values()).split():
        if word.startswith(("tests/", "benchmarks/")):
            assert (SUITE.parents[1] / word).exists(), word
    assert not list((tmp_path / "out").glob("*.log"))


def test_the_importance_benchmark_takes_the_options_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SUITE.parent)
    benchmark = importlib.import_module("importance")
    lines = run(tmp_path, "--dry-run", *IMPORTANCE_PARTS).stdout.splitlines()
    parsed = []
    for line in lines:
        _, options = line.split("benchmarks/importance.py ")
        monkeypatch.setattr(sys, "argv", ["importance.py", *shlex.split(options)])
        parsed.append(benchmark.parse_arguments())
    assert [each.ops for each in parsed] == [False, True, False]
    assert [each.model for each in parsed] == ["smollm2", "smollm2", "llama-8b"]
    assert all(each.device == "cuda" and each.dtype == "bf16" for each in parsed)
    rows = parsed[2].rows
    assert "token" in rows
    assert "full" not in rows, "its gradients alone are 16 GB"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_each_part_is_skipped_with_the_reason(tmp_path: Path) -> None:
    result = run(tmp_path / "a folder", "molora", "tests")
    assert result.returncode == 0, result.stderr
    summary = (tmp_path / "a folder" / "summary.txt").read_text()
    assert result.stdout == summary
    assert [line.split(":")[0] for line in summary.splitlines()] == ["molora", "tests"]
    assert summary.count("finds no GPU through torch") == 2


def test_an_unknown_part_is_named_before_anything_runs(tmp_path: Path) -> None:
    result = run(tmp_path, "test")
    assert result.returncode == 2
    assert "no part 'test'; there are: tests base_product" in result.stderr
