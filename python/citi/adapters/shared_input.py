"""Adapted layers that share their input, as query, key and value do, computed by one op.

Which layers of a parent module share it is observed, not known by name. The first of them then
computes all and keeps the results of the others for their calls. A layer takes its result only if
nothing can have changed since: the same input tensor, unchanged, in the same modes, with the same
parameters, routing context, stream and dropout seed; it computes for itself otherwise. So outputs,
gate sums and random numbers are those of layers that run alone, bitwise, and gradients to rounding.

Layers run alone where one op would not serve them (see `runs_together`: on the CPU, for one), under
`torch.compile`, and in `torch.inference_mode`, whose tensors do not count changes. So does a layer,
for as long as it lasts, that has hooks, a replaced `forward`, several active adapters, a base layer
that is not plain, or other settings, dtype or device than the first.

Results that nobody fetched are dropped when the next layers of any model run together in the same
thread, and at the end of the PeftModel's forward. They are kept per thread, never on modules.

Limits: a backward through one of the results alone, without `retain_graph`, frees what the others
need for theirs; a change of the input that PyTorch does not count (`x.data`) is not seen; a layer
that stops sharing its input is computed along in vain.

Legend: L layers that share their input.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from citi_kernels.layers.molora_linear import (
    MoLoRASettings,
    apply_molora,
    apply_molora_group,
    draw_seed,
    next_seeds,
)
from citi_kernels.layers.routing import RoutingContext
from citi_kernels.ops.molora_linear_group import runs_together

_MAX_LONE_ROUNDS = 3


class Member(NamedTuple):
    """A layer's call of the op, apart from the input."""

    layer: nn.Module
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor
    b: Tensor
    router: Tensor
    settings: MoLoRASettings
    key: Hashable
    training: bool

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.a, self.b, self.router

    def apply(self, x: Tensor, dropout_seed: Tensor | None = None) -> Tensor:
        """The layer alone."""
        return apply_molora(
            x,
            *self.operands,
            settings=self.settings,
            key=self.key,
            training=self.training,
            dropout_seed=dropout_seed,
        )

    def goes_with(self, first: Member) -> bool:
        """Whether one op can compute both."""
        return (
            (self.settings, self.training) == (first.settings, first.training)
            and all(
                (ours is None) == (theirs is None)
                and (ours is None or (ours.dtype, ours.device) == (theirs.dtype, theirs.device))
                for ours, theirs in zip(self.operands[::2], first.operands[::2], strict=True)
            )
            and self.a.shape == first.a.shape
        )


class Siblings:
    """The adapted layers of one parent module, and which of them share their input.

    The first rounds are observed; a round ends where a layer is called again. What was seen is
    settled once no graph of an observed call can be recomputed any more: in the recomputation of
    activation checkpointing layers must run as they did in the forward.

    References are weak, and a copy or an unpickled one starts anew: nothing here belongs to a
    model's state.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recomputable: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self.observe_anew()

    def __reduce__(self) -> tuple[type[Siblings], tuple[()]]:
        return Siblings, ()

    def observe_anew(self) -> None:
        """For a change of the layers."""
        with self._lock:
            self._followers: dict[int, tuple[weakref.ref, ...]] | None = None
            self._runs: list[list[weakref.ref]] = []
            self._input: tuple[weakref.ref, int] | None = None
            self._num_lone_rounds = 0

    @property
    def are_alone(self) -> bool:
        """Whether it is settled that no two of them share their input."""
        return self._followers == {}

    def followers(self, layer: nn.Module, x: Tensor) -> list[nn.Module] | None:
        """The layers to compute along with a layer that was called with x; None: not settled."""
        if self._followers is None:
            self._observe(layer, x)
        followers = self._followers
        if followers is None:
            return None
        first, *others = followers.get(id(layer), (None,))
        if first is None or first() is not layer:
            return []
        return [other for each in others if (other := each()) is not None]

    def _observe(self, layer: nn.Module, x: Tensor) -> None:
        with self._lock:
            if any(ref() is layer for run in self._runs for ref in run):
                self._end_round()
            if self._followers is not None:
                return
            if self._input is None or self._input[0]() is not x or self._input[1] != x._version:
                self._input = weakref.ref(x), x._version
                self._runs.append([])
            self._runs[-1].append(weakref.ref(layer))

    def _end_round(self) -> None:
        runs, self._runs, self._input = self._runs, [], None
        shared = {id(run[0]()): tuple(run) for run in runs if len(run) > 1}
        self._num_lone_rounds += not shared
        is_settled = not self._recomputable if shared else self._num_lone_rounds >= _MAX_LONE_ROUNDS
        if is_settled:
            self._followers = shared

    def apply_observed(self, member: Member, x: Tensor) -> Tensor:
        """The layer alone, with a note of its graph."""
        tensors = {"x": x} | dict(zip(Member._fields[1:6], member.operands, strict=True))
        trained = (
            name for name, each in tensors.items() if each is not None and each.requires_grad
        )
        name = next(trained, None)
        if name is None or not torch.is_grad_enabled():
            return member.apply(x)
        graph = _Graph()
        self._recomputable.add(graph)
        tensors[name] = graph.note(tensors[name])
        x, *operands = tensors.values()
        return Member(member.layer, *operands, *member[6:]).apply(x)


class _Graph:
    """Lives until autograd has freed what it saved for a call's backward."""

    def note(self, tensor: Tensor) -> Tensor:
        """The same tensor, whose backward frees this."""
        with saved_tensors_hooks(lambda _: self, lambda graph: graph):
            return _Note.apply(tensor)


