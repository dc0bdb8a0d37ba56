"""The house: arrows go one way, files stay small, rooms have names."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "citi_kernels").rglob("*.py"))
METHOD = sorted((ROOT / "python" / "citi").rglob("*.py"))
ALL = [*KERNELS, *METHOD, *sorted((ROOT / "benchmarks").rglob("*.py"))]

KERNEL_LIBRARY_MAY_IMPORT = {"torch", "triton", "citi_kernels"}
OPTIONAL = {"matplotlib", "rouge_score", "gguf", "trl", "triton", "datasets"}
OPTIONAL |= {"liger_kernel", "scattermoe"}
# device code needs Triton to be read at all; nobody imports it before it runs
DEVICE_CODE = "triton_kernels"
VAGUE = {"utils", "util", "common", "misc", "helpers", "helper", "experimental"}


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", KERNELS, ids=_relative)
def test_the_kernel_library_sees_torch_triton_and_the_standard_library_only(path: Path) -> None:
    foreign = _imports(path) - KERNEL_LIBRARY_MAY_IMPORT - sys.stdlib_module_names
    assert not foreign, f"{_relative(path)} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", METHOD, ids=_relative)
def test_the_package_sees_neither_tests_nor_benchmarks(path: Path) -> None:
    assert not _imports(path) & {"tests", "tiny", "benchmarks", "pytest"}


def test_only_the_command_line_sees_the_command_line() -> None:
    for path in METHOD:
        if "command_line" in path.parts or path.name == "__main__.py":
            continue
        assert "citi.command_line" not in path.read_text(encoding="utf-8"), _relative(path)


@pytest.mark.parametrize("path", [*KERNELS, *METHOD], ids=_relative)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    allowed = {"triton"} if path.parent.name == DEVICE_CODE else set()
    assert not _imports(path, top_level_only=True) & (OPTIONAL - allowed)


@pytest.mark.parametrize("path", [*KERNELS, *METHOD], ids=_relative)
def test_device_code_is_imported_when_it_runs(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    early = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert path.parent.name == DEVICE_CODE or DEVICE_CODE not in " ".join(map(ast.unparse, early))


def test_one_file_reads_the_environment() -> None:
    readers = [
        _relative(path)
        for path in [*KERNELS, *METHOD]
        if any(word in path.read_text(encoding="utf-8") for word in ("os.environ", "os.getenv"))
    ]
    assert set(readers) <= {"citi_kernels/environment.py"}


def test_nothing_of_ours_is_pickled() -> None:
    for path in [*KERNELS, *METHOD]:
        assert not _imports(path) & {"pickle", "dill", "cloudpickle", "joblib"}, _relative(path)
        assert "torch.load(" not in path.read_text(encoding="utf-8"), _relative(path)


def test_files_stay_readable() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    long = {
        _relative(path): lines
        for path in [*ALL, *tests]
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long


def test_every_room_has_a_name() -> None:
    names = {part.removesuffix(".py") for path in ALL for part in path.relative_to(ROOT).parts}
    assert not names & VAGUE


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts).removeprefix("python.")
        for path in [*KERNELS, *METHOD]
        if path.name == "__init__.py"
    }
    assert listed == found
