"""What a backend of `citi::molora_linear` takes and gives.

A backend is any object with

    forward(operands, settings) -> (y_TN, Saved, gate_sums_BG or None)
    backward(dy_TN, dgate_sums_BG, operands, saved, settings, needs) -> Operands of gradients
    empty_saved(x_TK, a_RK, settings) -> Saved, unfilled: what its forward will give (for tracing)

and maybe, where that is less work, for calls that no backward will follow

    forward_only(operands, settings) -> (y_TN, gate_sums_BG or None), bitwise those of forward

It gets checked arguments of any strides, writes to none of them, and returns tensors that alias
none of them. `Saved` is contiguous; gradients have any dtype and strides.

Shapes: T tokens, K in-features, N out-features, E experts, R stacked rank (E·r), G = E + 1 gates,
B segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """The tensors with a gradient, or their gradients (None where none was asked for)."""

    x: Tensor | None  # (T, K)
    weight: Tensor | None  # (N, K)
    bias: Tensor | None  # (N,)
    a: Tensor | None  # (R, K)
    b: Tensor | None  # (N, R)
    router: Tensor | None  # (G, K)


class Needs(NamedTuple):
    """Which gradients are asked for, in the order of `Operands`."""

    x: bool
    weight: bool
    bias: bool
    a: bool
    b: bool
    router: bool


class Settings(NamedTuple):
    """The arguments without a gradient."""

    num_experts: int
    scaling: float
    top_k: int | None
    renormalize: bool
    segment_ids: Tensor | None  # (T,) int64
    num_segments: int
    dropout_p: float
    dropout_seed: Tensor | None  # () int64 on the CPU

    @property
    def is_sparse(self) -> bool:
        return self.top_k is not None and self.top_k < self.num_experts


class Saved(NamedTuple):
    """What the forward leaves for the backward besides its operands: rank-sized, no (T, N).

    Shapes are the backend's own affair (`empty_saved`); no other code reads them.
    """

    h: Tensor  # a x, in x's dtype
    probs: Tensor  # probabilities of the gates, fp32; fp64 for fp64 x
    kept: Tensor | None  # which experts each token keeps; None where all are kept


def forward_only(
    backend: Any, operands: Operands, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """y (T, N) and the gate sums (B, G), None without segments."""
    if hasattr(backend, "forward_only"):
        return backend.forward_only(operands, settings)
    y_TN, _, gate_sums_BG = backend.forward(operands, settings)
    return y_TN, gate_sums_BG
