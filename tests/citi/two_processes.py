"""Runs a function of a test module in two processes, as `torchrun` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# The package is imported before the tests' folders, which are namesakes of it, come into sight.
_RANK = """
import importlib
import sys
import citi
import citi_kernels
sys.path += sys.argv[4:]
getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(sys.argv[3])
"""


def run_in_two_processes(module: str, function: str, folder: Path) -> None:
    """Calls the function with the folder in both; fails with what they say."""
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = folder / "rank.py"
    script.write_text(_RANK)
    torchrun(script, module, function, folder, *tests)


def torchrun(*arguments: object) -> None:
    """Two processes of a script, or of `-m` and a module; fails with what they say."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*launcher, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-9000:]
