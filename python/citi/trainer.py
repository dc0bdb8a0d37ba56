"""The Trainer that a stage runs on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from citi.base_kl import targets_of
from citi.checkpoints import (
    SEAL,
    checkpoint_stage,
    is_complete,
    last_complete_checkpoint,
    seal_checkpoint,
)
from citi.durable import WriteError
from citi.processes import refuse_sharding
from citi.router_loss_mixin import IGNORED_LABEL, RouterLossMixin, has_labels
from citi.stages import Stage, apply_stage, check_trainable, raise_trainables_to_fp32

__all__ = [
    "CitiTrainer",
    "MaskedBatchError",
    "NonFiniteLossError",
    "RouterLossMixin",
    "TrainingError",
]


class TrainingError(ValueError):
    """Training stopped because going on would be wrong; the message says why and what to do."""


class NonFiniteLossError(TrainingError):
    """The next optimizer step would have spoiled the weights."""


class MaskedBatchError(TrainingError):
    """Too many batches have no label to learn from."""


class CitiTrainer(RouterLossMixin, Trainer):
    """The Trainer of one stage; with `stage=None` a plain Trainer with the same watch kept.

    On top of `RouterLossMixin`: trains exactly the stage's parameters, in fp32, and checks this by
    name at every start and resume; stops before the optimizer step when the loss or a gradient is
    not finite; lets a batch without labels count as loss 0 and stops above a share of them; seals
    every checkpoint, resumes from sealed ones only, and starts afresh (weights only) from a
    checkpoint of another stage.

    Args:
        stage: What trains; None trains what requires gradients already.
        adapter: Name of the adapter.
        max_masked_share: Share of the run's batches that may be without labels.
        *args, **kwargs: RouterLossMixin's and the Trainer's own.
    Raises:
        NonFiniteLossError, MaskedBatchError: See above.
        TrainingError: `train` was told to resume from a checkpoint that is not complete.
        StageError: The model has no parameters for the stage, or trains others.
        ValueError: FSDP or DeepSpeed would spread the parameters over processes; the base is in 16
            bit and the arguments switch no autocast on; or `adapter` is not the active one.
    """

    def __init__(
        self,
        *args: Any,
        stage: Stage | None = None,
        adapter: str = "default",
        max_masked_share: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        refuse_sharding()
        active = getattr(self.model, "active_adapters", None)
        if stage is not None and active is not None and adapter not in active:
            raise ValueError(
                f"adapter: stage {stage.name} trains {adapter!r}, but active are {list(active)}; "
                "call model.set_adapter first"
            )
        self.stage = stage
        self.adapter = adapter
        self.max_masked_share = max_masked_share
        self.num_masked_batches = 0
        self._stop_flags: Tensor | None = None
        self._takes_positions = (
            self.compute_loss_func is None
            and self.args.label_smoothing_factor == 0
            and takes_positions(self.model)
        )
        self._trainable_names = self._set_trainable()
        self._refuse_mixed_precision(raise_trainables_to_fp32(self.model))
        self.remove_callback(PrinterCallback)
        self.add_callback(_StageGuard(self._trainable_names))
        self.add_callback(_CheckpointSealer(stage.name if stage else None))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and not is_complete(resume_from_checkpoint):
            raise TrainingError(
                f"{resume_from_checkpoint} is no complete checkpoint: its {SEAL} is missing, or "
                "does not fit its files; resume_from_checkpoint=True takes the last complete one"
            )
        if resume_from_checkpoint and self.stage is not None:
            saved_in = checkpoint_stage(resume_from_checkpoint)
            if saved_in is not None and saved_in != self.stage.name:
                folder = Path(resume_from_checkpoint, self.adapter)  # PEFT's, but for "default"
                self.model.load_adapter(
                    str(folder if folder.is_dir() else resume_from_checkpoint),
                    self.adapter,
                    is_trainable=True,
                )
                resume_from_checkpoint = None
        checkpoint = str(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            _undo_prepare(self.model)

    def take_over(self, checkpoint: str | Path) -> bool:
        """Load a checkpoint if it stands at its run's last step; return whether it does.

        There `train` would have nothing to do, but within a fraction of an epoch takes a step more.
        """
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        if state.global_step < state.max_steps:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self._set_trainable()
        self.state = state
        return True

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model.training and self._takes_positions:
            inputs = answers_only(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # Loading a checkpoint's adapter may have changed `requires_grad`.
        self._set_trainable()
        return super().create_optimizer(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        labels = inputs.get("labels")
        loss = super().training_step(model, inputs, num_items_in_batch)
        masked = ~has_labels(labels) if labels is not None else torch.tensor(False)
        flags = torch.stack([~loss.isfinite().all(), masked.to(loss.device)]).long()
        self._stop_flags = flags if self._stop_flags is None else self._stop_flags + flags
        if self.accelerator.sync_gradients:
            self._stop_if_spoiled()
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except OSError as error:
            raise WriteError(Path(self.args.output_dir), error) from error

    def _set_trainable(self) -> list[str]:
        if self.stage is not None:
            return apply_stage(self.model, self.stage, self.adapter)
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    def _refuse_mixed_precision(self, raised: list[str]) -> None:
        """Parameters that were raised to fp32 multiply with 16-bit ones under autocast alone."""
        is_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        if raised and is_half and not (self.args.bf16 or self.args.fp16):
            raise ValueError(
                f"{raised[0]} trains in fp32 beside a base in 16 bit, which needs autocast: set "
                "bf16=True (or fp16=True) in the TrainingArguments, or load the base in fp32"
            )

    def _stop_if_spoiled(self) -> None:
        """The one look at the device per step: bad losses, bad gradients, masked batches."""
        bad_gradients = self._stop_flags.new_zeros(())
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # A GradScaler meets infinite gradients by design, and skips such a step itself.
        if gradients and getattr(self.accelerator, "scaler", None) is None:
            norms = torch.stack([n.to(bad_gradients.device) for n in _norms(gradients)])
            bad_gradients = (~norms.isfinite()).sum()
        bad_losses, masked, bad = torch.cat([self._stop_flags, bad_gradients[None]]).tolist()
        self._stop_flags = None
        if bad_losses or bad:
            raise NonFiniteLossError(self._describe_spoiled("loss" if bad_losses else "gradient"))
        self.num_masked_batches += masked
        batches = self.state.max_steps * self.args.gradient_accumulation_steps
        if masked and self.num_masked_batches > self.max_masked_share * batches:
            raise MaskedBatchError(
                f"{self._place()}: {self.num_masked_batches} of {batches} batches have no label to "
                f"learn from (more than {self.max_masked_share:.0%}); look at the loss mask with "
                "`citi data check`, and at max_length"
            )

    def _describe_spoiled(self, what: str) -> str:
        named = list(self.model.named_parameters())
        # A bad weight spoils the gradients of others, so weights are looked at first.
        bad = [f"{name} (its value)" for name, p in named if not p.isfinite().all()] or [
            f"{name} (its gradient)"
            for name, p in named
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        culprit = f"first bad parameter: {bad[0]}" if bad else "all parameters are finite"
        return (
            f"{self._place()}: the {what} is not finite; {culprit}. Stopped before the optimizer "
            f"step: the weights are those after step {self.state.global_step}. Ways out: a lower "
            "learning rate, dtype bf16 or fp32 instead of fp16, a look at the data of this step"
        )

    def _place(self) -> str:
        stage = f"stage {self.stage.name}, " if self.stage else ""
        return f"{stage}step {self.state.global_step + 1}"


def takes_positions(model: nn.Module) -> bool:
    """Whether the model computes logits at chosen positions, and its loss takes shifted labels.

    Not over several devices, where the positions would lie on the wrong one, nor with prompt
    learning, which puts positions of its own in front.
    """
    base = model
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return False
        base = model.get_base_model()
    parameters = inspect.signature(base.forward).parameters
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    on_one_device = len({p.device for p in base.parameters()}) == 1
    return (
        "logits_to_keep" in parameters and takes_rest and on_one_device and _has_common_loss(base)
    )


def _has_common_loss(base: nn.Module) -> bool:
    """Whether its `forward` hands its labels to transformers' loss; some compute their own."""
    try:
        return "self.loss_function(" in inspect.getsource(type(base).forward)
    except (OSError, TypeError):
        return False


