"""What nvcc made of the grouped kernels: registers, shared memory, spills, instructions."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
from test_built_objects import cuobjdump, run

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
    report = run(cuobjdump(), "--dump-resource-usage", cuda_extension.__file__)
    pattern = r"arch = (sm_\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    counts: dict[str, dict[str, int]] = {}
    arch = ""
    for found in re.finditer(pattern, report):
        arch = found[1] or arch
        kernel = next((name for name in KERNELS if found[2] and name in found[2]), None)
        if kernel is None:
            continue
        counts.setdefault(arch, dict.fromkeys(KERNELS, 0))[kernel] += 1
        registers, stack, shared, local = map(int, found.groups()[2:])
        print(f"{arch} {found[2]}: {registers} registers")
        assert registers <= MAX_REGISTERS, (arch, found[2])
        assert shared <= MAX_STATIC_BYTES, (arch, found[2])
        assert stack == local == 0, (arch, found[2])
    archs = [a for a in cuda_extension.built_with["cuda_archs"].split() if a.startswith("sm_")]
    assert counts == dict.fromkeys(archs, KERNELS)


def test_kernels_copy_asynchronously_and_multiply_on_tensor_cores(
    cuda_extension: ModuleType,
) -> None:
    code = run(cuobjdump(), "--dump-sass", cuda_extension.__file__)
    functions = re.split(r"Function : ", code)[1:]
    grouped = [each for each in functions if any(name in each[:200] for name in KERNELS)]
    assert grouped
    for text in grouped:
        for what, instruction in INSTRUCTIONS.items():
            assert re.search(instruction, text), (text.split("\n", 1)[0], what)


@pytest.mark.parametrize("num_columns", [1, 32, 33, 64, 65, 128, 129, 300])
def test_dots_come_in_one_part_for_a_rank_of_up_to_128(
    cuda_extension: ModuleType, num_columns: int
) -> None:
    assert cuda_extension.grouped_column_tiles(num_columns) == -(-num_columns // 128)
