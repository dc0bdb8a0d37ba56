"""Rules of the kernels that show in their source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import citi_kernels

PACKAGE = Path(citi_kernels.__file__).parent
KERNELS = sorted((PACKAGE / "triton_kernels").glob("*.py"))
ORCHESTRATION = sorted((PACKAGE / "ops").glob("molora_linear_*[td].py"))
WAITS = re.compile(
    r"\.(item|tolist|cpu|numpy|nonzero|synchronize|unique|bincount|masked_select)\(|\bint\((?!settings|each)"
)


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_case_5_every_masked_load_says_other(path: Path) -> None:
    for call in calls(path):
        keywords = {keyword.arg for keyword in call.keywords}
        if ast.unparse(call.func) != "tl.load":
            continue
        assert "mask" not in keywords or "other" in keywords, ast.unparse(call)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_case_1_every_program_id_is_int64_before_any_product(path: Path) -> None:
    found = [ast.unparse(call) for call in calls(path)]
    ids = [call for call in found if re.fullmatch(r"tl\.program_id\(.\)", call)]
    widened = [
        call for call in found if re.fullmatch(r"tl\.program_id\(.\)\.to\(tl\.int64\)", call)
    ]
    assert len(ids) == len(widened)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_case_15_no_kernel_uses_atomics(path: Path) -> None:
    assert "atomic" not in re.sub(r'""".*?"""|#.*', "", path.read_text("utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("path", [*KERNELS, *ORCHESTRATION], ids=lambda path: path.stem)
def test_nothing_waits_for_the_gpu(path: Path) -> None:
    found = [line for line in path.read_text("utf-8").splitlines() if WAITS.search(line)]
    assert not found


def test_one_place_launches() -> None:
    for path in KERNELS:
        text = path.read_text(encoding="utf-8")
        assert path.name == "launch.py" or not re.search(r"_kernel\[", text), path.name