def answers_only(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same batch and loss with logits at those positions only that predict an answer token.

    The head is a fifth of a small model's work, and its fp32 logits most of its memory.
    """
    labels = inputs.get("labels")
    if labels is None or "logits_to_keep" in inputs:
        return inputs
    targets = targets_of(labels)
    positions = (targets != IGNORED_LABEL).any(0).nonzero().squeeze(1)
    if not positions.numel():
        return inputs
    return {**inputs, "logits_to_keep": positions, "shift_labels": targets[:, positions]}


class _StageGuard(TrainerCallback):
    """Checks, by name, what trains and what the optimizer holds: at every start and resume."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        when = f"resumed at step {state.global_step}" if state.global_step else "at the start"
        check_trainable(model, self.names, when)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        wanted = {id(p) for name, p in model.named_parameters() if name in set(self.names)}
        if held != wanted:
            raise RuntimeError(
                f"{when}: the optimizer holds {len(held)} parameters, the stage trains "
                f"{len(wanted)}; make a new Trainer for each stage"
            )


class _CheckpointSealer(TrainerCallback):
    """Marks a checkpoint complete once every process has written its part."""

    def __init__(self, stage: str | None) -> None:
        self.stage = stage

    def on_save(self, args, state, control, **kwargs) -> None:
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
            seal_checkpoint(args.output_dir, state.global_step, stage=self.stage)


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(gradients)) if len(gradients) > 1 else [gradients[0].norm()]


def _undo_prepare(model: nn.Module) -> None:
    """Take back what Accelerate left on the model: its autocast wrapper around `forward`.

    The next stage has an Accelerator of its own, which would otherwise keep the old wrapper.
    """
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        model.__dict__.pop("forward", None)
    model.__dict__.pop("_is_accelerate_prepared", None)
