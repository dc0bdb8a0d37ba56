"""One micro-batch as importance scoring sees it: sequences, answer tokens, weights of the loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from citi.placement import runs_on

_IGNORED_LABEL = -100


@dataclass(frozen=True)
class ScoringBatch:
    """What one forward and backward needs. All but `inputs` lies on the CPU.

    Attributes:
        inputs: keyword arguments of the model, on its input device.
        predictors: (B, S) bool, the positions whose logits predict an answer token.
        targets: (A,) int64, these answer tokens.
        weights: (A,) fp64, so that the loss is Σ weights · CE.
        valid: (B·S,) bool, tokens of sequences that have answer tokens; None if all are.
        num_samples, num_tokens, num_answers: counts over these sequences.
    """

    inputs: dict[str, Tensor | None]
    predictors: Tensor
    targets: Tensor
    weights: Tensor
    valid: Tensor | None
    num_samples: int
    num_tokens: int
    num_answers: int


def prepare_batch(
    model: nn.Module, batch: Mapping[str, Tensor], *, per_sequence: bool
) -> ScoringBatch:
    """Find the sequences of a batch and what their loss counts.

    A sequence is the run of real tokens of one row, or, with `position_ids`, each part of it that
    starts where they do not go on by one (packing). A sequence's first token is never predicted,
    so that left padding, right padding and packing count the same tokens.

    Args:
        model: decides the device, and whether position ids can be passed.
        batch: see `citi.component_importance`.
        per_sequence: the loss is the sum of every sequence's own mean; else the batch's mean.

    Raises:
        ValueError: a key is missing, shapes differ, or a packed batch meets a model that takes no
            position ids.
    """
    ids, labels, real, given = _read(batch)
    positions = (real.long().cumsum(-1) - 1).clamp(min=0) if given is None else given
    follows = _shift(real) & (True if given is None else positions == _shift(positions) + 1)
    first = real & ((positions == 0) if given is None else ~follows)
    sequence = (first.flatten().cumsum(0) - 1).view_as(ids)
    answers = real & follows & (labels != _IGNORED_LABEL) & ~first
    num_sequences = int(first.sum())
    answers_per_sequence = torch.bincount(sequence[answers], minlength=num_sequences)
    valid = real.clone()
    valid[real] = answers_per_sequence[sequence[real]] > 0
    num_answers = int(answers.sum())
    divisor = answers_per_sequence[sequence[answers]] if per_sequence else num_answers
    return ScoringBatch(
        inputs=_model_inputs(model, ids, real, positions, first),
        predictors=torch.cat([answers[:, 1:], torch.zeros_like(answers[:, :1])], dim=1),
        targets=labels[answers],
        weights=torch.ones(num_answers, dtype=torch.float64) / divisor,
        valid=None if valid.all() else valid.flatten(),
        num_samples=int((answers_per_sequence > 0).sum()),
        num_tokens=int(valid.sum()),
        num_answers=num_answers,
    )


def call_model(model: nn.Module, batch: ScoringBatch) -> Tensor:
    """Run the model; logits of the predicting positions, (A, vocabulary), row by row.

    Where the model can leave out positions, the head runs only on columns that predict something.
    """
    extra = {}
    columns = batch.predictors.any(0).nonzero().flatten()
    if "logits_to_keep" in _parameters(model) and len(columns) < batch.predictors.shape[1]:
        # An index on the CPU fits whatever device the last layer lies on.
        extra["logits_to_keep"] = columns
    logits = model(**batch.inputs, use_cache=False, **extra).logits
    predictors = batch.predictors[:, columns] if extra else batch.predictors
    # Without padding between answers this is a view: logits are the largest tensor there is.
    return logits.flatten(0, 1) if predictors.all() else logits[predictors.to(logits.device)]


def _read(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    missing = [key for key in ("input_ids", "labels") if key not in batch]
    if missing:
        raise ValueError(f"batch must hold input_ids and labels, got {sorted(batch)}")
    ids = batch["input_ids"].detach().cpu()
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(f"input_ids must be (B, S) and not empty, got {tuple(ids.shape)}")
    found = {"labels": batch["labels"]}
    found |= {key: batch.get(key) for key in ("attention_mask", "position_ids")}
    for key, value in found.items():
        if value is not None and value.shape != ids.shape:
            raise ValueError(
                f"{key} must have the shape of input_ids, {tuple(ids.shape)}, got "
                f"{tuple(value.shape)}"
            )
    labels, mask, positions = (v if v is None else v.detach().cpu() for v in found.values())
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    return ids, labels, real, positions


def _model_inputs(
    model: nn.Module, ids: Tensor, real: Tensor, positions: Tensor, first: Tensor
) -> dict[str, Tensor | None]:
    takes_positions = "position_ids" in _parameters(model)
    packed = bool((first.sum(-1) > 1).any())
    if packed and not takes_positions:
        raise ValueError(
            "position_ids that restart (packed sequences) need a model whose forward takes "
            f"position_ids, got {type(model).__name__}; score unpacked batches"
        )
    if packed:
        # transformers keeps sequences apart by position ids only without a mask; so padding
        # becomes a sequence of its own.
        positions = torch.where(real, positions, _positions_in_runs(~real))
    device = runs_on(model.get_input_embeddings())
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": None if packed else real.to(device, torch.int64),
    }
    if takes_positions:
        inputs["position_ids"] = positions.to(device)
    return inputs


def _positions_in_runs(mask: Tensor) -> Tensor:
    """0, 1, 2 … within every run of True of each row."""
    columns = torch.arange(mask.shape[1]).expand_as(mask)
    starts = torch.where(mask & ~_shift(mask), columns, 0).cummax(-1).values
    return columns - starts


def _shift(tensor: Tensor) -> Tensor:
    """Every entry's left neighbour, 0 for the first column."""
    return torch.cat([torch.zeros_like(tensor[:, :1]), tensor[:, :-1]], dim=1)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
