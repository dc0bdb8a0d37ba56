"""How far the model has moved from its base on general answers, as a term of the loss.

::

    base_kl = Σ over answer tokens of general samples, KL(p_base || p_model)
    loss    = cross entropy + router loss + base_kl_weight · base_kl / (all answer tokens)

The base is the same model without its adapters, so nothing is held twice; it costs one forward of
the general samples more. The paper has no such term. It is the distillation of "Learning without
Forgetting" (arXiv 1606.09282) at temperature 1, with the general data of the mix as inputs.

Legend: B samples, P positions with logits, N answer tokens of general samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from citi.adapters import without_adapters
from citi.adapters.original_modules import has_adapters
from citi.evaluation.inference import evaluation_mode

IGNORED_LABEL = -100
_CHUNK = 1024
_NOT_OF_THE_MODEL = ("labels", "shift_labels", "num_items_in_batch", "task_types")


@dataclass(frozen=True)
class BaseAnswers:
    """What the base predicts where general samples have answer tokens.

    Attributes:
        chosen_BP: Those positions of the batch.
        logits_NV: The base's logits there.
    """

    chosen_BP: Tensor
    logits_NV: Tensor

    def divergence(self, logits_BPV: Tensor) -> Tensor:
        """Σ over the N tokens of KL(p_base || p_model), in nats; a scalar, fp32.

        No more than a chunk of tokens has its probabilities in memory, forward or backward.
        """
        ours_NV = logits_BPV[self.chosen_BP]
        total = ours_NV.new_zeros((), dtype=torch.float32)
        for ours, base in zip(ours_NV.split(_CHUNK), self.logits_NV.split(_CHUNK), strict=True):
            total = total + checkpoint(_summed_kl, ours, base, use_reentrant=False)
        return total


def targets_of(labels: Tensor) -> Tensor:
    """What each position predicts: the label behind it; the last position predicts nothing."""
    return functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]


def base_answers(
    model: nn.Module, inputs: Mapping[str, Any], task_types: Tensor
) -> BaseAnswers | None:
    """Run the base on the general samples of a batch.

    Args:
        model: With adapters, which are taken out for the call; see `refuse_without_adapters`.
        inputs: What the model takes, with `labels` or `shift_labels`; per-sample tensors have B
            rows.
        task_types: (B,), 1 tool, 0 general.
    Returns:
        None if no general sample of the batch has an answer token.
    Raises:
        ValueError: The batch has no labels.
    """
    targets_BP = inputs.get("shift_labels")
    if targets_BP is None:
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                f"base_kl_weight wants `labels` in every training batch, got {sorted(inputs)}"
            )
        targets_BP = targets_of(labels)
    is_general_B = task_types.to(targets_BP.device) == 0
    chosen_BP = (targets_BP != IGNORED_LABEL) & is_general_B[:, None]
    rows = chosen_BP.any(1).nonzero().squeeze(1)
    if not rows.numel():
        return None
    with torch.no_grad(), as_base(model):
        logits = model(**_rows_of(inputs, rows, num_samples=len(chosen_BP))).logits
    return BaseAnswers(chosen_BP, logits[chosen_BP[rows]])


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """The model as its base, in evaluation mode, while the block lasts.

    PEFT's `disable_adapter()` would turn `requires_grad` on for the whole adapter when it ends.
    """
    with evaluation_mode(model), without_adapters(model):
        yield


def refuse_without_adapters(model: nn.Module) -> None:
    """Raise ValueError unless the model has adapters that can be taken out."""
    if not has_adapters(model):
        raise ValueError(
            "base_kl_weight wants a PEFT model, whose base is the model without its adapters; got "
            f"{type(model).__name__} without adapters, which would be compared with itself. Set "
            "base_kl_weight to 0"
        )


def _summed_kl(logits_NV: Tensor, base_logits_NV: Tensor) -> Tensor:
    ours, base = (functional.log_softmax(each.float(), -1) for each in (logits_NV, base_logits_NV))
    return functional.kl_div(ours, base, reduction="sum", log_target=True)


def _rows_of(inputs: Mapping[str, Any], rows: Tensor, *, num_samples: int) -> dict[str, Any]:
    """The model's own inputs of some samples; `logits_to_keep` names positions, not samples."""
    return {
        name: value[rows]
        if torch.is_tensor(value) and value.shape[:1] == (num_samples,) and name != "logits_to_keep"
        else value
        for name, value in inputs.items()
        if name not in _NOT_OF_THE_MODEL
    }
