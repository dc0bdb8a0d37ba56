"""This process among those of a launcher: its rank, its device, the barrier, the group."""

from __future__ import annotations

import torch
import torch.distributed
from accelerate import PartialState


def this_process() -> PartialState:
    """Accelerate's view of the launch; one process without a launcher.

    On a machine without an accelerator Accelerate must be told so, or every process of a plain
    `torchrun` takes itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def process_group() -> torch.distributed.ProcessGroup | None:
    """All processes of the launch; None if this is the only one."""
    is_one_of_several = this_process().num_processes > 1
    return torch.distributed.group.WORLD if is_one_of_several else None
