"""Routing context: tells every layer whose token is whose, and collects the gate sums.

Legend: B samples (segments), S positions, T tokens, G gate entries (E + 1), L layers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from types import TracebackType

import torch
from torch import Tensor

# A plain global: dynamo cannot trace a ContextVar, and a module attribute would break deepcopy.
_active: RoutingContext | None = None


class RoutingContext:
    """Segment ids on the way in, gate sums on the way out, for one forward pass.

    ::

        context = RoutingContext.from_attention_mask(attention_mask, task_types=task_types)
        with context:
            loss = model(input_ids, attention_mask=attention_mask, labels=labels).loss
        for gate_sums_LBG in context.stacked():
            per_layer_L = router_loss(gate_sums_LBG, context.token_counts, context.task_types)
            loss = loss + beta * per_layer_L.sum()
        loss.backward()

    Layers that run inside the with-block add their gate sums to `gate_sums`; a layer that runs
    twice adds up. Layers that run outside, so also the recomputation of non-reentrant activation
    checkpointing in the backward pass, see no context and record nothing; gradients are right
    either way. Where a compiled block is checkpointed PyTorch raises a CheckpointError instead: the
    graph without a context, which would recompute it, saves other tensors. Call `backward` inside
    the with-block then (sums of layers recomputed there may add up a second time), or compile
    the model around its checkpoints.

    Nothing is kept on modules. Contexts may be nested (the inner one counts, the outer one comes
    back); entering one again starts it anew; entering it while it is open is refused. The active
    context belongs to the process, not to a thread (so no `DataParallel`).

    For the gates of single tokens let every token be a segment: `segment_ids = arange(T)`.
    """

    def __init__(
        self, segment_ids: Tensor, *, num_segments: int, task_types: Tensor | None = None
    ) -> None:
        """A context for one batch.

        Args:
            segment_ids: (B, S) or (T,) int64, the sample of every token; -1 is padding, counted
                nowhere. Must cover the tokens that the layers will see, in their order.
            num_segments: number of samples; ids lie in [-1, num_segments).
            task_types: (num_segments,) integers, 1 tool and 0 general; None when unknown.

        Raises:
            TypeError: ids that are not int64, task types that are not integers.
            ValueError: a wrong shape, or (checked on the CPU only) an id out of range.
        """
        _check(segment_ids, num_segments, task_types)
        self.segment_ids = segment_ids
        self.num_segments = num_segments
        self.task_types = task_types
        self.token_counts = _count_tokens(segment_ids, num_segments)
        self.gate_sums: dict[Hashable, Tensor] = {}
        self._outer: RoutingContext | None = None
        self._is_open = False
        self._grad_was_enabled = False

    @classmethod
    def from_attention_mask(
        cls, attention_mask: Tensor, *, task_types: Tensor | None = None
    ) -> RoutingContext:
        """One segment per row of a (B, S) mask; positions where it is 0 are padding.

        Raises:
            ValueError: the mask is not two-dimensional.
        """
        if attention_mask.ndim != 2:
            raise ValueError(
                "attention_mask must have the shape (samples, positions), got "
                f"{tuple(attention_mask.shape)}; for packed rows give segment_ids instead"
            )
        rows_B1 = torch.arange(attention_mask.shape[0], device=attention_mask.device).unsqueeze(-1)
        segment_ids = torch.where(attention_mask != 0, rows_B1, -1)
        return cls(segment_ids, num_segments=attention_mask.shape[0], task_types=task_types)

    @staticmethod
    def active() -> RoutingContext | None:
        """The context that layers report to now, or None outside any with-block."""
        return _active

    def __enter__(self) -> RoutingContext:
        global _active
        if self._is_open:
            raise RuntimeError("this RoutingContext is open already; make one per forward pass")
        self._is_open = True
        self._outer, _active = _active, self
        self._grad_was_enabled = torch.is_grad_enabled()
        self.gate_sums = {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _active
        _active, self._outer = self._outer, None
        self._is_open = False

    def segment_ids_for(self, x: Tensor, *, training: bool) -> Tensor:
        """The segment ids shaped like the tokens of `x`; layers call this before they run.

        Args:
            x: (..., K) the layer's input.
            training: whether the layer is in training mode.

        Returns:
            int64 ids of the shape `x.shape[:-1]`, on the device of `x`.

        Raises:
            RuntimeError: the layer trains, yet gradients went off since the context was entered:
                reentrant checkpointing, whose router loss would have no gradient.
            ValueError: another number of tokens than the context describes.
        """
        if training and self._grad_was_enabled and not torch.is_grad_enabled():
            raise RuntimeError(
                "a layer in training mode runs without gradients inside a RoutingContext: "
                "reentrant activation checkpointing would drop the router loss's gradient. Use "
                "use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False}), or "
                "model.eval() if this pass is not meant to train"
            )
        num_tokens = math.prod(x.shape[:-1])
        if self.segment_ids.numel() != num_tokens:
            raise ValueError(
                f"the RoutingContext describes {self.segment_ids.numel()} tokens, shape "
                f"{tuple(self.segment_ids.shape)}, but a layer got {num_tokens}, input shape "
                f"{tuple(x.shape)}; build the context from the batch that the model is given"
            )
        return self.segment_ids.to(x.device).reshape(x.shape[:-1])

    def record(self, key: Hashable, gate_sums: Tensor) -> None:
        """Adds one layer call's gate sums.

        Args:
            key: the layer, `id(module)` for a layer with one router.
            gate_sums: (num_segments, G) fp32, with its graph.
        """
        recorded = self.gate_sums.get(key)
        self.gate_sums[key] = gate_sums if recorded is None else recorded + gate_sums

    def stacked(self) -> list[Tensor]:
        """The recorded gate sums as (L, B, G) tensors, one per gate width, in order of first use.

        Tensors of layers on other devices are brought to the device of the first layer.
        """
        groups: dict[int, list[Tensor]] = {}
        for gate_sums in self.gate_sums.values():
            groups.setdefault(gate_sums.shape[-1], []).append(gate_sums)
        return [torch.stack([g.to(group[0].device) for g in group]) for group in groups.values()]


def _count_tokens(segment_ids: Tensor, num_segments: int) -> Tensor:
    """(num_segments,) int64 tokens per segment, without a host synchronisation."""
    shifted = segment_ids.reshape(-1) + 1
    counts = shifted.new_zeros(num_segments + 1)
    return counts.scatter_add_(0, shifted, torch.ones_like(shifted))[1:]


def _check(segment_ids: Tensor, num_segments: int, task_types: Tensor | None) -> None:
    if segment_ids.dtype != torch.int64:
        raise TypeError(f"segment_ids must be int64, got {segment_ids.dtype}")
    if num_segments < 0:
        raise ValueError(f"num_segments must be at least 0, got {num_segments}")
    if segment_ids.device.type == "cpu" and segment_ids.numel():
        low, high = (int(v) for v in segment_ids.aminmax())
        if low < -1 or high >= num_segments:
            raise ValueError(
                f"segment_ids must lie in [-1, {num_segments}), got values from {low} to {high}"
            )
    if task_types is None:
        return
    if tuple(task_types.shape) != (num_segments,):
        raise ValueError(
            f"task_types must have the shape ({num_segments},), one entry per sample, got "
            f"{tuple(task_types.shape)}"
        )
    if task_types.is_floating_point() or task_types.is_complex() or task_types.dtype == torch.bool:
        raise TypeError(
            f"task_types must be integers, 1 tool and 0 general, got {task_types.dtype}"
        )
