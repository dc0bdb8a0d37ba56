"""Case 40: a loop of one's own around adapted layers whose parameters FSDP2 spreads."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from run_cases import adapted_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from two_processes import run_in_two_processes

from citi_kernels import RoutingContext, router_loss

NUM_STEPS = 3


def train(model: nn.Module, ids_BS: Tensor) -> list[Tensor]:
    """A few steps; the losses. Each half of the batch has a router loss of its own."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(NUM_STEPS):
        total = torch.zeros(())
        for half in ids_BS.split(2):
            task_types = torch.arange(len(half)) % 2
            context = RoutingContext.from_attention_mask(
                torch.ones_like(half), task_types=task_types
            )
            with context:
                loss = model(input_ids=half, labels=half).loss
            for gate_sums in context.stacked():
                loss = loss + router_loss(gate_sums, context.token_counts, task_types).sum()
            loss = loss / len(ids_BS.split(2))
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def batch() -> Tensor:
    return torch.randint(0, 60, (4, 9), generator=torch.Generator().manual_seed(5))


def train_sharded(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), torch.distributed.init_device_mesh("cpu", (2,))
    model = adapted_model()
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = torch.stack(train(model, batch()[2 * rank : 2 * rank + 2]))
    torch.distributed.all_reduce(losses)
    whole = {
        name: each.full_tensor() for name, each in model.named_parameters() if each.requires_grad
    }
    if rank == 0:
        save_file(whole | {"losses": losses / 2}, Path(folder, "sharded.safetensors"))
    torch.distributed.barrier()
    os._exit(0)  # without the teardown of gloo's threads, where a process was seen to abort


def test_case_40_sharded_adapted_layers_train_as_whole_ones(tmp_path: Path) -> None:
    run_in_two_processes("test_sharded_layers", "train_sharded", tmp_path)
    sharded, model = load_file(tmp_path / "sharded.safetensors"), adapted_model()
    losses = torch.stack(train(model, batch()))
    torch.testing.assert_close(sharded.pop("losses"), losses, rtol=1e-5, atol=0)
    whole = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert sharded.keys() == whole.keys()
    for name, each in whole.items():
        torch.testing.assert_close(sharded[name], each.detach(), rtol=1e-4, atol=1e-5, msg=name)
