"""What lies in the files that were built: symbols, GPU architectures, registers, memory, spills."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from built_code import cuobjdump, disassembled, run, usages

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
FOREIGN = re.compile(r"torch|c10|\b_?Py[A-Z_]|pybind11")
# by kernel: instances of its template, and the most that one may take on any architecture
LIMITS = {
    kernel: limits
    for path in sorted((ROOT / "tests/csrc/kernel_limits").glob("*.json"))
    for kernel, limits in json.loads(path.read_text()).items()
}
# by test_extended_gemm_objects.py, test_routed_gemm_objects.py, test_grouped_objects.py,
# test_parameter_scores_objects.py
TESTED_ELSEWHERE = (
    "ExtendedGemmKernel",
    "RoutedGemmKernel",
    "MultiplyGroups",
    "SumGroups",
    "ScoresOfTile",
    "AddScoreSums",
)


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


def test_no_object_of_the_kernels_knows_torch_or_python(extension: ModuleType) -> None:
    found = objects("citi_c*.dir/**/*.o")
    for path in found:
        # an address may hold "c10" as well
        names = [re.sub(r"^\s*[0-9a-f]*\s", "", line) for line in symbols(path)]
        assert [name for name in names if FOREIGN.search(name)] == [], path.name
    names = {path.name for path in found}
    assert {"row_dots.cpp.o", "molora.cpp.o"} <= names
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


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("row_dots_avx2", "RowDotsOfTokensAvx2"),
        ("row_dots_avx512", "RowDotsOfTokensAvx512"),
        ("molora_avx2", "MoloraKernelsAvx2"),
        ("molora_avx512", "MoloraKernelsAvx512"),
        ("molora_avx512_bf16", "MoloraKernelsAvx512Bf16"),
    ],
)
def test_a_variant_shares_no_function_with_older_cpus(
    extension: ModuleType, name: str, function: str
) -> None:
    """A weak symbol compiled with AVX512 could be the one that the linker keeps for all."""
    (path,) = objects(f"{name}.cpp.o")
    defined = [line.split(maxsplit=2)[1:] for line in symbols(path, "--defined-only")]
    shared = [name for letter, name in defined if letter in "TWVuBDi"]
    assert [name.split("(")[0] for name in shared] == [f"citi::{function}"]


def test_every_architecture_that_was_asked_for_is_in_the_module(
    cuda_extension: ModuleType,
) -> None:
    wanted = cuda_extension.built_with["cuda_archs"].split()
    listed = run(cuobjdump(), "--list-elf", "--list-ptx", cuda_extension.__file__)
    found = set(re.findall(r"\.(sm_\d+[af]?)\.(?:cubin|ptx)", listed))
    assert {arch.replace("compute_", "sm_") for arch in wanted} <= found
    ptx = set(re.findall(r"\.(sm_\d+[af]?)\.ptx", listed))
    assert ptx == {arch.replace("compute_", "sm_") for arch in wanted if arch[0] == "c"}


def kernel_of(symbol: str) -> str:
    """The name in a mangled symbol, whose length stands before it."""
    return next(name for name in (*LIMITS, *TESTED_ELSEWHERE) if f"{len(name)}{name}" in symbol)


def test_kernels_stay_within_registers_and_shared_memory_and_spill_nothing(
    cuda_extension: ModuleType,
) -> None:
    counts: dict[str, dict[str, int]] = {}
    for usage in usages(cuda_extension.__file__):
        kernel = kernel_of(usage.function)
        if kernel in TESTED_ELSEWHERE:
            continue
        counts.setdefault(usage.arch, dict.fromkeys(LIMITS, 0))[kernel] += 1
        print(usage)
        assert usage.registers <= LIMITS[kernel]["registers"], usage
        # 1 KiB is the system's
        assert usage.shared <= LIMITS[kernel]["shared_bytes"] + 1024, usage
        assert usage.stack == usage.local == 0, usage
    archs = [a for a in cuda_extension.built_with["cuda_archs"].split() if a.startswith("sm_")]
    instances = {kernel: limits["instances"] for kernel, limits in LIMITS.items()}
    assert counts == dict.fromkeys(archs, instances)


def test_kernels_have_the_instructions_that_they_are_written_for(
    cuda_extension: ModuleType,
) -> None:
    """Asynchronous copies, matrices from shared memory, tensor cores: by name in the SASS."""
    wanted = {kernel: limits.get("instructions", ()) for kernel, limits in LIMITS.items()}
    for kernel, instructions in wanted.items():
        if not instructions:
            continue
        functions = disassembled(cuda_extension.__file__, f"{len(kernel)}{kernel}")
        assert functions
        for function in functions:
            for instruction in instructions:
                assert instruction in function.code, (*function[:2], instruction)


def test_aligned_inputs_are_loaded_16_bytes_at_a_time(cuda_extension: ModuleType) -> None:
    aligned = disassembled(cuda_extension.__file__, "AlignedElements")
    assert aligned
    for function in aligned:
        assert re.search(r"LDG\.E\.128", function.code), function[:2]
