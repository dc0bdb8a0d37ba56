"""This process among those of a launcher: its rank, its device, the barrier."""

from __future__ import annotations

import torch
from accelerate import PartialState


def this_process() -> PartialState:
    """Accelerate's view of the launch; one process without a launcher.

    On a machine without an accelerator Accelerate must be told so, or every process of a plain
    `torchrun` takes itself for the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
