"""At which level the absolute value of an importance score is taken, and its shape there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from citi.components import Component

ESTIMATORS = ("token", "batch", "parameter")
GRANULARITIES = ("component", "row", "column", "head", "element")

# Projections of an attention module that write its heads, and those that read them.
_WRITES_HEADS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "in_proj", "q", "k", "v", "query", "key", "value"),
    *("c_attn", "qkv", "Wqkv", "W_pack", "query_key_value"),
}
_READS_HEADS = {"o_proj", "out_proj", "c_proj", "dense", "o", "wo", "out"}


@dataclass(frozen=True)
class ScoredComponent:
    """A component with the shape of its score.

    Attributes:
        component: what is scored.
        shape: (P, Q): the N output rows in P and the K input columns in Q equal, contiguous
            segments.
        by: what the segments are: "whole", "rows", "columns" or "elements".
    """

    component: Component
    shape: tuple[int, int]
    by: str

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def num_entries(self) -> int:
        return self.shape[0] * self.shape[1]


def score_shapes(
    model: nn.Module, components: Sequence[Component], granularity: str
) -> list[ScoredComponent]:
    """The shape of every component's score.

    component   (1, 1)
    row         (N, 1)
    column      (1, K)
    head        (heads, 1) for projections that write heads (q, k, v, and fused ones, whose q, k and
                v heads follow each other), (1, heads) for the one that reads them; (1, 1) for all
                other components. An attention module is one that has `head_dim`.
    element     (N, K)

    Raises:
        ValueError: unknown granularity, or "head" and no component has heads.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}"
        )
    scored = [ScoredComponent(c, *_segments(model, c, granularity)) for c in components]
    if granularity == "head" and all(each.by == "whole" for each in scored):
        raise ValueError(
            'granularity "head" needs attention modules with a head_dim and projections of known '
            f"names, got none in {type(model).__name__}; use row or column"
        )
    return scored


def _segments(
    model: nn.Module, component: Component, granularity: str
) -> tuple[tuple[int, int], str]:
    num_out, num_in = component.out_features, component.in_features
    if granularity == "head":
        parent = model.get_submodule(component.name.rpartition(".")[0])
        size = getattr(parent, "head_dim", None)
        if isinstance(size, int) and size > 0:
            if component.role in _WRITES_HEADS and num_out % size == 0:
                return (num_out // size, 1), "rows"
            if component.role in _READS_HEADS and num_in % size == 0:
                return (1, num_in // size), "columns"
    return {
        "row": ((num_out, 1), "rows"),
        "column": ((1, num_in), "columns"),
        "element": ((num_out, num_in), "elements"),
    }.get(granularity, ((1, 1), "whole"))
