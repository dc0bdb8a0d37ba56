"""One stage as one Trainer run: its settings, its checkpoints, its way back after a kill."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from citi.checkpoints import (
    checkpoint_step,
    discard_incomplete,
    discard_older,
    last_complete_checkpoint,
)
from citi.metrics_file import MetricsWriter, rewind_metrics
from citi.observer import RunObserver
from citi.processes import this_process
from citi.recipe import Recipe
from citi.stages import MI, RP, STAGES, UCO, Stage
from citi.trainer import CitiTrainer

# From a stage and the tokenizer: its data set, and the collator that makes batches of it. A data
# set whose `shuffle` is False keeps its order.
TrainingData = Callable[[Stage, Any], tuple[Dataset, Any]]

WARM_UP = 0.1
# Epoch e of a stage shuffles with data seed + e: the stages lie far apart.
_DATA_SEEDS = {RP.name: 0, MI.name: 1000, UCO.name: 2000}


def recipe_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """The three stages with the recipe's epochs and learning rates."""
    settings = {
        RP.name: (recipe.learning_rate, recipe.epochs_rp),
        MI.name: (recipe.learning_rate, recipe.epochs_mi),
        UCO.name: (recipe.uco_learning_rate, recipe.epochs_uco),
    }
    return tuple(
        dataclasses.replace(s, learning_rate=settings[s.name][0], epochs=settings[s.name][1])
        for s in STAGES
    )


def stage_arguments(
    recipe: Recipe,
    stage: Stage,
    *,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    shuffle: bool = True,
) -> TrainingArguments:
    """The Trainer's settings for a stage: cosine schedule, 10 % warm-up, fp32 trainables.

    Args:
        recipe: Batch sizes, seed, checkpoints, reporting.
        stage: Learning rate and epochs.
        folder: Where its checkpoints go.
        device: Of the model.
        dtype: Of the base; bf16 and fp16 bases train under autocast.
        shuffle: Whether each epoch has an order of its own.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=stage.learning_rate,
        num_train_epochs=stage.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=WARM_UP,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        train_sampling_strategy="random" if shuffle else "sequential",
        seed=recipe.seed,
        data_seed=recipe.seed + _DATA_SEEDS.get(stage.name, 0),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        report_to=recipe.report_to.split(","),
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        **_checkpointing(recipe.gradient_checkpointing),
    )
    return _on_one_device(arguments)


def train_stage(
    model: nn.Module,
    dataset: Dataset,
    collator: Any,
    *,
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    metrics_file: Path,
    observer: RunObserver,
    dtype: torch.dtype,
    routed: bool = True,
) -> dict[str, Any]:
    """Train one stage in place, from its last complete checkpoint if there is one.

    Args:
        model: The PEFT model as the stage before left it.
        dataset: Rendered samples, or items of another kind that `collator` knows.
        collator: Makes batches with `task_types` of them.
        recipe: Settings.
        stage: What trains, how fast, how long.
        folder: Its checkpoints; what a killed save left there is removed.
        metrics_file: Gets a row per log line; rows past the checkpoint are dropped first.
        observer: Watches.
        dtype: Of the base.
        routed: False for plain LoRA: no router loss, and what trains is left as it is.
    Returns:
        Facts for the manifest: steps, resumed_from, num_trainable, num_masked_batches.
    Raises:
        TrainingError: The loss is not finite, or too many batches have no labels.
    """
    processes = this_process()
    removed = discard_incomplete(folder) if processes.is_main_process else []
    processes.wait_for_everyone()
    checkpoint = last_complete_checkpoint(folder)
    step = checkpoint_step(checkpoint) if checkpoint else 0
    if removed:
        observer.line(f"left out {len(removed)} half-written checkpoint(s) of stage {stage.name}")
    if checkpoint:
        observer.line(f"stage {stage.name} goes on after step {step}")
    if processes.is_main_process:
        rewind_metrics(metrics_file, stage.name, step=step)
    device = next(model.parameters()).device
    use_cache = model.config.use_cache  # the Trainer switches it off for good
    trainer = CitiTrainer(
        model=model,
        args=stage_arguments(
            recipe,
            stage,
            folder=folder,
            device=device,
            dtype=dtype,
            shuffle=getattr(dataset, "shuffle", True),
        ),
        train_dataset=dataset,
        data_collator=collator,
        stage=stage if routed else None,
        router_loss=recipe.router_loss,
        router_loss_weight=recipe.router_loss_weight if routed else 0.0,
        delta=recipe.delta,
        base_kl_weight=recipe.base_kl_weight,
        callbacks=[MetricsWriter(metrics_file, stage.name, observer)],
    )
    trainer.add_callback(_OlderCheckpoints())  # last, when the newest checkpoint has its seal
    if checkpoint is None or not trainer.take_over(checkpoint):
        trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    model.config.use_cache = use_cache
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "steps": trainer.state.global_step,
        "resumed_from": step,
        "num_trainable": sum(p.numel() for p in trainable),
        "num_masked_batches": trainer.num_masked_batches,
    }


class _OlderCheckpoints(TrainerCallback):
    """Keeps the newest checkpoint, and the one before until the newest is sealed."""

    def on_save(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            discard_older(args.output_dir)


def _checkpointing(enabled: bool) -> dict[str, Any]:
    """The activation checkpointing arguments, by the name that this transformers gives them."""
    known = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    new, old = "activation_checkpointing", "gradient_checkpointing"
    name = new if new in known else old
    return {name: enabled, f"{name}_kwargs": {"use_reentrant": False} if enabled else None}


def _on_one_device(arguments: TrainingArguments) -> TrainingArguments:
    """Without a launcher the Trainer would spread over all GPUs by threads; use the first alone."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
