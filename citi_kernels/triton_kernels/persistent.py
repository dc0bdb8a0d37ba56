"""What persistent GEMMs over tensor descriptors share: tiles, weight blocks, their launch.

Shapes: T tokens, K in-features, N out-features.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from citi_kernels.triton_kernels.launch import Meta, launch, num_multiprocessors

# of an H100
_assumed = 90


@triton.jit
def tile_place(tile, num_rows, num_columns, GROUP: tl.constexpr):
    """(row, column): GROUP rows go through all columns before the next rows, so that L2 serves."""
    in_group = tile % (num_columns * GROUP)
    first_row = tile // (num_columns * GROUP) * GROUP
    group_rows = tl.minimum(num_rows - first_row, GROUP)
    return first_row + in_group % group_rows, in_group // group_rows


@triton.jit
def halves(acc, BLOCK_T: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of [BLOCK_T, 2 * HALF]."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_T, 2, HALF)), (0, 2, 1)))


@triton.jit
def weight_descriptor(
    ptr, N, K, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_IS_CONTIGUOUS: tl.constexpr
):
    if K_IS_CONTIGUOUS:
        descriptor = tl.make_tensor_descriptor(ptr, [N, K], [stride, 1], [BLOCK_N, BLOCK_K])
    else:
        descriptor = tl.make_tensor_descriptor(ptr, [K, N], [stride, 1], [BLOCK_K, BLOCK_N])
    return descriptor


@triton.jit
def weight_block(descriptor, n0, k0, K_IS_CONTIGUOUS: tl.constexpr):
    """[BLOCK_N, BLOCK_K] at (n0, k0)."""
    return descriptor.load([n0, k0]) if K_IS_CONTIGUOUS else tl.trans(descriptor.load([k0, n0]))


def launch_persistent(
    kernel: Any, num_tiles: int, arguments: dict[str, Any], meta: Meta, device: torch.device
) -> None:
    """Launch at most one program a multiprocessor, with an allocator for the descriptors.

    In a context of its own: Triton keeps the allocator there, and autograd's threads have none.
    """
    grid = (min(num_multiprocessors(device), num_tiles),)

    def run() -> None:
        triton.set_allocator(_scratch)
        launch(kernel, grid, arguments, meta)

    contextvars.copy_context().run(run)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Bytes on the current device; PyTorch's blocks are aligned to 512."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def capability(device: torch.device) -> int:
    """Compute capability as 10 * major + minor; the assumed one for any device but a GPU."""
    return _capability_of(device.index or 0) if device.type == "cuda" else _assumed


@contextlib.contextmanager
def assumed_capability(capability: int) -> Iterator[None]:
    """Inside the block tensors on no GPU count as on one of this capability: to compile for it."""
    global _assumed
    outer, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = outer


@lru_cache
def _capability_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
