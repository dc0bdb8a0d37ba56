"""Importance of a model's components, scored without a weight gradient."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from citi.components import Component, SkippedModule, find_components, is_linear, matrices
from citi.scoring_batch import ScoringBatch, call_model, prepare_batch
from citi_kernels.ops.component_importance import (
    batch_score,
    parameter_score,
    scored_linear,
    token_score,
)

ESTIMATORS = ("token", "batch", "parameter")
Progress = Callable[[int, int | None, str], None]

# Gradients of an fp16 model underflow below 6e-8. A power of two is divided out exactly; on
# overflow the batch is run again with a smaller one.
_HALF_LOSS_SCALE = 2.0**12
_LOSS_SCALE_STEP = 2.0**4


@dataclass(frozen=True)
class ComponentScores(Mapping[str, float]):
    """Importance of every component, as a mapping from full module name to a float64.

    Attributes:
        scores: the mapping itself, in the order of the model's modules.
        estimator: "token", "batch" or "parameter".
        num_samples: sequences with at least one answer token that were scored.
        num_tokens: their real tokens.
        num_answer_tokens: the answer tokens among them that the loss counts.
        num_batches: batches that were scored.
        num_empty_batches: batches skipped because all their labels were masked.
        num_nonfinite_batches: batches skipped because of a NaN or infinite loss or score.
        skipped: modules that are not scored, and components that score 0 because they were not
            used, each with its reason.
    """

    scores: dict[str, float]
    estimator: str
    num_samples: int
    num_tokens: int
    num_answer_tokens: int
    num_batches: int
    num_empty_batches: int
    num_nonfinite_batches: int
    skipped: tuple[SkippedModule, ...]

    def __getitem__(self, name: str) -> float:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def num_skipped_batches(self) -> int:
        """Batches that were not scored, for either reason."""
        return self.num_empty_batches + self.num_nonfinite_batches

    def to_json(self) -> dict[str, object]:
        """Everything as plain JSON types; floats survive exactly."""
        return asdict(self) | {"skipped": [asdict(module) for module in self.skipped]}

    @classmethod
    def from_json(cls, obj: Mapping[str, object]) -> ComponentScores:
        """Inverse of `to_json`. Raises: ValueError for missing or unknown keys."""
        names = {field.name for field in fields(cls)}
        if set(obj) != names:
            raise ValueError(
                f"component scores must have exactly the keys {sorted(names)}, got {sorted(obj)}"
            )
        skipped = tuple(SkippedModule(**module) for module in obj["skipped"])
        return cls(**{**obj, "scores": dict(obj["scores"]), "skipped": skipped})


def component_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    estimator: str = "token",
    progress: Progress | None = None,
) -> ComponentScores:
    """Score every linear component of a causal LM on some data.

        I_h(D) = | θ_h · ∂L/∂θ_h |  =  | Σ_t x_t · dx_t |,   dx_t = Wᵀ g_t

    Estimators, with t over tokens and b over micro-batches (the items of `batches`):

        token       Σ_t | x_t · dx_t | / num_tokens,   L = Σ_sequences mean CE of its answer tokens
        batch       Σ_b | Σ_{t in b} x_t · dx_t |,     L = mean CE of the batch's answer tokens
        parameter   Σ_b Σ_ij | W_ij (∂L_b/∂W)_ij |,    L as for batch

    num_tokens is the number of answer tokens for components of the last decoder layer, and the
    number of real tokens minus one per sequence for all others.

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
    also after an exception or Ctrl-C. No weight gradient is allocated.

    Args:
        model: a `transformers` causal LM without PEFT adapters, on any devices, in any floating
            dtype, or with quantised linears (not for "parameter").
        batches: mappings with `input_ids` and `labels` (B, S) int64, -100 where a token is no
            answer; optional `attention_mask` (B, S) and `position_ids` (B, S). Other keys are
            ignored. May be an iterator.
        estimator: see above.
        progress: called as `progress(done, total or None, note)` after every batch.

    Returns:
        the scores; partial sums in fp32 or better on the device, totals in fp64 on the host.
        Batches without answer tokens, or with a NaN or infinite loss or score, are skipped as a
        whole and counted.

    Raises:
        ValueError: unknown estimator, a model without components or with PEFT adapters, weights
            that are offloaded or sharded, a malformed batch, or no batch that could be scored.
        RuntimeError: a component ran with gradients off (reentrant checkpointing).

    Source: arXiv 2409.13202, eq. 4, and the authors' code for `token`; the loss of `token` at more
    than one sequence per batch, and the invariances, are ours.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    components, skipped = find_components(model)
    if not components:
        raise ValueError("model must hold linear components, got none; see find_components")
    scoring = _ScoringPass(model, components, estimator)
    total = len(batches) if hasattr(batches, "__len__") else None
    with scoring.installed():
        for done, batch in enumerate(batches, start=1):
            scoring.add(prepare_batch(model, batch, per_sequence=estimator == "token"))
            if progress is not None:
                progress(done, total, f"{scoring.num_tokens} tokens")
    return scoring.result(skipped)


