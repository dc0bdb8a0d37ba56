"""What lies in the files that were built: symbols, GPU architectures, registers, memory, spills."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
FOREIGN = re.compile(r"torch|c10|\b_?Py[A-Z_]|pybind11")
KERNELS = {"SegmentDots": 4, "ColumnDots": 4, "SumParts": 2}
MAX_REGISTERS = 80
# of one block; every GPU has this much for two blocks of these kernels
MAX_SHARED_BYTES = 16384


def run(*command: str | Path) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


def symbols(path: Path, *options: str) -> list[str]:
    """Lines of nm: an address, a letter, a name."""
    if shutil.which("nm") is None:
        pytest.skip("nm not found")
    return run("nm", "--demangle", *options, path).splitlines()


def objects(pattern: str) -> list[Path]:
    """Object files in the build folder that an editable installation leaves in the source tree."""
    found = sorted(OBJECTS.rglob(pattern))
    if not found:
        pytest.skip(f"the build folder has no {pattern}")
    return found


def cuobjdump() -> str:
    """Of the CUDA toolkit, or the one that Triton brings."""
    if program := shutil.which("cuobjdump"):
        return program
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else Path()
    if not bundled.is_file():
        pytest.skip("cuobjdump is neither on PATH nor in Triton")
    return str(bundled)


def test_no_object_of_the_kernels_knows_torch_or_python(extension: ModuleType) -> None:
    found = objects("citi_c*.dir/**/*.o")
    for path in found:
        assert [line for line in symbols(path) if FOREIGN.search(line)] == [], path.name
    names = {path.name for path in found}
    assert "row_dots.cpp.o" in names
    assert ("row_dots.cu.o" in names) == bool(extension.built_with["cuda"])


def test_the_module_needs_neither_torch_nor_a_cuda_library(extension: ModuleType) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf not found")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", extension.__file__))
    assert [name for name in needed if re.search(r"torch|c10|cuda|python", name)] == []
    undefined = symbols(Path(extension.__file__), "--dynamic", "--undefined-only")
    assert [line for line in undefined if re.search(r"torch|c10|\bcu[a-z]*[A-Z]", line)] == []
    exported = symbols(Path(extension.__file__), "--dynamic", "--defined-only")
    assert [line.split(maxsplit=2)[-1] for line in exported] == ["PyInit__C"]


@pytest.mark.parametrize("variant", ["Avx2", "Avx512"])
def test_a_variant_shares_no_function_with_older_cpus(extension: ModuleType, variant: str) -> None:
    """A weak symbol compiled with AVX512 could be the one that the linker keeps for all."""
    (path,) = objects(f"row_dots_{variant.lower()}.cpp.o")
    defined = [line.split(maxsplit=2)[1:] for line in symbols(path, "--defined-only")]
    shared = [name for letter, name in defined if letter in "TWVuBDi"]
    assert [name.split("(")[0] for name in shared] == [f"citi::RowDotsOfTokens{variant}"]


def test_every_architecture_that_was_asked_for_is_in_the_module(
    cuda_extension: ModuleType,
) -> None:
    wanted = cuda_extension.built_with["cuda_archs"].split()
    listed = run(cuobjdump(), "--list-elf", "--list-ptx", cuda_extension.__file__)
    found = set(re.findall(r"\.(sm_\d+[af]?)\.(?:cubin|ptx)", listed))
    assert {arch.replace("compute_", "sm_") for arch in wanted} <= found
    ptx = re.findall(r"\.(sm_\d+[af]?)\.ptx", listed)
    assert ptx == [arch.replace("compute_", "sm_") for arch in wanted if arch[0] == "c"]


def test_kernels_stay_within_registers_and_shared_memory_and_spill_nothing(
    cuda_extension: ModuleType,
) -> None:
    report = run(cuobjdump(), "--dump-resource-usage", cuda_extension.__file__)
    pattern = r"arch = (sm_\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    counts: dict[str, dict[str, int]] = {}
    arch = ""
    for found in re.finditer(pattern, report):
        if found[1]:
            arch = found[1]
            continue
        kernel = next(name for name in KERNELS if name in found[2])
        counts.setdefault(arch, dict.fromkeys(KERNELS, 0))[kernel] += 1
        registers, stack, shared, local = map(int, found.groups()[2:])
        print(f"{arch} {found[2]}: {registers} registers, {shared} bytes shared")
        assert registers <= MAX_REGISTERS, (arch, found[2])
        assert shared <= MAX_SHARED_BYTES + 1024, (arch, found[2])  # 1 KiB is the system's
        assert stack == local == 0, (arch, found[2])
    archs = [a for a in cuda_extension.built_with["cuda_archs"].split() if a.startswith("sm_")]
    assert counts == dict.fromkeys(archs, KERNELS)


def test_aligned_inputs_are_loaded_16_bytes_at_a_time(cuda_extension: ModuleType) -> None:
    code = run(cuobjdump(), "--dump-sass", cuda_extension.__file__)
    functions = re.split(r"Function : ", code)[1:]
    aligned = [text for text in functions if "AlignedElements" in text.split("\n", 1)[0]]
    assert aligned
    for text in aligned:
        assert re.search(r"LDG\.E\.128", text), text.split("\n", 1)[0]
