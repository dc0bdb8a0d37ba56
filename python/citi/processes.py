"""This process among those of a launcher: its rank, its device, the barrier, the group."""

from __future__ import annotations

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

# what Accelerate leaves in the environment, however it was told
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


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


def refuse_sharding() -> None:
    """Stages check and save parameters by name, one process for all: each must hold them whole.

    Raises:
        ValueError: The launch spreads parameters or optimizer over processes.
    """
    for variable, name in _SHARDING.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"stages train parameters that every process holds whole, but {name} spreads them "
                f"({variable} is set): start with `accelerate launch --multi_gpu`; a base too "
                "large for one GPU trains in Python, in one process, loaded with device_map='auto'"
            )
