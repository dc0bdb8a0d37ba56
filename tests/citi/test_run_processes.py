"""Two processes, as `accelerate launch` starts them: the same gradients, one run directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from run_cases import Items, adapted_model, adapter_tensors, make_trainer, tiny_recipe
from safetensors.torch import load_file, save_file
from torch import Tensor
from two_processes import run_in_two_processes

from citi.run import train
from citi.run_directory import RunDirectory
from citi.stages import MI, UCO

SHORT = {"epochs_mi": 1.0, "save_steps": 2}


def train_stages(folder: Path, *, processes: int) -> dict[str, dict[str, Tensor]]:
    """Trained parameters and losses of two stages; windows of two samples in any case."""
    results = {}
    for stage in (MI, UCO):
        model = adapted_model(lora_alpha=40)
        trainer = make_trainer(
            model,
            folder / "out",
            Items(8),
            stage=stage,
            batch_size=1,
            accumulation=2 // processes,
            router_loss_weight=0.5,
            base_kl_weight=0.7,
            settings={"optim": "sgd", "ddp_find_unused_parameters": False},
        )
        trainer.train()
        result = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        rows = [row for row in trainer.state.log_history if "router_loss" in row]
        for key in ("loss", "ce_loss", "router_loss", "base_kl"):
            result[key] = torch.tensor([row[key] for row in rows])
        if trainer.is_world_process_zero() and processes > 1:
            save_file(result, folder / f"{stage.name}.safetensors")
        results[stage.name] = result
    return results


def train_in_two(folder: str) -> None:
    train_stages(Path(folder), processes=2)
    train(tiny_recipe(Path(folder), **SHORT))


def test_case_39_two_processes_train_as_one_and_share_a_run(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    run_in_two_processes("test_run_processes", "train_in_two", tmp_path)
    alone = train_stages(tmp_path / "alone", processes=1)
    for name, result in alone.items():
        together = load_file(tmp_path / f"{name}.safetensors")
        assert together.keys() == result.keys()
        for key, tensor in result.items():
            torch.testing.assert_close(together[key], tensor, rtol=1e-4, atol=1e-7, msg=key)

    run = RunDirectory.of(tiny_recipe(tmp_path))
    assert json.loads(run.environment_file.read_text())["num_processes"] == 2
    assert run.load_manifest().finished
    assert run.load_manifest().phases["rp"]["steps"] == 3, "eighteen samples, two times three"
    assert all(tensor.isfinite().all() for tensor in adapter_tensors(run.adapter).values())
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [
        (stage, step) for stage in ("rp", "mi", "uco") for step in (1, 2, 3)
    ]
