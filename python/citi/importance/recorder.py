"""Importance of a model's components, recorded while somebody runs forward and backward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from citi.components import find_components, split_layer
from citi.importance.component_scores import ComponentScores
from citi.importance.granularity import ESTIMATORS, ScoredComponent, score_shapes
from citi.importance.instrumented_model import (
    bias_of,
    identities,
    instrumented,
    weight_getter,
)
from citi.importance.totals import BatchCounts, ScoreTotals
from citi.placement import check_whole, is_offloaded
from citi_kernels.ops.importance_parameters import accumulate_parameter_scores_
from citi_kernels.ops.importance_row_dots import accumulate_row_dots_
from citi_kernels.ops.scored_linear import Backward, scored_linear


class ImportanceRecorder:
    """Scores a model inside a loop of yours, with a loss of yours.

    ::

        recorder = ImportanceRecorder(model, estimator="batch")
        with recorder.installed():
            for batch in loader:
                recorder.begin(scale=scaler.get_scale())
                scaler.scale(loss_of(model, batch)).backward()
                recorder.finish(BatchCounts(num_samples=8, num_tokens=2048, num_answers=512))
        scores = recorder.scores()

    One `begin`, backward and `finish` per micro-batch, also under gradient accumulation: the
    micro-batch is part of what `batch` and `parameter` mean. `citi.component_importance` is this
    with the loss of the method.

    Args:
        model: a causal LM without PEFT adapters; its weights on any devices, or offloaded by
            Accelerate. Taken out of DistributedDataParallel and torch.compile.
        estimator, granularity: see `citi.component_importance`.
        element_dtype: of the buffers of granularity "element": fp32, or bf16, rounded
            stochastically (half the memory; a noise of a few percent in every element).

    Raises:
        ValueError: unknown estimator or granularity, a model without components or with adapters,
            weights that are sharded or on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        estimator: str = "token",
        granularity: str = "component",
        element_dtype: torch.dtype = torch.float32,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
        if element_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"element_dtype must be fp32 or bf16, got {element_dtype}")
        # Their wrappers would only add synchronisation and recompilation.
        model = getattr(model, "_orig_mod", model)
        model = model.module if isinstance(model, DistributedDataParallel) else model
        components, self.skipped = find_components(model)
        if not components:
            raise ValueError("model must hold linear components, got none; see find_components")
        self.model, self.estimator = model, estimator
        shapes = score_shapes(model, components, granularity)
        self.scored = {each.name: each for each in shapes}
        self.totals = ScoreTotals(shapes, estimator, granularity, element_dtype)
        self._buffers: dict[str, Tensor] = {}
        self.begin()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Freeze the model and route its components through this recorder, then restore it."""
        owners = self._owners()
        self._anchor = torch.ones((), requires_grad=True)

        def forward_of(module: nn.Module) -> Callable | None:
            name = next((owners[key] for key in identities(module) if key in owners), None)
            if name is not None:
                return partial(self._forward, name)
            # Only so that no loaded weight waits in the graph.
            return self._forward_offloaded if is_offloaded(module) else None

        with instrumented(self.model, forward_of):
            try:
                yield
            finally:
                self._buffers.clear()

    def begin(
        self, valid: Tensor | None = None, *, scale: float = 1.0, is_retry: bool = False
    ) -> None:
        """A micro-batch starts; nothing of an unfinished one stays.

        Args:
            valid: (B·S,) bool on the CPU, tokens that count; None counts all.
            scale: by which the loss will be multiplied.
            is_retry: it is the last one once more: elements that were finite are not added again.
        """
        self._valid: dict[torch.device, Tensor | None] = {torch.device("cpu"): valid}
        self.scale = scale
        if not is_retry:
            self._added: set[str] = set()
        self._uses: Counter[str] = Counter()
        self._without_gradients: set[str] = set()
        self._recomputed: set[str] = set()
        self._waiting: dict[str, list[Backward]] = defaultdict(list)
        self._touched: set[str] = set()

    def finish(self, counts: BatchCounts) -> bool:
        """Add the micro-batch to the totals, as a whole or, if a score is not finite, not at all.

        Elements are added as the backward goes: of a micro-batch that is skipped, they keep what
        components with finite gradients gave.

        Args:
            counts: of the micro-batch; `token` scores are divided by their sums.
        Returns:
            False if it was skipped; the totals count it.
        """
        partials = self.collect()
        if partials is None:
            self.totals.add_nonfinite()
            return False
        self.totals.add(partials, counts)
        return True

    def collect(self) -> Tensor | None:
        """This micro-batch's partial scores, one transfer per device; None if one is not finite."""
        self._refuse_reentrant_checkpointing()
        for name in list(self._waiting):
            self._score_uses(name)
        by_device: dict[torch.device, list[str]] = defaultdict(list)
        for name in self._touched:
            by_device[self._buffers[name].device].append(name)
        parts: dict[str, Tensor] = {}
        for names in by_device.values():
            buffers = [self._buffers[name] for name in names]
            whole = torch.cat(buffers).cpu().double().abs_() / self.scale
            sizes = [len(buffer) for buffer in buffers]
            parts |= dict(zip(names, whole.split(sizes), strict=True))
        finite = {name for name, part in parts.items() if part.isfinite().all()}
        self._added |= finite
        if len(finite) < len(parts):
            return None
        whole = torch.zeros_like(self.totals.sums)
        for name, place in zip(self.scored, whole.split(self.totals.sizes), strict=True):
            if name in parts:
                place.copy_(parts[name])
        return whole

    def scores(self) -> ComponentScores:
        """What the micro-batches gave. Raises: ValueError if none was scored."""
        return self.totals.scores(self.skipped)

    def _owners(self) -> dict[int, str]:
        """The component that every linear module, by itself or its weight, counts for."""
        owners: dict[int, str] = {}
        for name in self.scored:
            module = self.model.get_submodule(name)
            if not is_offloaded(module):
                check_whole(f"the weight of {name}", module.weight)
            owners |= dict.fromkeys(identities(module), name)
        return owners

    def _forward(self, name: str, module: nn.Module, forward: Callable, x: Tensor) -> Tensor:
        is_recomputation = torch._C._current_graph_task_id() != -1
        if not torch.is_grad_enabled():
            self.totals.ran.add(name)
            self._without_gradients.add(name)
            return forward(x)
        scored = self.scored[name]
        weight = weight_getter(module, forward)
        if weight is None and self._needs_product(scored):
            raise ValueError(
                f'estimator "parameter" and granularity "element" need the plain weight of {name}, '
                f'got a {type(module).__name__}; use estimator "token" or "batch" on coarser scores'
            )
        self.totals.ran.add(name)
        # Recomputed activations belong to a forward that was counted.
        if is_recomputation:
            self._recomputed.add(name)
        else:
            self._uses[name] += 1
        needs_y = scored.by == "rows" and not self._needs_product(scored)
        return scored_linear(
            x,
            forward,
            weight=weight,
            anchor=self._anchor,
            on_backward=partial(self._backward, scored, module),
            needs_dx=not needs_y and not self._needs_product(scored),
            needs_y=needs_y,
        )

    def _refuse_reentrant_checkpointing(self) -> None:
        """Raise RuntimeError where whole layers ran with gradients off, and would score 0.

        Single components that a model runs under `torch.no_grad()` (the indexer of sparse
        attention) have no gradient by design: they score 0 and are listed with the reason.
        """
        silent = self._without_gradients - set(self._uses)
        if not silent:
            return
        heard = {split_layer(name)[0] for name in self.scored if name in self._uses}
        for name in filter(silent.__contains__, self.scored):
            if name in self._recomputed or split_layer(name)[0] not in heard:
                raise RuntimeError(
                    f"component {name} ran with gradients off, as its whole layer did, so its "
                    "score would be 0: the model uses reentrant activation checkpointing or runs "
                    "under torch.no_grad(); use gradient_checkpointing_enable("
                    'gradient_checkpointing_kwargs={"use_reentrant": False})'
                )

    def _forward_offloaded(self, module: nn.Module, forward: Callable, x: Tensor) -> Tensor:
        weight = weight_getter(module, forward)
        if weight is None or not torch.is_grad_enabled():
            return forward(x)
        return scored_linear(
            x,
            forward,
            weight=weight,
            anchor=self._anchor,
            on_backward=lambda _: None,
            needs_dx=False,
        )

    def _needs_product(self, scored: ScoredComponent) -> bool:
        return self.estimator == "parameter" or scored.by == "elements"

    def _backward(self, scored: ScoredComponent, module: nn.Module, use: Backward) -> None:
        name = scored.name
        self.totals.reached.add(name)
        if self._needs_product(scored):
            self._waiting[name].append(use)
            if len(self._waiting[name]) == self._uses[name]:
                self._score_uses(name)
            return
        a, b, offset = use.x, use.dx, None
        if scored.by == "rows":
            a, b, offset = use.y, use.g, bias_of(module)
        accumulate_row_dots_(
            self._buffer(name, scored.num_entries, a.device),
            a,
            b,
            valid=self._valid_rows(a),
            offset=offset,
            signed=self.estimator == "batch",
        )

    def _score_uses(self, name: str) -> None:
        """All uses of one weight in this batch: their gradients add up before | . |."""
        uses, scored = self._waiting.pop(name), self.scored[name]
        weight, (x, g, valid) = uses[0].weight, self._joined(uses)
        if scored.by == "elements":
            self._add_elements(scored, weight, x, g, valid)
            return
        buffer = self._buffer(name, scored.num_entries, x.device).view(scored.shape)
        accumulate_parameter_scores_(buffer, weight, x, g, valid=valid)

    def _joined(self, uses: list[Backward]) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, g and the rows that count of all uses, one below the other."""
        valid = [self._valid_rows(use.x) for use in uses]
        if len(uses) == 1:
            return uses[0].x, uses[0].g, valid[0]
        x, g = torch.cat([use.x for use in uses]), torch.cat([use.g for use in uses])
        if all(rows is None for rows in valid):
            return x, g, None
        every = [torch.ones(len(use.x), dtype=torch.bool, device=x.device) for use in uses]
        return x, g, torch.cat([e if v is None else v for v, e in zip(valid, every, strict=True)])

    def _add_elements(
        self, scored: ScoredComponent, weight: Tensor, x: Tensor, g: Tensor, valid: Tensor | None
    ) -> None:
        """Into the buffer, or nowhere if x or g is not finite; then the partial score is NaN."""
        if scored.name in self._added:
            return
        finite_T = torch.isfinite(x).all(1) & torch.isfinite(g).all(1)
        is_finite = (finite_T if valid is None else finite_T | ~valid).all()
        self._buffer(scored.name, 1, x.device).add_(torch.where(is_finite, 0.0, torch.nan))
        if x.device.type != "cpu":  # asking would stall the stream
            valid = is_finite.expand(len(x)) if valid is None else valid & is_finite
        elif not is_finite:
            return
        accumulate_parameter_scores_(
            self.totals.element_buffer(scored, x.device),
            weight,
            x,
            g,
            valid=valid,
            per_token=self.estimator == "token",
            scale=1.0 / self.scale,
            seed=self.totals.num_seen * len(self.scored) + list(self.scored).index(scored.name),
        )

    def _buffer(self, name: str, size: int, device: torch.device) -> Tensor:
        """This micro-batch's accumulator of a component; zeros at first."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._buffers[name] = torch.zeros(size, dtype=dtype, device=device)
        elif name not in self._touched:
            buffer.zero_()
        self._touched.add(name)
        return self._buffers[name]

    def _valid_rows(self, x: Tensor) -> Tensor | None:
        """Which rows of x count; None if all do, or if the rows are not the batch's tokens."""
        valid = self._valid[torch.device("cpu")]
        if valid is None or len(valid) != len(x):
            return None
        if x.device not in self._valid:
            self._valid[x.device] = valid.to(x.device)
        return self._valid[x.device]
