"""The C++ tests, which need no Python: built once for each sanitizer, run by CTest."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("cmake", "ctest", "ninja", "c++")
PROGRAM = "#include <thread>\nint main() { std::thread([] {}).join(); }\n"


def run(*command: str | Path, limit: int = 1800) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )


def why_not(sanitizers: str, folder: Path) -> str:
    """Why nothing built with these sanitizers runs here."""
    if not sys.platform.startswith("linux"):
        return "the C++ tests are built on Linux"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found"
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text(PROGRAM)
    built = run("c++", f"-fsanitize={sanitizers}", source, "-pthread", "-o", program)
    result = built if built.returncode else run(program)
    return f"-fsanitize={sanitizers}: {result.stdout[-300:]}" if result.returncode else ""


def variants_of_this_cpu() -> list[str]:
    """What can run of the CPU kernels' variants; to build the others for nothing takes minutes."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    needed = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16"}
    return [variant for variant, flag in needed.items() if flag in flags]


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"], ids=["asan_ubsan", "tsan"])
def test_kernels_of_cpu_and_cuda_hold_on_the_cpu_under_sanitizers(
    sanitizers: str, tmp_path: Path
) -> None:
    """Values, bits of every variant, layout and number of threads; CUDA kernels as host threads."""
    if reason := why_not(sanitizers, tmp_path):
        pytest.skip(reason)
    options = ("BUILD_MODULE=OFF", "BUILD_TESTS=ON", "WERROR=ON")
    commands = (
        ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
        + [f"-DCITI_{option}" for option in options]
        + [f"-DCITI_SANITIZE={sanitizers}", "-DCITI_OPENMP=OFF"]
        + [f"-DCITI_X86_VARIANTS={';'.join(variants_of_this_cpu())}"],
        ["cmake", "--build", tmp_path / "build"],
        ["ctest", "--test-dir", tmp_path / "build", "--output-on-failure"],
    )
    for command in commands:
        result = run(*command)
        assert result.returncode == 0, result.stdout[-4000:]
    assert re.search(r"tests passed, 0 tests failed out of [1-9]", result.stdout)


def test_the_cpu_is_asked_by_names_that_old_compilers_know() -> None:
    """Another name is a compile error: "f16c" for GCC 10 and Clang 17."""
    source = (ROOT / "csrc" / "cpu" / "cpu_features.cpp").read_text()
    asked = re.findall(r"__builtin_cpu_supports\(([^)]*)\)", source)
    assert asked
    assert set(asked) <= {'"avx2"', '"fma"', '"avx512f"'}
