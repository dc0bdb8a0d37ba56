"""Suite "importance ops": the two ops by themselves on what one component's backward has in hand.

Shapes: T tokens, K in-features, N out-features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi.benchmark.group import DTYPES, Group, Pass, Settings
from citi.benchmark.layer import FROZEN, Shape
from citi_kernels import accumulate_parameter_scores_, accumulate_row_dots_
from citi_kernels.ops.importance_reference import parameter_scores_ref, row_dots_ref

SHAPES = {
    "cuda": tuple(Shape(T, 4096, N) for N in (4096, 14336) for T in (512, 2048, 8192)),
    "cpu": tuple(Shape(T, 1024, N) for N in (1024, 3584) for T in (512, 2048)),
}
CHECKED_TOKENS = 64
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
_STANDS_FOR = {
    FROZEN: "forward and backward of nn.Linear, the gradient of x alone",
    "stored gradient": "(weight * (g.T @ x)).abs().sum()",
    "row dots": "accumulate_row_dots_ of x and dx: `token` and `batch`",
    "row dots by column": "the same for every in-feature",
    "row dots by row": "of y and g, for every out-feature",
    "parameter scores": "accumulate_parameter_scores_ of the component",
    "parameter by row": "the same for every out-feature",
    "parameter by column": "the same for every in-feature",
    "elements in fp32": "the same for every element",
    "elements in bf16": "the same, stochastically rounded",
}


class _Linear(NamedTuple):
    """What the backward of one component has in hand."""

    x: Tensor
    weight: Tensor
    y: Tensor
    g: Tensor
    dx: Tensor


def importance_ops_suite(settings: Settings) -> Iterator[Group]:
    """Every shape in every dtype."""
    shapes = SHAPES[settings.device]
    for dtype in settings.dtypes:
        for shape in shapes[:1] if settings.is_quick else shapes:
            yield Group(
                suite="importance ops",
                settings={**shape._asdict(), "dtype": dtype},
                baseline=FROZEN,
                make=partial(_make, shape, dtype, settings.device),
                check=partial(_check, shape, dtype, settings.device),
                stands_for=_STANDS_FOR,
                tokens=shape.T,
                flops=4.0 * shape.T * shape.K * shape.N,
            )


def _linear(shape: Shape, dtype: str, device: str) -> _Linear:
    source = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, **source) * scale).to(DTYPES[dtype])

    x, weight = draw(shape.T, shape.K), draw(shape.N, shape.K, scale=shape.K**-0.5)
    g = draw(shape.T, shape.N)
    return _Linear(x, weight, x @ weight.T, g, g @ weight)


def _make(shape: Shape, dtype: str, device: str) -> dict[str, Pass]:
    x, weight, y, g, dx = _linear(shape, dtype, device)
    leaf = x.detach().requires_grad_()
    num_out, num_in = weight.shape

    def row_dots(a: Tensor, b: Tensor, size: int) -> Callable[[], None]:
        scores = torch.zeros(size, dtype=torch.float64, device=device)
        return lambda: accumulate_row_dots_(scores, a, b)

    def parameters(*size: int, dtype: torch.dtype = torch.float64) -> Callable[[], None]:
        scores = torch.zeros(size, dtype=dtype, device=device)
        return lambda: accumulate_parameter_scores_(scores, weight, x, g)

    calls = {
        FROZEN: lambda: torch.autograd.grad(F.linear(leaf, weight), leaf, g),
        "stored gradient": lambda: (weight * (g.T @ x)).abs().sum(),
        "row dots": row_dots(x, dx, 1),
        "row dots by column": row_dots(x, dx, num_in),
        "row dots by row": row_dots(y, g, num_out),
        "parameter scores": parameters(1, 1),
        "parameter by row": parameters(num_out, 1),
        "parameter by column": parameters(1, num_in),
        "elements in fp32": parameters(num_out, num_in, dtype=torch.float32),
        "elements in bf16": parameters(num_out, num_in, dtype=torch.bfloat16),
    }
    return {name: Pass(call) for name, call in calls.items()}


def _check(shape: Shape, dtype: str, device: str) -> float:
    """Share of the tolerance used by both ops against their definitions, on few tokens.

    Raises:
        AssertionError: one of them differs by more.
    """
    x, weight, _, g, dx = _linear(shape._replace(T=CHECKED_TOKENS), dtype, device)
    truths = {"row dots": row_dots_ref(x, dx), "parameter": parameter_scores_ref(weight, x, g)}
    scores = {name: torch.zeros_like(truth) for name, truth in truths.items()}
    accumulate_row_dots_(scores["row dots"], x, dx)
    accumulate_parameter_scores_(scores["parameter"], weight, x, g)
    errors = {n: (scores[n] / truth - 1).abs().max().item() for n, truth in truths.items()}
    for name, error in errors.items():
        assert error <= TOLERANCE[dtype], f"{name}: differs from its definition by {error:.2g}"
    return max(errors.values()) / TOLERANCE[dtype]
