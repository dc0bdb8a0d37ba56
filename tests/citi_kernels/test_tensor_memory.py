"""TensorMemory against allocations whose sizes are known."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from citi_kernels.tensor_memory import TensorMemory
from under_test import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="sizes are those of the CPU's allocator")

KB = 1000  # so that no allocation is one of PyTorch's own round numbers


def bytes_of(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


@torch.library.custom_op("citi_tests::with_temporary", mutates_args=())
def with_temporary(x: Tensor) -> Tensor:
    """Allocates 5 KB, frees them, and returns a copy of x."""
    bytes_of(5 * KB).fill_(1)
    return x.clone()


def test_it_gives_every_allocation_in_order_and_the_most_alive_at_once():
    with TensorMemory() as memory:
        kept = bytes_of(1 * KB)
        freed = bytes_of(7 * KB)
        del freed
        last = bytes_of(3 * KB)
    assert memory.allocations == [1 * KB, 7 * KB, 3 * KB]
    assert memory.peak == 8 * KB
    assert memory.remaining == kept.numel() + last.numel() == 4 * KB


def test_views_and_in_place_writes_allocate_nothing():
    tensor = bytes_of(4 * KB)
    with TensorMemory() as memory:
        tensor.view(4, KB).T[1].zero_()
        tensor.bitwise_not_()
    assert memory.allocations == []
    assert memory.peak == memory.remaining == 0


def test_it_sees_inside_custom_ops_and_composite_ops():
    x = bytes_of(2 * KB)
    a, b = torch.ones(30, 10), torch.ones(10, 50)
    with TensorMemory() as memory:
        y = with_temporary(x)
        z = torch.einsum("ik,kj->ij", a, b)
    assert memory.allocations[:2] == [5 * KB, 2 * KB]
    assert 30 * 50 * 4 in memory.allocations
    assert memory.remaining == y.nbytes + z.nbytes
    assert memory.peak >= 5 * KB


def test_it_sees_the_gradients_of_a_backward():
    weight = torch.ones(70, 30, requires_grad=True)
    x = torch.ones(11, 30)
    with TensorMemory() as memory:
        (x @ weight.T).sum().backward()
    assert memory.allocations.count(weight.nbytes) == 1
    assert memory.remaining >= weight.nbytes
    with TensorMemory() as frozen:
        (x @ weight.detach().T).sum()
    assert weight.nbytes not in frozen.allocations


def test_it_sees_other_threads_that_pytorch_starts():
    """The backward of a checkpointed block, and products on several threads."""
    x = torch.ones(300, 300, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with TensorMemory() as memory:
            y = checkpoint(lambda t: (t @ t).exp() @ t, x, use_reentrant=False)
            y.sum().backward()
    finally:
        torch.set_num_threads(before)
    recomputed = 2  # x @ x and its exp, once in the forward and once in the backward
    assert memory.allocations.count(x.nbytes) >= 2 * recomputed + 1
    assert x.nbytes <= memory.remaining <= 3 * x.nbytes


def test_freeing_what_was_there_before_does_not_lower_the_peak():
    old = bytes_of(9 * KB)
    gc.collect()
    with TensorMemory() as memory:
        del old
        new = bytes_of(2 * KB)
    assert memory.peak == memory.remaining == new.numel()


def test_memory_that_an_earlier_block_made_is_not_released_in_a_later_one():
    """The profiler remembers its size, and may even meet another tensor at its address."""
    with TensorMemory():
        old = [bytes_of(4 * KB) for _ in range(8)]
    with TensorMemory() as memory:
        del old
        new = bytes_of(2 * KB)
    assert memory.peak == memory.remaining == new.numel()


def test_repeats_give_the_same_numbers():
    def measured() -> tuple[list[int], int]:
        with TensorMemory() as memory:
            x = torch.ones(200, 100, requires_grad=True)
            torch.nn.functional.gelu(x @ x.T).logsumexp(1).sum().backward()
        return memory.allocations, memory.peak

    assert len({str(measured()) for _ in range(5)}) == 1


def test_an_error_inside_comes_out_and_the_next_block_counts_again():
    memory = TensorMemory()
    with pytest.raises(RuntimeError, match="shape"), memory:
        bytes_of(6 * KB).view(7)
    assert memory.peak == 6 * KB
    with TensorMemory() as memory:
        bytes_of(1 * KB)
    assert memory.allocations == [1 * KB]


def test_threads_that_the_caller_starts_do_not_count():
    other = threading.Thread(target=bytes_of, args=(8 * KB,))
    with TensorMemory() as memory:
        other.start()
        other.join()
    assert memory.allocations == []


def test_another_kind_of_device_is_refused():
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got meta"):
        TensorMemory("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_it_counts_the_gpu_alone():
    with TensorMemory("cuda") as memory:
        kept = torch.empty(4 * 2**20, device="cuda")
        torch.empty(8 * 2**20, device="cuda")
        bytes_of(5 * KB)
    assert memory.allocations == [16 * 2**20, 32 * 2**20]
    assert memory.peak == 48 * 2**20
    assert memory.remaining == kept.nbytes
