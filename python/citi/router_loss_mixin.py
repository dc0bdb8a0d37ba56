"""The router loss, and the divergence from the base, for any Trainer.

How the parts of the loss are scaled (read in transformers 5.23, `Trainer.training_step`,
`Trainer.compute_loss` and `_get_num_items_in_batch`; the same in 5.17):

- A model that takes loss arguments divides its summed cross entropy by `num_items_in_batch`, the
  label count of the whole accumulation window over all processes. The Trainer then divides nothing
  by the accumulation steps, and multiplies the loss by the number of processes, because DDP takes
  the mean of the gradients. Cross entropy so does not depend on the split into micro-batches.
- Any other loss is the mean of one micro-batch, and the Trainer divides it by
  `current_gradient_accumulation_steps`, the micro-batches of this window (the last may be short).

The router loss is added after `super().compute_loss`, so that the process count never multiplies
it, and is divided by the window's micro-batches exactly when the Trainer will not do so. By its
definition (arXiv 2409.13202, eq. 8 and 9) it pools the samples of one micro-batch on one process;
the window's router loss is the mean over its micro-batches and processes.

The divergence from the base (`citi.base_kl`) is a sum over tokens, as cross entropy is, and is
scaled as that is: it does not depend on the split into micro-batches either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import citi_kernels
from citi.base_kl import IGNORED_LABEL, BaseAnswers, base_answers, refuse_without_adapters


class RouterLossMixin:
    """Adds the router loss to a Trainer: `class MyTrainer(RouterLossMixin, SFTTrainer)`.

    ::

        loss = super().compute_loss(...) + router_loss_weight * sum over layers of router_loss
               + base_kl_weight * KL to the base model, on answers of general samples

    Batches carry `task_types` (B,), 1 tool and 0 general, besides what the model takes; rows are
    samples, so packed and padding-free batches are refused. Evaluation needs no task types and its
    loss is the cross entropy alone. Each log line gets `ce_loss`, `router_loss` (before its
    weight), the mean backbone gate over layers and tokens, `backbone_gate_tool` and
    `backbone_gate_general`, and with a `base_kl_weight` `base_kl`, the mean over the answer tokens
    of general samples; the values stay on the device until then.

    Args:
        router_loss_weight: β; 0 leaves the loss out and makes task types optional.
        router_loss: "cv2" or "dispersion", see `citi_kernels.router_loss`.
        delta: δ of the importance vectors.
        base_kl_weight: Weight of the divergence from the base, see `citi.base_kl`; 0 leaves it out,
            and its second forward with it.
        *args, **kwargs: The Trainer's own.
    Raises:
        ValueError: In training, `task_types` is missing or its length is not the number of rows;
            or no MOLoRA layer took part, so that the loss would be dead; or DataParallel is on; or
            base_kl_weight is set and the model has no adapters.
    """

    def __init__(
        self,
        *args: Any,
        router_loss_weight: float = 0.01,
        router_loss: str = "cv2",
        delta: float = 0.95,
        base_kl_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.router_loss_weight = router_loss_weight
        self.router_loss_kind = router_loss
        self.router_loss_delta = delta
        self.base_kl_weight = base_kl_weight
        self._window = _LogWindow()
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"the routing context belongs to one process, but DataParallel would run "
                f"{self.args.n_gpu} threads; start with `accelerate launch`, or show one GPU only"
            )
        if base_kl_weight > 0:
            refuse_without_adapters(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        task_types = inputs.pop("task_types", None)
        labels = inputs.get("labels")
        context = self._routing_context(inputs, task_types) if model.training else None
        base = None
        if context is not None and self.base_kl_weight > 0:
            base = base_answers(self.accelerator.unwrap_model(model), inputs, task_types)
        wants_outputs = return_outputs or base is not None
        with contextlib.nullcontext() if context is None else context:
            result = super().compute_loss(
                model, inputs, return_outputs=wants_outputs, num_items_in_batch=num_items_in_batch
            )
        loss, outputs = result if wants_outputs else (result, None)
        if labels is not None:
            # Without a label the loss is 0 / 0.
            loss = torch.where(has_labels(labels), loss, torch.zeros_like(loss))
        if context is not None:
            loss = self._add_router_loss(loss, context, num_items_in_batch)
        if base is not None:
            loss = self._add_base_kl(loss, base, outputs["logits"], labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        without_types = {key: value for key, value in inputs.items() if key != "task_types"}
        return super().prediction_step(model, without_types, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._window = _LogWindow()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._window.read(self.accelerator, step=self.state.global_step)
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps the task type when the Trainer drops columns that `forward` does not name."""
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns
        columns += [name for name in ("task_type", "task_types") if name not in columns]

    def _routing_context(
        self, inputs: Mapping[str, Any], task_types: Tensor | None
    ) -> citi_kernels.RoutingContext:
        if task_types is None and (self.router_loss_weight > 0 or self.base_kl_weight > 0):
            raise ValueError(
                "the router loss and the divergence from the base want `task_types` in every "
                f"training batch (1 tool, 0 general), got {sorted(inputs)}; collate with "
                "citi.data.Collator, or set router_loss_weight=0 and base_kl_weight=0"
            )
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(inputs["input_ids"])
        if task_types is not None and len(task_types) != len(mask):
            raise ValueError(
                f"task_types has {len(task_types)} entries for {len(mask)} rows; the router loss "
                "wants one sample a row (no packing, no padding-free batches)"
            )
        return citi_kernels.RoutingContext.from_attention_mask(mask, task_types=task_types)

    def _add_router_loss(
        self,
        loss: Tensor,
        context: citi_kernels.RoutingContext,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        layers = context.stacked()
        if self.router_loss_weight > 0 and not layers:
            raise ValueError(
                f"router_loss_weight is {self.router_loss_weight:g}, but no MOLoRA layer ran in "
                "this batch, so the router loss would be dead; attach a MoLoraConfig adapter, or "
                "set router_loss_weight=0"
            )
        micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)
        spans_window = self._loss_spans_window(num_items_in_batch)
        share = 1 / micro_batches if spans_window else 1.0
        cross_entropy = loss.detach()
        routing = loss.new_zeros(())
        if self.router_loss_weight > 0:
            for gate_sums_LBG in layers:
                per_layer_L = citi_kernels.router_loss(
                    gate_sums_LBG,
                    context.token_counts,
                    context.task_types,
                    delta=self.router_loss_delta,
                    kind=self.router_loss_kind,
                )
                routing = routing + per_layer_L.sum().to(loss.device)
            loss = loss + self.router_loss_weight * share * routing
        self._window.add(
            cross_entropy if spans_window else cross_entropy / micro_batches,
            routing.detach() / micro_batches,
            context,
            step=self.state.global_step,
        )
        return loss

    def _add_base_kl(
        self,
        loss: Tensor,
        base: BaseAnswers,
        logits: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Scaled as `super().compute_loss` scales the cross entropy."""
        divergence = base.divergence(logits)
        self._window.add_base_kl(divergence.detach(), base.chosen_BP.sum())
        if num_items_in_batch is None or not self._loss_spans_window(num_items_in_batch):
            num_items = (labels[..., 1:] != IGNORED_LABEL).sum()
            return loss + self.base_kl_weight * divergence.to(loss.device) / num_items
        shares = 1
        if self.args.average_tokens_across_devices:
            shares = self.accelerator.num_processes // self.get_tp_size()
        scale = self.base_kl_weight * shares / num_items_in_batch
        return loss + scale * divergence.to(loss.device)

    def _loss_spans_window(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether `training_step` will leave out its division by the accumulation steps."""
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return declared
        return (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        ) or self.compute_loss_func is not None


class _LogWindow:
    """Sums between two log lines, on the device."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.base_kl: Tensor | None = None
        self.first_step = 0

    def add(
        self,
        cross_entropy: Tensor,
        routing: Tensor,
        context: citi_kernels.RoutingContext,
        *,
        step: int,
    ) -> None:
        values = torch.stack([cross_entropy.float(), routing.float(), *_gate_totals(context)])
        if self.sums is None:
            self.sums, self.first_step = torch.zeros_like(values), step
        self.sums += values

    def add_base_kl(self, divergence: Tensor, num_tokens: Tensor) -> None:
        values = torch.stack([divergence, num_tokens.to(divergence)])
        self.base_kl = values if self.base_kl is None else self.base_kl + values

    def read(self, accelerator: Any, *, step: int) -> dict[str, float]:
        """The means since the last call; losses per optimizer step, gates per token and layer."""
        if self.sums is None:
            return {}
        # A process whose batches had no general sample must take part all the same.
        base_kl = self.sums.new_zeros(2) if self.base_kl is None else self.base_kl.to(self.sums)
        sums = torch.cat([self.sums, base_kl])
        values = accelerator.reduce(sums, reduction="sum").tolist()
        self.sums = self.base_kl = None
        steps = max(step - self.first_step, 1) * accelerator.num_processes
        logs = {"ce_loss": values[0] / steps, "router_loss": values[1] / steps}
        for kind, gates, tokens in (("tool", *values[2:4]), ("general", *values[4:6])):
            if tokens:
                logs[f"backbone_gate_{kind}"] = gates / tokens
        divergence, tokens = values[6:]
        if tokens:
            logs["base_kl"] = divergence / tokens
        return logs


@torch.no_grad()
def _gate_totals(context: citi_kernels.RoutingContext) -> list[Tensor]:
    """Backbone gate and token count, summed over layers: of tool samples, then of general ones."""
    layers = context.stacked()
    counts_B = context.token_counts.float()
    if not layers or context.task_types is None:
        return [counts_B.new_zeros(())] * 4
    device = counts_B.device
    gates_B = sum(gate_sums_LBG[..., 0].sum(0).to(device) for gate_sums_LBG in layers)
    tokens_B = counts_B * sum(len(gate_sums_LBG) for gate_sums_LBG in layers)
    is_tool_B = context.task_types.to(device) == 1
    return [
        (values * chosen).sum()
        for chosen in (is_tool_B, ~is_tool_B)
        for values in (gates_B, tokens_B)
    ]


def has_labels(labels: Tensor) -> Tensor:
    """Whether any position predicts something; position 0 of a row is predicted by nothing."""
    return (labels[..., 1:] != IGNORED_LABEL).any()
