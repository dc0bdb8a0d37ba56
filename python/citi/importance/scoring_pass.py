"""Importance of a model's components on some data, scored without a weight gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from citi.importance.component_scores import ComponentScores
from citi.importance.recorder import ImportanceRecorder
from citi.importance.scoring_batch import ScoringBatch, call_model, prepare_batch
from citi.importance.totals import BatchCounts

Progress = Callable[[int, int | None, str], None]

# Gradients of an fp16 model underflow below 6e-8. A power of two is divided out exactly; on
# overflow the batch is run again with a smaller one.
_HALF_LOSS_SCALE = 2.0**12
_LOSS_SCALE_STEP = 2.0**4


def component_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    estimator: str = "token",
    granularity: str = "component",
    element_dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> ComponentScores:
    """Score every linear component of a causal LM on some data.

        I_h(D) = | θ_h · ∂L/∂θ_h |  =  | Σ_t x_t · dx_t |,   dx_t = Wᵀ g_t

    Estimators, with t over tokens and b over micro-batches (the items of `batches`):

        token       Σ_t | x_t · dx_t | / num_tokens,   L = Σ_sequences mean CE of its answer tokens
        batch       Σ_b | Σ_{t in b} x_t · dx_t |,     L = mean CE of the batch's answer tokens
        parameter   Σ_b Σ_ij | W_ij (∂L_b/∂W)_ij |,    L as for batch

    num_tokens is the number of answer tokens for components of the last decoder layer, and the
    number of real tokens minus one per sequence for all others.

    Granularities take the absolute value at a finer level than the component: of the sum over one
    output row, one input column, one attention head, or of each element W_ij x_tj g_ti by itself
    (`citi_kernels.ops.importance_reference` has the table). A component's score is then the sum
    of its entries. For `parameter` that is the same number at every granularity.

    What each is invariant to: all of them to the side and amount of padding, the order of batches
    and of sequences in a batch, and to packing a batch's sequences into one row. `token` also to
    the split into micro-batches, since a sequence's loss is its own mean wherever it stands; with
    one sequence per batch it is what the authors ran. `batch` and `parameter` take an absolute
    value per micro-batch of a mean over it, so the micro-batch is part of their definition: any
    other split gives other numbers (one sequence per batch is the split to compare by).

    Padding never counts, nor does a sequence without answer tokens. A packed row is one whose
    `position_ids` restart; the model must then keep the sequences apart by `position_ids` alone, as
    transformers' models do. A module that sees other rows than the batch's tokens (one expert's
    share) has all its rows counted: padding has no gradient. A weight used more than once is
    counted once, with all its uses.

    During the pass the model is in eval mode, no parameter requires grad, and its activation
    checkpointing, where switched on, stays on (non-reentrant). Everything is put back as it was,
    also after an exception or Ctrl-C. No weight gradient is allocated: what is kept is every x
    once (and, for `token` and `batch` by rows, every y), one buffer per component, and less than
    64 MiB of workspace.

    Args:
        model: a `transformers` causal LM without PEFT adapters, on any devices, in any floating
            dtype, or with quantised linears (not for "parameter" and "element"). Weights that
            Accelerate offloads (`device_map` with "cpu" or "disk") are fetched component by
            component, forward and backward.
        batches: mappings with `input_ids` and `labels` (B, S) int64, -100 where a token is no
            answer; optional `attention_mask` (B, S) and `position_ids` (B, S). Other keys are
            ignored. May be an iterator.
        estimator: see above.
        granularity: "component", "row", "column", "head" or "element".
        element_dtype: of the element scores: fp32, or bf16 with stochastic rounding.
        progress: called as `progress(done, total or None, note)` after every batch.
        group: processes that each score batches of their own; all get the scores of all batches
            together. None: this process alone, whatever others do.

    Returns:
        the scores; partial sums in fp32 or better on the device, totals in fp64 on the host.
        Batches without answer tokens, or with a NaN or infinite loss or score, are skipped as a
        whole and counted.

    Raises:
        ValueError: unknown estimator or granularity, a model without components or with PEFT
            adapters, weights that are sharded, a malformed batch, or no batch that could be scored.
        RuntimeError: a component ran with gradients off (reentrant checkpointing).

    Source: arXiv 2409.13202, eq. 4, and the authors' code for `token`; the loss of `token` at more
    than one sequence per batch, the granularities and the invariances are ours.
    """
    recorder = ImportanceRecorder(
        model, estimator=estimator, granularity=granularity, element_dtype=element_dtype
    )
    score_batches(recorder, batches, progress=progress)
    if group is not None:
        recorder.totals = recorder.totals.joined(group)
    return recorder.scores()


def score_batches(
    recorder: ImportanceRecorder,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: Progress | None = None,
    after_batch: Callable[[], None] | None = None,
) -> None:
    """Add batches to a recorder's totals.

    Args:
        batches: see `component_importance`.
        progress: as there; batches that the totals have seen already count as done.
        after_batch: called when the totals hold a whole batch more.
    """
    scoring = _ScoringPass(recorder)
    began, tokens_before = time.perf_counter(), recorder.totals.num_tokens
    before = recorder.totals.num_seen
    total = before + len(batches) if hasattr(batches, "__len__") else None
    with recorder.installed():
        for done, batch in enumerate(batches, start=before + 1):
            per_sequence = recorder.estimator == "token"
            scoring.add(prepare_batch(recorder.model, batch, per_sequence=per_sequence))
            if after_batch is not None:
                after_batch()
            if progress is not None:
                tokens = recorder.totals.num_tokens
                rate = (tokens - tokens_before) / (time.perf_counter() - began)
                progress(done, total, f"{tokens} tokens, {rate:.0f} tokens/s")


class _ScoringPass:
    """Forward and backward of batches, with a loss scale where the model is fp16."""

    def __init__(self, recorder: ImportanceRecorder) -> None:
        self.recorder = recorder
        self._loss_scale = _HALF_LOSS_SCALE

    def add(self, batch: ScoringBatch) -> None:
        """Score one batch and add it to the totals, as a whole or not at all."""
        totals = self.recorder.totals
        if batch.num_samples == 0:
            totals.num_empty += 1
            return
        partials = self._partials(batch)
        if partials is None:
            totals.add_nonfinite()
            return
        totals.add(partials, BatchCounts(batch.num_samples, batch.num_tokens, batch.num_answers))

    def _partials(self, batch: ScoringBatch) -> Tensor | None:
        """One forward and backward; None if the loss or a partial score is not finite."""
        scale = None
        while True:
            is_retry = scale is not None
            self.recorder.begin(batch.valid, scale=scale or 1.0, is_retry=is_retry)
            loss, is_half = self._loss(batch)
            if not math.isfinite(loss.item()):
                return None
            if scale is None:
                scale = self._loss_scale if is_half else 1.0
                self.recorder.scale = scale
            if loss.requires_grad:
                (loss * scale).backward()
            partials = self.recorder.collect()
            if partials is not None:
                self._loss_scale = scale if is_half else self._loss_scale
                return partials
            if scale == 1.0:
                return None
            scale = max(1.0, scale / _LOSS_SCALE_STEP)

    def _loss(self, batch: ScoringBatch) -> tuple[Tensor, bool]:
        logits = call_model(self.recorder.model, batch)
        is_half = logits.dtype == torch.float16
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = functional.cross_entropy(logits, batch.targets.to(logits.device), reduction="none")
        return (losses * batch.weights.to(losses)).sum(), is_half
