"""The one place where a kernel is launched, and where launches are recorded instead.

Recording shows what an op would launch without a GPU: tests count launches, and compile every
kernel for every architecture with the arguments and constants that the op really uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# of an H100; for tensors that are not on a GPU
_DEFAULT_MULTIPROCESSORS = 132

_recorded: list[Launch] | None = None


@dataclass(frozen=True)
class Meta:
    """What a kernel is compiled with: its constexpr arguments, warps and pipeline stages."""

    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its run-time arguments by name, its constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    meta: Meta


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], meta: Meta) -> None:
    """Launch on the device of the first tensor argument; nothing where the grid is empty."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, meta))
        return
    tensor = next(each for each in arguments.values() if isinstance(each, Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](
            **arguments, **meta.constants, num_warps=meta.num_warps, num_stages=meta.num_stages
        )


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside the block nothing is launched; the list fills with what would have been.

    Outputs stay unwritten: give the op tensors on the "meta" device.
    """
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H100's for any other device."""
    if device.type != "cuda":
        return _DEFAULT_MULTIPROCESSORS
    return _multiprocessors_of(device.index or 0)


@lru_cache
def _multiprocessors_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def next_power_of_2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def block_of(size: int) -> int:
    """The block that covers `size` in a dot: a power of 2, at least 16."""
    return max(16, next_power_of_2(size))
