"""What a piece of code allocates: every tensor's bytes, and how many lived at once."""

from __future__ import annotations

from itertools import accumulate
from types import TracebackType

import torch
from torch.autograd.profiler import profile

_MEMORY_EVENT = "[memory]"
_DEVICE_TYPES = ("cpu", "cuda")


class TensorMemory:
    """Counts the memory of all tensors that a block of code makes on one device.

    ::

        with TensorMemory() as memory:
            loss(model(x)).backward()
        memory.peak           # bytes
        memory.allocations    # bytes of each allocation, in order

    It sees what PyTorch's allocator gives out, whoever asks: Python, C++ ops, the bodies of custom
    ops, the backward; also what was freed again at once. On the CPU these are counted, not sampled:
    the same code gives the same numbers. Not seen: workspaces that a library such as oneDNN
    allocates by itself, and what threads of yours allocate meanwhile. Memory that was there before
    the block and is freed in it does not lower `peak`: what replaces an old tensor counts in full.

    The block runs under PyTorch's profiler, which slows it down and cannot be nested: measure time
    apart. CUDA: `peak` comes from the caching allocator's own statistics, whose running maximum is
    reset, and sizes are rounded up as it does. Not yet run on a GPU.

    Args:
        device: "cpu" or a CUDA device; allocations elsewhere are not counted.

    Attributes:
        allocations: bytes of every allocation in the block, in order.
        peak: most bytes alive at once, over what was alive at the start.
        remaining: bytes allocated in the block that were alive at its end.

    Raises:
        ValueError: another kind of device.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type not in _DEVICE_TYPES:
            raise ValueError(f"device must be one of {', '.join(_DEVICE_TYPES)}, got {device}")
        self.allocations: list[int] = []
        self.peak = self.remaining = 0

    def __enter__(self) -> TensorMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        self._profile = profile(profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._profile.__exit__(kind, error, traceback)
        changes = self._changes()
        self.allocations = [change for change in changes if change > 0]
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
            self.remaining = torch.cuda.memory_allocated(self.device) - self._before
        else:
            alive = [0, *accumulate(changes)]
            self.peak, self.remaining = max(alive), alive[-1]
        del self._profile

    def _changes(self) -> list[int]:
        """Bytes of every allocation and, negative, of every release, in order of time."""
        index = self.device.index
        if self.device.type == "cuda" and index is None:
            index = torch.cuda.current_device()
        events = [
            event
            for event in self._profile.kineto_results.events()
            if event.name() == _MEMORY_EVENT
            and event.device_type().name.lower() == self.device.type
            and (self.device.type == "cpu" or event.device_index() == index)
        ]
        events.sort(key=lambda event: event.start_ns())
        return [event.nbytes() for event in events]