class _ScoringPass:
    """The state of one scoring run over one model."""

    def __init__(self, model: nn.Module, components: list[Component], estimator: str) -> None:
        self.model, self.components, self.estimator = model, components, estimator
        self.totals = {component.name: 0.0 for component in components}
        self.num_samples = self.num_tokens = self.num_answers = 0
        self.num_batches = self.num_empty = self.num_nonfinite = 0
        self.ran: set[str] = set()
        self.reached: set[str] = set()
        self._loss_scale = _HALF_LOSS_SCALE
        self._start_batch(None)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Freeze the model and route its components through this pass, then restore it."""
        owners = self._owners()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            self._anchor = torch.ones((), requires_grad=True)
            for module in self.model.modules():
                stack.callback(setattr, module, "training", module.training)
                module.training = False
            for parameter in self.model.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            for module in self.model.modules():
                name = next((owners[key] for key in _identities(module) if key in owners), None)
                if name is not None:
                    _override_forward(stack, module, partial(self._forward, name, module))
                # transformers' own switch is off in eval mode.
                elif getattr(module, "gradient_checkpointing", False) and isinstance(
                    module, GradientCheckpointingLayer
                ):
                    _override_forward(stack, module, _checkpointed)
            yield

    def _owners(self) -> dict[int, str]:
        """The component that every linear module, by itself or its weight, counts for."""
        owners: dict[int, str] = {}
        for component in self.components:
            module = self.model.get_submodule(component.name)
            _check_in_memory(component.name, module.weight)
            owners |= dict.fromkeys(_identities(module), component.name)
        return owners

    def add(self, batch: ScoringBatch) -> None:
        """Score one batch and add it to the totals, as a whole or not at all."""
        if batch.num_samples == 0:
            self.num_empty += 1
            return
        partials = self._score(batch)
        if partials is None:
            self.num_nonfinite += 1
            return
        for name, value in partials.items():
            self.totals[name] += value
        self.num_batches += 1
        self.num_samples += batch.num_samples
        self.num_tokens += batch.num_tokens
        self.num_answers += batch.num_answers

    def result(self, skipped: list[SkippedModule]) -> ComponentScores:
        if self.num_batches == 0:
            raise ValueError(
                "batches must hold at least one that can be scored, got "
                f"{self.num_empty} without answer tokens (labels all -100) and "
                f"{self.num_nonfinite} with a NaN or infinite loss or score"
            )
        return ComponentScores(
            scores={c.name: self.totals[c.name] / self._divisor(c) for c in self.components},
            estimator=self.estimator,
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            num_answer_tokens=self.num_answers,
            num_batches=self.num_batches,
            num_empty_batches=self.num_empty,
            num_nonfinite_batches=self.num_nonfinite,
            skipped=(*skipped, *self._unused()),
        )

    def _divisor(self, component: Component) -> int:
        if self.estimator != "token":
            return 1
        last = max((c.layer for c in self.components if c.layer is not None), default=None)
        if last is not None and component.layer == last:
            return self.num_answers
        return self.num_tokens - self.num_samples

    def _unused(self) -> Iterator[SkippedModule]:
        for name in self.totals:
            if name not in self.ran:
                yield SkippedModule(name, "scores 0: it never ran on these batches")
            elif name not in self.reached:
                yield SkippedModule(name, "scores 0: it ran, but no gradient reached it")

    def _score(self, batch: ScoringBatch) -> dict[str, float] | None:
        """One forward and backward; None if the loss or a partial score is not finite."""
        scale = None
        while True:
            self._start_batch(batch)
            loss, is_half = self._loss(batch)
            if not math.isfinite(loss.item()):
                return None
            scale = scale or (self._loss_scale if is_half else 1.0)
            self._in_backward = True
            if loss.requires_grad:
                (loss * scale).backward()
            partials = self._collect(scale)
            if all(map(math.isfinite, partials.values())):
                self._loss_scale = scale if is_half else self._loss_scale
                return partials
            if scale == 1.0:
                return None
            scale = max(1.0, scale / _LOSS_SCALE_STEP)

    def _start_batch(self, batch: ScoringBatch | None) -> None:
        self._batch = batch
        self._in_backward = False
        self._valid: dict[torch.device, Tensor | None] = {}
        self._uses: Counter[str] = Counter()
        self._waiting: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        self._partials: dict[str, list[Tensor]] = defaultdict(list)

    def _loss(self, batch: ScoringBatch) -> tuple[Tensor, bool]:
        logits = call_model(self.model, batch)
        is_half = logits.dtype == torch.float16
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = functional.cross_entropy(logits, batch.targets.to(logits.device), reduction="none")
        return (losses * batch.weights.to(losses)).sum(), is_half

    def _forward(self, name: str, module: nn.Module, forward: Callable, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"component {name} ran with gradients off, so its score would be 0: the model uses "
                "reentrant activation checkpointing or torch.no_grad() inside; use "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": '
                "False})"
            )
        weight = _plain_weight(module, forward)
        if weight is None and self.estimator == "parameter":
            raise ValueError(
                f'estimator "parameter" needs the plain weight of {name}, got a '
                f'{type(module).__name__}; use estimator "token" or "batch"'
            )
        self.ran.add(name)
        if not self._in_backward:
            self._uses[name] += 1
        return scored_linear(
            x,
            forward,
            weight=weight,
            anchor=self._anchor,
            on_backward=partial(self._backward, name, weight),
            needs_dx=self.estimator != "parameter",
        )

    def _backward(self, name: str, weight: Tensor | None, x: Tensor, g: Tensor, dx: Tensor) -> None:
        self.reached.add(name)
        if self.estimator == "parameter":
            self._waiting[name].append((weight, x, g))
            if len(self._waiting[name]) == self._uses[name]:
                self._score_uses(name)
            return
        score = token_score if self.estimator == "token" else batch_score
        self._partials[name].append(score(x, dx, valid=self._valid_rows(x)))

    def _score_uses(self, name: str) -> None:
        """All uses of one weight in this batch: their gradients add up before | . |."""
        weights, xs, gs = zip(*self._waiting.pop(name), strict=True)
        if len(xs) == 1:
            score = parameter_score(weights[0], xs[0], gs[0], valid=self._valid_rows(xs[0]))
        else:
            rows = [self._valid_rows(x) for x in xs]
            xs = [x if v is None else x[v] for x, v in zip(xs, rows, strict=True)]
            gs = [g if v is None else g[v] for g, v in zip(gs, rows, strict=True)]
            score = parameter_score(weights[0], torch.cat(xs), torch.cat(gs))
        self._partials[name].append(score)

    def _valid_rows(self, x: Tensor) -> Tensor | None:
        """Which rows of x count; None if all do, or if the rows are not the batch's tokens."""
        valid = self._batch.valid
        if valid is None or len(valid) != len(x):
            return None
        if x.device not in self._valid:
            self._valid[x.device] = valid.to(x.device)
        return self._valid[x.device]

    def _collect(self, scale: float) -> dict[str, float]:
        """This batch's partial scores on the host in fp64, one transfer per device."""
        for name in list(self._waiting):
            self._score_uses(name)
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, values in self._partials.items():
            by_device[values[0].device].append((name, torch.stack(values).sum()))
        partials: dict[str, float] = {}
        for scores in by_device.values():
            values = torch.stack([value for _, value in scores]).cpu().double() / scale
            partials |= zip((name for name, _ in scores), values.abs().tolist(), strict=True)
        return partials


