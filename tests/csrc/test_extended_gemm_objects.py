"""What the compiler made of the extended GEMM for Hopper: instructions, registers, memory."""

from __future__ import annotations

import re
from types import ModuleType
from typing import NamedTuple

import pytest

from built_code import Function, disassembled, usages

NAME = "ExtendedGemmKernel"
# width of a tile, blocks of a cluster, stages; bf16 and fp16; weight in rows of K, of N
TEMPLATE = re.compile(r"TilesILi(\d+)ELi(\d)ELi(\d)EEELNS_5DTypeE(\d)ELb(\d)E")
TILES = {(256, 2, 4), (128, 1, 6)}
ELEMENTS = {1: ".BF16", 2: ""}
# what setmaxnreg leaves to the threads that load, and gives to those that multiply
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240


class Kernel(NamedTuple):
    width: int
    cluster: int
    stages: int
    dtype: int
    is_transposed: int
    code: list[str]

    def find(self, pattern: str) -> list[int]:
        return [i for i, line in enumerate(self.code) if re.search(pattern, line)]


@pytest.fixture
def functions(cuda_extension: ModuleType) -> tuple[Function, ...]:
    """The kernels of this name on every architecture."""
    if "sm_90a" not in cuda_extension.built_with["cuda_archs"].split():
        pytest.skip("built without sm_90a")
    return disassembled(cuda_extension.__file__, NAME)


@pytest.fixture
def kernels(functions: tuple[Function, ...]) -> list[Kernel]:
    found = []
    for function in functions:
        if function.arch == "sm_90a":
            numbers = map(int, TEMPLATE.search(function.name).groups())
            found.append(Kernel(*numbers, function.instructions))
    return found


def test_every_kernel_is_there_and_nothing_of_it_on_other_gpus(
    functions: tuple[Function, ...], kernels: list[Kernel]
) -> None:
    wanted = {(*tiles, dtype, side) for tiles in TILES for dtype in (1, 2) for side in (0, 1)}
    assert sorted(kernel[:5] for kernel in kernels) == sorted(wanted)
    for arch, _, code in functions:
        if arch != "sm_90a":
            assert "BPT.TRAP" in code, arch
            assert not re.search(r"HGMMA|UTMA|\bSTG|\bST\b", code), arch


def test_nothing_spills_and_shared_memory_is_the_launch_s(cuda_extension: ModuleType) -> None:
    found = [each for each in usages(cuda_extension.__file__, NAME) if each.arch == "sm_90a"]
    if not found:
        pytest.skip("built without sm_90a")
    assert len(found) == 8
    for usage in found:
        # all three warp groups start with the third of a multiprocessor's registers
        assert usage.registers <= 168, usage
        assert usage.shared <= 1024, usage  # the system's
        assert usage.stack == usage.local == 0, usage


def test_products_are_issued_in_batches_with_one_under_way(kernels: list[Kernel]) -> None:
    """As ptxas keeps them, four in a row: where it gives up it waits for each (warning C7510)."""
    for kernel in kernels:
        shape = rf"HGMMA\.64x{kernel.width}x16\.F32{re.escape(ELEMENTS[kernel.dtype])} "
        products = kernel.find(r"HGMMA")
        assert products == kernel.find(shape)
        # four of a whole step, one in the loop over a step that is not full
        assert len(products) == 5
        is_transposed = [".tnspB" in kernel.code[i] for i in products]
        assert is_transposed == [bool(kernel.is_transposed)] * 5
        batch = products[1:]
        between = kernel.code[batch[0] + 1 : batch[-1]]
        assert not [line for line in between if re.search(r"WARPGROUP|BRA|BAR|WARPSYNC", line)]
        assert "gsb0" in kernel.code[batch[-1]]
        assert not any("gsb0" in kernel.code[i] for i in batch[:-1])
        assert "DEPBAR.LE gsb0, 0x1" in kernel.code[batch[-1] + 1]


def test_nothing_slow_stands_in_the_loop_over_depth(kernels: list[Kernel]) -> None:
    """A release or acquire of the whole cluster would be a fence of the GPU and empty L1."""
    slow = r"MEMBAR|CCTL|ERRBAR|LDL|STL|BAR\.SYNC|LDG|\bLD\b"
    for kernel in kernels:
        first, last = kernel.find(r"HGMMA")[0], kernel.find(r"HGMMA")[-1]
        back = next(i for i in range(last, len(kernel.code)) if "BRA" in kernel.code[i])
        start = max(i for i in kernel.find(r"PHASECHK") if i < first)
        loop = kernel.code[start : back + 1]
        assert len([line for line in loop if "HGMMA" in line]) == 5
        assert [line for line in loop if re.search(slow, line)] == []


def test_tiles_move_by_tma_and_shares_go_to_the_cluster(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        boxes = 2 if kernel.is_transposed else 1
        multicasts = len(kernel.find(r"UTMALDG\.2D\.MULTICAST"))
        assert multicasts == (boxes if kernel.cluster > 1 else 0)
        assert len(kernel.find(r"UTMALDG\.2D")) == 1 + boxes
        assert len(kernel.find(r"UTMASTG\.2D")) == kernel.width // 64
        assert len(kernel.find(r"STSM\.16\.M88\.4")) == kernel.width // 16
        assert kernel.find(r"\bSTG|\bST\.E|\bSTS\b") == []
        assert len(kernel.find(r"SYNCS\.EXCH")) == 2 * kernel.stages
        assert len(kernel.find(r"UCGABAR_ARV")) == (2 if kernel.cluster > 1 else 0)


def test_warp_groups_keep_within_the_registers_they_are_given(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        (given,) = kernel.find(rf"USETMAXREG\.TRY_ALLOC\.\S+ \S+ 0x{CONSUMER_REGISTERS:x}\b")
        (left,) = kernel.find(rf"USETMAXREG\.DEALLOC\.\S+ 0x{PRODUCER_REGISTERS:x}\b")
        assert given < kernel.find(r"HGMMA")[0] < left < kernel.find(r"UTMALDG")[0]
        parts = (kernel.code[:left], CONSUMER_REGISTERS), (kernel.code[left:], PRODUCER_REGISTERS)
        for code, most in parts:
            used = {int(number) for line in code for number in re.findall(r"\bR(\d+)\b", line)}
            # accumulators are named by the first of them
            assert max(used) + 1 <= most
