"""What nvcc made of the grouped kernels: registers, shared memory, spills, instructions."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from built_code import disassembled, usages

# two dtypes, three widths of a tile, and of a product two layouts of the weight
KERNELS = {"MultiplyGroups": 12, "SumGroups": 6}
# three blocks of 128 threads fit the registers of a multiprocessor
MAX_REGISTERS = 168
# all of a launch's shared memory is dynamic; 1 KiB is the system's
MAX_STATIC_BYTES = 1024
INSTRUCTIONS = {
    "copies of 16 bytes beside the arithmetic": r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128",
    "four matrices at a time from shared memory": r"LDSM\.16\.M(88|T88)\.4",
    "tensor cores": r"HMMA\.16816\.F32",
    "stores of 16 bytes": r"STG\.E\.128",
}


def test_kernels_stay_within_registers_and_spill_nothing(cuda_extension: ModuleType) -> None:
    counts: dict[str, dict[str, int]] = {}
    for kernel in KERNELS:
        for usage in usages(cuda_extension.__file__, kernel):
            counts.setdefault(usage.arch, dict.fromkeys(KERNELS, 0))[kernel] += 1
            print(usage)
            assert usage.registers <= MAX_REGISTERS, usage
            assert usage.shared <= MAX_STATIC_BYTES, usage
            assert usage.stack == usage.local == 0, usage
    archs = [a for a in cuda_extension.built_with["cuda_archs"].split() if a.startswith("sm_")]
    assert counts == dict.fromkeys(archs, KERNELS)


def test_kernels_copy_asynchronously_and_multiply_on_tensor_cores(
    cuda_extension: ModuleType,
) -> None:
    for kernel in KERNELS:
        functions = disassembled(cuda_extension.__file__, kernel)
        assert functions
        for function in functions:
            for what, instruction in INSTRUCTIONS.items():
                assert re.search(instruction, function.code), (*function[:2], what)


@pytest.mark.parametrize("num_columns", [1, 32, 33, 64, 65, 128, 129, 300])
def test_dots_come_in_one_part_for_a_rank_of_up_to_128(
    cuda_extension: ModuleType, num_columns: int
) -> None:
    assert cuda_extension.grouped_column_tiles(num_columns) == -(-num_columns // 128)
