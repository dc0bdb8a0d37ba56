"""What the compiler made of the routed GEMM for Hopper: instructions, registers, memory."""

from __future__ import annotations

import re
from types import ModuleType
from typing import NamedTuple

import pytest
from test_extended_gemm_objects import ELEMENTS

from built_code import Function, disassembled, usages

NAME = "RoutedGemmKernel"
# width of a tile, blocks of a cluster, stages; bf16 and fp16; weight in rows of K, of N; columns
# of the narrow operand
TEMPLATE = re.compile(r"RoutedTilesILi(\d+)ELi(\d)ELi(\d)EEELNS_5DTypeE(\d)ELb(\d)ELi(\d+)E")
TILES = {(256, 2, 4), (128, 1, 5)}
SIDES = {(0, 40), (0, 64), (1, 32), (1, 64)}
# what setmaxnreg leaves to the threads that load, and gives to those that multiply
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


class Kernel(NamedTuple):
    width: int
    cluster: int
    stages: int
    dtype: int
    is_transposed: int
    narrow: int
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
    wanted = {(*tiles, dtype, *side) for tiles in TILES for dtype in (1, 2) for side in SIDES}
    assert sorted(kernel[:6] for kernel in kernels) == sorted(wanted)
    for arch, _, code in functions:
        if arch != "sm_90a":
            assert "BPT.TRAP" in code, arch
            assert not re.search(r"HGMMA|UTMA|\bSTG|\bST\b", code), arch


def test_nothing_spills_and_shared_memory_is_the_launch_s(cuda_extension: ModuleType) -> None:
    found = [each for each in usages(cuda_extension.__file__, NAME) if each.arch == "sm_90a"]
    if not found:
        pytest.skip("built without sm_90a")
    assert len(found) == 16
    for usage in found:
        # all three warp groups start with the third of a multiprocessor's registers
        assert usage.registers <= 168, usage
        assert usage.shared <= 1024, usage  # the system's
        assert usage.stack == usage.local == 0, usage


def test_products_are_issued_in_batches_with_one_under_way(kernels: list[Kernel]) -> None:
    """As ptxas keeps them: where it gives up it waits for each (warning C7510)."""
    for kernel in kernels:
        element = re.escape(ELEMENTS[kernel.dtype])
        wide = kernel.find(rf"HGMMA\.64x{kernel.width}x16\.F32{element} ")
        narrow = kernel.find(rf"HGMMA\.64x{kernel.narrow}x16\.F32{element} ")
        products = kernel.find(r"HGMMA")
        assert products == sorted({*wide, *narrow})
        # a step of four, and one in the loop over a step that is not full: of the first unit, of
        # its extension, of all others
        assert (len(wide), len(narrow)) == (15, 5)
        is_transposed = [".tnspB" in kernel.code[i] for i in products]
        assert is_transposed == [bool(kernel.is_transposed)] * 20
        batches = _batches(kernel, products)
        assert sorted(map(len, batches)) == [1, 1, 2, 4, 4, 8]
        for batch in batches:
            between = kernel.code[batch[0] + 1 : batch[-1]]
            assert not [line for line in between if re.search(r"WARPGROUP|BRA|BAR|WARPSYNC", line)]
        ends = [kernel.code[batch[-1] + 1] for batch in batches if len(batch) >= 4]
        assert len([line for line in ends if "DEPBAR.LE gsb0, 0x1" in line]) >= 2


def _batches(kernel: Kernel, products: list[int]) -> list[list[int]]:
    """Products up to each that counts as the last of its batch."""
    batches, batch = [], []
    for i in products:
        batch.append(i)
        if "gsb0" in kernel.code[i]:
            batches.append(batch)
            batch = []
    assert batch == []
    return batches


def test_nothing_slow_stands_in_the_loops_over_depth(kernels: list[Kernel]) -> None:
    """A release or acquire of the whole cluster would be a fence of the GPU and empty L1."""
    slow = r"MEMBAR|CCTL|ERRBAR|LDL|STL|BAR\.SYNC|LDG|\bLD\b"
    for kernel in kernels:
        products = kernel.find(r"HGMMA")
        whole = [batch for batch in _batches(kernel, products) if len(batch) >= 4]
        for batch in whole:
            start = max(i for i in kernel.find(r"PHASECHK|WARPGROUP\.ARRIVE") if i < batch[0])
            code = kernel.code[start : batch[-1] + 2]
            assert [line for line in code if re.search(slow, line)] == []


def test_tiles_move_by_tma_and_shares_go_to_the_cluster(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        boxes = 2 if kernel.is_transposed else 1
        # in the steps over depth and in those of the extension
        multicasts = len(kernel.find(r"UTMALDG\.2D\.MULTICAST"))
        assert multicasts == (2 * boxes if kernel.cluster > 1 else 0)
        assert len(kernel.find(r"UTMALDG\.2D")) == 2 * (1 + boxes) + 1
        assert len(kernel.find(r"UTMASTG\.2D")) == kernel.width // 64
        assert len(kernel.find(r"STSM\.16\.M88\.4")) == kernel.width // 16
        assert len(kernel.find(r"SYNCS\.EXCH")) == 2 * kernel.stages + 1
        assert len(kernel.find(r"UCGABAR_ARV")) == (2 if kernel.cluster > 1 else 0)


def test_a_count_goes_behind_what_it_stands_for(kernels: list[Kernel]) -> None:
    """The writer: both fences, then the count. The reader: the count, a fence, then TMA."""
    for kernel in kernels:
        (count,) = kernel.find(r"\bRED\.E\.ADD\S*\.STRONG\.GPU|REDG?\.E\.ADD.*STRONG\.GPU")
        stores = [i for i in kernel.find(r"\bSTG\.E|\bST\.E") if i < count]
        assert stores
        assert [i for i in kernel.find(r"FENCE\.VIEW\.ASYNC") if stores[-1] < i < count]
        assert [i for i in kernel.find(r"MEMBAR\S*\.GPU") if stores[-1] < i < count]
        (poll,) = kernel.find(r"LDG\.E\.STRONG\.GPU")
        loads = [i for i in kernel.find(r"UTMALDG") if i > poll]
        assert [i for i in kernel.find(r"FENCE\.VIEW\.ASYNC") if poll < i < loads[0]]
        # a kernel that waits in vain ends
        assert kernel.find(r"BPT\.TRAP")


def test_warp_groups_keep_within_the_registers_they_are_given(kernels: list[Kernel]) -> None:
    """Beyond the end of the producer are only functions that the consumers call."""
    for kernel in kernels:
        (given,) = kernel.find(rf"USETMAXREG\.TRY_ALLOC\.\S+ \S+ 0x{CONSUMER_REGISTERS:x}\b")
        (left,) = kernel.find(rf"USETMAXREG\.DEALLOC\.\S+ 0x{PRODUCER_REGISTERS:x}\b")
        assert given < kernel.find(r"HGMMA")[0] < left < kernel.find(r"UTMALDG")[0]
        end = next(i for i in kernel.find(r"\bEXIT\b") if i > kernel.find(r"UTMALDG")[-1])
        assert not [line for line in kernel.code[left:end] if "CALL" in line]
        parts = (
            (kernel.code[:left] + kernel.code[end:], CONSUMER_REGISTERS),
            (kernel.code[left:end], PRODUCER_REGISTERS),
        )
        for code, most in parts:
            used = {int(number) for line in code for number in re.findall(r"\bR(\d+)\b", line)}
            # accumulators are named by the first of them
            assert max(used) + 1 <= most
