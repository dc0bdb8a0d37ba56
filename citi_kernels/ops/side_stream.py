"""Launches that run beside another one: on a second stream, which the current stream then joins.

    beside = Beside(device)
    parts = skinny_cuda.factor_gradients(dy, u, beside=beside)      memory now, the kernel later
    with beside:
        dx = the_long_product()                                     launched first
    parts is there for whatever the current stream runs from here on

The second stream begins where the current one stood on entry; the current one waits for it on exit.
All memory is taken before entry and given back after exit, by the current stream: every earlier use
of a block comes before the second stream's, every later use after it, so that nothing need be
recorded with the allocator. The host waits for nothing, and a CUDA graph captures all of it as a
fork and a join.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from citi_kernels import compiled


class _Launch(NamedTuple):
    kernel: Callable[..., None]
    arguments: dict[str, Any]
    tensors: tuple[Tensor | None, ...]  # what the addresses in `arguments` belong to


class Beside:
    """Launches of one device, made on leaving `with`, beside those made within; see the module.

    Without any launch nothing happens. Where the body raises they are dropped.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launches: list[_Launch] = []

    def later(
        self,
        kernel: Callable[..., None],
        arguments: dict[str, Any],
        tensors: tuple[Tensor | None, ...],
    ) -> None:
        """Keep one launch; arguments: all but the place, tensors: all that they point to."""
        self._launches.append(_Launch(kernel, arguments, tensors))

    def __enter__(self) -> Beside:
        if self._launches:
            self._current = _current_stream(self._device)
            self._fork = self._current.record_event()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        launches, self._launches = self._launches, []
        if kind is not None or not launches:
            return
        side = _side_stream(self._device)
        side.wait_event(self._fork)
        place = compiled.launch_place(launches[0].tensors[0]) | {"stream": side.cuda_stream}
        try:
            for kernel, arguments, _ in launches:
                kernel(**arguments, **place)
        finally:
            # what was launched must end before `launches` frees its memory
            self._current.wait_event(side.record_event())


def handle(device: torch.device) -> int:
    """Of the second stream, for a function of `_C` that forks and joins by itself."""
    return _side_stream(device).cuda_stream


def _current_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.current_stream(device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device, made when it is first needed."""
    return torch.cuda.Stream(device)
