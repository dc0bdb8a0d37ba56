"""The importance GEMM as it was built: registers, memory, spills, and its instructions."""

from __future__ import annotations

import re
from types import ModuleType

from test_built_objects import objects

from built_code import Function, disassembled, usages

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


def code_of(extension: ModuleType, *words: str) -> list[Function]:
    """The tiles' kernels, on every architecture, whose names hold all of these."""
    functions = disassembled(extension.__file__, "ScoresOfTile")
    found = [each for each in functions if all(word in each.name for word in words)]
    assert found, words
    return found


def test_it_is_an_object_of_the_cuda_library(cuda_extension: ModuleType) -> None:
    assert "parameter_scores.cu.o" in {path.name for path in objects("citi_c*.dir/**/*.o")}


def test_kernels_stay_within_registers_and_shared_memory_and_spill_nothing(
    cuda_extension: ModuleType,
) -> None:
    counts: dict[str, dict[str, int]] = {}
    for kernel in KERNELS:
        for usage in usages(cuda_extension.__file__, kernel):
            counts.setdefault(usage.arch, dict.fromkeys(KERNELS, 0))[kernel] += 1
            print(usage)
            most = next(most for name, most in MAX_REGISTERS.items() if name in usage.function)
            assert usage.registers <= most, usage
            assert usage.shared <= MAX_STATIC_SHARED_BYTES + 1024, usage  # 1 KiB is the system's
            assert usage.stack == usage.local == 0, usage
    archs = [a for a in cuda_extension.built_with["cuda_archs"].split() if a.startswith("sm_")]
    assert counts == dict.fromkeys(archs, KERNELS)


def test_16_bit_products_run_on_tensor_cores_fed_by_asynchronous_copies(
    cuda_extension: ModuleType,
) -> None:
    for dtype, instruction in (
        ("8BFloat16", r"HMMA\.16816\.F32\.BF16"),
        ("7Float16", "HMMA.16816"),
    ):
        for _, name, code in code_of(cuda_extension, f"INS_{dtype}", "AlignedRows"):
            assert re.search(instruction, code), name
            assert re.search(r"LDSM\.16\.MT88\.4", code), name
            assert re.search(r"LDGSTS\.E\.BYPASS\.128", code), name


def test_fp32_is_multiplied_in_fp32(cuda_extension: ModuleType) -> None:
    for _, name, code in code_of(cuda_extension, "ScoresOfTileIf", "AlignedRows"):
        assert "HMMA" not in code, name
        assert len(re.findall(r"\bFFMA\b", code)) >= 64, name
        assert re.search(r"LDGSTS\.E\.BYPASS\.128", code), name
