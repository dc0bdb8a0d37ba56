"""The importance GEMM as it was built: registers, memory, spills, and its instructions."""

from __future__ import annotations

import re
from types import ModuleType

from test_built_objects import cuobjdump, objects, run

# of fp32, bf16 and fp16: two tiles, aligned rows or any; sums for fp32 and fp64
KERNELS = {"ScoresOfTile": 12, "AddScoreSums": 2}
# two blocks of 256 threads, or four of 128, on a multiprocessor; one where loads are synchronous
MAX_REGISTERS = {
    # sums of a stage of fp32 beside those of all tokens
    "ScoresOfTileIfNS_4TileILi128": 255,
    "AlignedRows": 128,
    "AnyRows": 255,
    "AddScoreSums": 64,
}
MAX_STATIC_SHARED_BYTES = 2048


def sass_of(extension: ModuleType, *words: str) -> list[str]:
    """Code of the functions, on every architecture, whose names hold all of these."""
    code = run(cuobjdump(), "--dump-sass", extension.__file__)
    functions = re.split(r"Function : ", code)[1:]
    found = [each for each in functions if all(word in each.split("\n", 1)[0] for word in words)]
    assert found, words
    return found


def test_it_is_an_object_of_the_cuda_library(cuda_extension: ModuleType) -> None:
    assert "parameter_scores.cu.o" in {path.name for path in objects("citi_c*.dir/**/*.o")}


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
        kernel = next((name for name in KERNELS if name in found[2]), None)
        if kernel is None:  # of another op
            continue
        counts.setdefault(arch, dict.fromkeys(KERNELS, 0))[kernel] += 1
        registers, stack, shared, local = map(int, found.groups()[2:])
        print(f"{arch} {found[2]}: {registers} registers, {shared} bytes shared")
        most = next(most for name, most in MAX_REGISTERS.items() if name in found[2])
        assert registers <= most, (arch, found[2])
        assert shared <= MAX_STATIC_SHARED_BYTES + 1024, (arch, found[2])  # 1 KiB is the system's
        assert stack == local == 0, (arch, found[2])
    archs = [a for a in cuda_extension.built_with["cuda_archs"].split() if a.startswith("sm_")]
    assert counts == dict.fromkeys(archs, KERNELS)


def test_16_bit_products_run_on_tensor_cores_fed_by_asynchronous_copies(
    cuda_extension: ModuleType,
) -> None:
    for dtype, instruction in (
        ("8BFloat16", r"HMMA\.16816\.F32\.BF16"),
        ("7Float16", "HMMA.16816"),
    ):
        for code in sass_of(cuda_extension, "ScoresOfTile", f"INS_{dtype}", "AlignedRows"):
            name = code.split("\n", 1)[0]
            assert re.search(instruction, code), name
            assert re.search(r"LDSM\.16\.MT88\.4", code), name
            assert re.search(r"LDGSTS\.E\.BYPASS\.128", code), name


def test_fp32_is_multiplied_in_fp32(cuda_extension: ModuleType) -> None:
    for code in sass_of(cuda_extension, "ScoresOfTileIf", "AlignedRows"):
        assert "HMMA" not in code
        assert len(re.findall(r"\bFFMA\b", code)) >= 64
        assert re.search(r"LDGSTS\.E\.BYPASS\.128", code)
