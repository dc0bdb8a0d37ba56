"""benchmarks/gpu_suite.sh without a GPU: what it would run, what it skips, what it writes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from citi.command_line import app, bench

SUITE = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_suite.sh"
BENCHES = ("layer", "routing", "importance", "training")
PARTS = ("build", "tests", "tests_cuda", "base_product", *BENCHES, "sanitizer", "counters")

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


def test_the_benchmarks_take_the_options_they_are_given(tmp_path: Path) -> None:
    command = get_command(app).commands["bench"]
    measured: list[str] = []
    for line in run(tmp_path, "--dry-run", *BENCHES).stdout.splitlines():
        _, options = line.split(" citi bench ")
        # the shell printed words without their quotes
        words = shlex.split(options.replace("importance ops", "'importance ops'"))
        parameters = command.make_context("bench", words).params
        assert str(parameters["device"]) == "cuda"
        assert list(map(str, parameters["dtype"])) == ["bf16"]
        measured += parameters["suites"]
    assert set(measured) == set(bench.SUITES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_each_part_is_skipped_with_the_reason(tmp_path: Path) -> None:
    result = run(tmp_path / "a folder", "layer", "tests")
    assert result.returncode == 0, result.stderr
    summary = (tmp_path / "a folder" / "summary.txt").read_text()
    assert result.stdout == summary
    assert [line.split(":")[0] for line in summary.splitlines()] == ["layer", "tests"]
    assert summary.count("finds no GPU through torch") == 2


def test_an_unknown_part_is_named_before_anything_runs(tmp_path: Path) -> None:
    result = run(tmp_path, "test")
    assert result.returncode == 2
    assert "no part 'test'; there are: build tests tests_cuda" in result.stderr
