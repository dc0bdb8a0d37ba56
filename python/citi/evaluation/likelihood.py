"""The negative log-likelihood of reference answers: how surprised a model is by a right answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from citi.data.render import IGNORED, Renderer
from citi.data.sample import Sample
from citi.evaluation.inference import (
    Progress,
    base_model,
    device_of,
    inference,
    length_sorted_batches,
    pad,
)
from citi.positions import length_limit

_ROWS_IN_FP32 = 512


@dataclass(frozen=True)
class AnswerLikelihood:
    """Negative log-likelihoods of a set's reference answers.

    Attributes:
        nll: per sample, the sum over its answer tokens, in nats; 0 where no token was counted.
        num_tokens: per sample, the answer tokens counted; 0 where the cut left none.
    """

    nll: tuple[float, ...]
    num_tokens: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Nats a token over the set: Σ nll / Σ num_tokens; NaN without tokens."""
        total = sum(self.num_tokens)
        return math.fsum(self.nll) / total if total else math.nan

    @property
    def per_sample(self) -> list[float]:
        """Nats a token of each sample; NaN for a sample without tokens."""
        pairs = zip(self.nll, self.num_tokens, strict=True)
        return [nll / tokens if tokens else math.nan for nll, tokens in pairs]

    @property
    def num_skipped(self) -> int:
        """Samples of which no answer token was counted."""
        return self.num_tokens.count(0)


def answer_nll(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    max_length: int = 4096,
    padding_side: Literal["left", "right"] = "right",
    progress: Progress | None = None,
) -> AnswerLikelihood:
    """Measures the last assistant turn of each sample under teacher forcing.

        nll[i] = - Σ_{t: labels[i, t] ≠ -100} log softmax(logits[i, t - 1])[labels[i, t]]

    Logits are made at the answers' positions only (where the model's `forward` takes
    `logits_to_keep`), the log-softmax is fp32 in slices, sums are fp64: a vocabulary of 49,152
    over a whole 4,096-token batch in fp32 would not fit on a laptop.

    Args:
        model: a Hugging Face causal LM or a PeftModel around one; its mode is restored.
        tokenizer: its tokenizer.
        samples: each ending in its reference answer.
        batch_size: samples a batch, of like length.
        max_length: where a sample is cut, in tokens; less where the model has fewer positions.
        padding_side: makes no difference to the result.
        progress: called with (samples done, all samples, note).

    Returns:
        sums and token counts in the order of `samples`.

    Raises:
        ValueError: `batch_size` is less than one.
        DataError: the chat template refuses a sample.
    """
    renderer = Renderer(tokenizer, max_length=length_limit(model, max_length))
    rendered = [renderer.render(sample) for sample in samples]
    rows = [(sample.input_ids, sample.labels) for sample in rendered]
    nll = [0.0] * len(rows)
    counts = [sum(label != IGNORED for label in labels[1:]) for _, labels in rows]
    done = counts.count(0)
    measured = [index for index, count in enumerate(counts) if count]
    with inference(model):
        for batch in length_sorted_batches([len(rows[i][0]) for i in measured], batch_size):
            indices = [measured[i] for i in batch]
            sums = _batch_nll(model, [rows[i] for i in indices], padding_side)
            for index, value in zip(indices, sums, strict=True):
                nll[index] = value
            done += len(indices)
            if progress is not None:
                progress(done, len(rows), "answer likelihood")
    return AnswerLikelihood(tuple(nll), tuple(counts))


def _batch_nll(
    model: nn.Module,
    rows: list[tuple[list[int], list[int]]],
    padding_side: Literal["left", "right"],
) -> list[float]:
    """The answers' summed NLL of one batch, per row."""
    device = device_of(model)
    input_ids, mask = pad([tokens for tokens, _ in rows], 0, side=padding_side)
    labels, _ = pad([labels for _, labels in rows], IGNORED, side=padding_side)
    next_is_answer = labels[:, 1:] != IGNORED
    positions = next_is_answer.any(dim=0).nonzero().squeeze(1)
    logits = _logits_at(model, input_ids.to(device), mask.to(device), positions.to(device))
    chosen = next_is_answer[:, positions]
    nll = _token_nll(logits[chosen.to(device)], labels[:, positions + 1][chosen].to(device))
    per_row = torch.zeros(len(rows), dtype=torch.float64)
    row_of_token = chosen.nonzero()[:, 0]
    return per_row.index_add_(0, row_of_token, nll.double().cpu()).tolist()


def _logits_at(
    model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logits (B, len(positions), V) at the given columns of the batch."""
    accepted = inspect.signature(base_model(model).forward).parameters
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in accepted:
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    if "logits_to_keep" in accepted:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def _token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax at the targets: (n, V), (n,) → (n,) fp32, a slice of rows at a time."""
    parts = zip(logits.split(_ROWS_IN_FP32), targets.split(_ROWS_IN_FP32), strict=True)
    return torch.cat([F.cross_entropy(x.float(), t, reduction="none") for x, t in parts])