class _Note(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(tensor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return gradient


class _Result(NamedTuple):
    member: Member
    dropout_seed: Tensor | None
    y: Tensor
    gate_sums: Tensor | None


class _Results(NamedTuple):
    """What was computed along for other layers, and for which input."""

    x: Tensor
    conditions: tuple[Any, ...]
    waiting: dict[nn.Module, _Result]


class _OfThread(threading.local):
    results: _Results | None = None


_of_thread = _OfThread()


def apply_shared(
    member: Member,
    x: Tensor,
    siblings: Siblings,
    member_of: Callable[[nn.Module], Member | None],
) -> Tensor:
    """`member.apply(x)`, computed along with another layer or taking others along where it pays.

    Args:
        member: the layer that was called.
        x: its input.
        siblings: the layers of its parent.
        member_of: a layer's call of the op; None where its call is more than that.
    """
    result = _fetch(member, x)
    if result is not None:
        return _hand_out(result, member, x)
    if siblings.are_alone or not _may_share(member, x):
        return member.apply(x)
    followers = siblings.followers(member.layer, x)
    if followers is None:
        return siblings.apply_observed(member, x)
    others = [other for layer in followers if (other := member_of(layer)) is not None]
    members = [member, *(other for other in others if other.goes_with(member))]
    return _compute(members, x) if len(members) > 1 else member.apply(x)


def forget_results() -> None:
    """Drops what was computed along in this thread and not fetched."""
    _of_thread.results = None


def _may_share(member: Member, x: Tensor) -> bool:
    settings = member.settings
    return (
        type(x) is Tensor
        and not x.is_inference()
        and not torch.is_inference_mode_enabled()
        and runs_together(
            x,
            member.a.shape[0],
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            dropout_p=settings.dropout if settings.drops(member.training) else 0.0,
        )
    )


def _compute(members: Sequence[Member], x: Tensor) -> Tensor:
    """The first one's output; the others' wait."""
    forget_results()
    first = members[0]
    seeds: list[Tensor | None] = [None] * len(members)
    drops = first.settings.drops(first.training)
    if drops:  # the others draw when they fetch, so that random numbers are those of layers alone
        seeds = [draw_seed(), *next_seeds(len(members) - 1)]
    outputs = apply_molora_group(
        x,
        *zip(*(each.operands for each in members), strict=True),
        settings=first.settings,
        training=first.training,
        dropout_seeds=seeds if drops else None,
    )
    result, *others = (
        _Result(member, seed, *pair)
        for member, seed, pair in zip(members, seeds, outputs, strict=True)
    )
    waiting = {other.member.layer: other for other in others}
    _of_thread.results = _Results(x, _conditions(x), waiting)
    return _record(result)


def _fetch(member: Member, x: Tensor) -> _Result | None:
    """What waits for this call."""
    results = _of_thread.results
    if results is None or results.x is not x:
        return None
    result = results.waiting.get(member.layer)
    if result is None or results.conditions != _conditions(x):
        return None
    if not _is_same_call(result.member, member):
        return None
    del results.waiting[member.layer]
    if not results.waiting:
        forget_results()
    return result


def _hand_out(result: _Result, member: Member, x: Tensor) -> Tensor:
    seed = None if result.dropout_seed is None else draw_seed()
    if seed is None or int(seed) == int(result.dropout_seed):
        return _record(result)
    return member.apply(x, seed)


def _record(result: _Result) -> Tensor:
    context = RoutingContext.active()
    if context is not None:
        context.record(result.member.key, result.gate_sums)
    return result.y


def _is_same_call(one: Member, other: Member) -> bool:
    return one[-3:] == other[-3:] and all(
        ours is theirs for ours, theirs in zip(one.operands[2:], other.operands[2:], strict=True)
    )


def _conditions(x: Tensor) -> tuple[Any, ...]:
    """What must not change between the computation and a fetch."""
    kind = x.device.type
    return (
        x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        RoutingContext.active(),
        torch.cuda.current_stream(x.device) if x.is_cuda else None,
    )
