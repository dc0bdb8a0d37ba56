"""What a piece of code allocates: every tensor's bytes, and how many lived at once."""

from __future__ import annotations

from itertools import accumulate
from types import TracebackType

import torch
from torch.autograd.profiler import profile

_ALLOCATION = "_ExtraFields_Allocation"
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
    reset, and sizes are rounded up as it does.

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
        """Bytes of every allocation and, negative, of its release, in order of time."""
        index = self.device.index
        if self.device.type == "cuda" and index is None:
            index = torch.cuda.current_device()
        found, waiting = [], list(self._profile.kineto_results.experimental_event_tree())
        while waiting:
            event = waiting.pop()
            waiting += event.children
            fields = event.extra_fields
            if type(fields).__name__ != _ALLOCATION or fields.device.type != self.device.type:
                continue
            if self.device.type == "cpu" or fields.device.index == index:
                found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        alive: dict[int, int] = {}
        changes = []
        for _, address, size in sorted(found, key=lambda each: each[0]):
            if size > 0:
                alive[address] = size
                changes.append(size)
            # What was there before may be reported with the size of an earlier block's tensor.
            elif address in alive:
                changes.append(-alive.pop(address))
        return changes