def _identities(module: nn.Module) -> list[int]:
    return [id(owned) for owned in (module, *matrices(module))] if is_linear(module) else []


def _check_in_memory(name: str, weight: Tensor) -> None:
    if weight.is_meta or weight.numel() == 0 or hasattr(weight, "full_tensor"):
        where = "offloaded (meta device)" if weight.is_meta else "sharded"
        raise ValueError(
            f"the weight of {name} must be whole and in memory, got one that is {where}; load "
            "the model onto its devices as a whole before scoring it"
        )


def _plain_weight(module: nn.Module, forward: Callable) -> Tensor | None:
    """The (N, K) weight if `forward` is x Wᵀ + b with it, else None."""
    function = getattr(forward, "__func__", None)
    if function not in (nn.Linear.forward, Conv1D.forward):
        return None
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _checkpointed(forward: Callable, *args: object, **kwargs: object) -> object:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _override_forward(stack: ExitStack, module: nn.Module, replacement: Callable) -> None:
    """Put `replacement(original, ...)` before this instance's forward until the stack unwinds."""
    # Accelerate's placement hooks own `forward` and call `_old_forward` on the right device.
    attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    original = getattr(module, attribute)
    if attribute in module.__dict__:
        stack.callback(setattr, module, attribute, original)
    else:
        stack.callback(delattr, module, attribute)
    setattr(module, attribute, partial(replacement, original))
