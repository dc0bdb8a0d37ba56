"""The importance ops by themselves, over one frozen linear and over a stored weight gradient.

    frozen linear      forward and backward, the gradient of x alone
    wgrad + abs-sum    (weight * (g.T @ x)).abs().sum(): what `parameter scores` replaces
    row dots           of x and dx: `token` and `batch`; by column; by row, of y and g
    parameter scores   of the component, by row, by column, and elements into fp32 or bf16

Ratios to both, medians, all rows in turn. Run by `importance.py --ops`. On a GPU: written for it,
not yet run on one. The CPU takes smaller sizes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from molora_linear import DTYPES, Shape, measure
from torch import Tensor

from citi_kernels.ops.importance_parameters import accumulate_parameter_scores_
from citi_kernels.ops.importance_reference import parameter_scores_ref, row_dots_ref
from citi_kernels.ops.importance_row_dots import accumulate_row_dots_

SHAPES = {
    "cuda": [Shape(T, 4096, N) for N in (4096, 14336) for T in (512, 2048, 8192)],
    "cpu": [Shape(T, 1024, N) for N in (1024, 3584) for T in (256, 512)],
}
CHECKED_TOKENS = 64
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}


class Linear(NamedTuple):
    """What the backward of one component has in hand."""

    x: Tensor
    weight: Tensor
    y: Tensor
    g: Tensor
    dx: Tensor


def make_linear(shape: Shape, arguments: argparse.Namespace) -> Linear:
    def draw(*size: int, scale: float = 1.0) -> Tensor:
        random = torch.randn(size, device=arguments.device) * scale
        return random.to(DTYPES[arguments.dtype])

    x, weight = draw(shape.T, shape.K), draw(shape.N, shape.K, scale=shape.K**-0.5)
    g = draw(shape.T, shape.N)
    return Linear(x, weight, x @ weight.T, g, g @ weight)


def make_cases(linear: Linear) -> dict[str, Callable[[], object]]:
    x, weight, y, g, dx = linear
    leaf = x.detach().requires_grad_()
    num_out, num_in = weight.shape

    def row_dots(a: Tensor, b: Tensor, size: int) -> Callable[[], None]:
        scores = torch.zeros(size, dtype=torch.float64, device=x.device)
        return lambda: accumulate_row_dots_(scores, a, b)

    def parameters(*shape: int, dtype: torch.dtype = torch.float64) -> Callable[[], None]:
        scores = torch.zeros(shape, dtype=dtype, device=x.device)
        return lambda: accumulate_parameter_scores_(scores, weight, x, g)

    return {
        "frozen linear": lambda: torch.autograd.grad(F.linear(leaf, weight), leaf, g),
        "wgrad + abs-sum": lambda: (weight * (g.T @ x)).abs().sum(),
        "row dots": row_dots(x, dx, 1),
        "row dots by column": row_dots(x, dx, num_in),
        "row dots by row": row_dots(y, g, num_out),
        "parameter scores": parameters(1, 1),
        "parameter by row": parameters(num_out, 1),
        "parameter by column": parameters(1, num_in),
        "elements fp32": parameters(num_out, num_in, dtype=torch.float32),
        "elements bf16": parameters(num_out, num_in, dtype=torch.bfloat16),
    }


def check(shape: Shape, arguments: argparse.Namespace) -> None:
    """Both ops against their definitions on few tokens; exits if they differ."""
    x, weight, _, g, dx = make_linear(shape._replace(T=CHECKED_TOKENS), arguments)
    truths = (row_dots_ref(x, dx), parameter_scores_ref(weight, x, g))
    results = [torch.zeros_like(truth) for truth in truths]
    accumulate_row_dots_(results[0], x, dx)
    accumulate_parameter_scores_(results[1], weight, x, g)
    for name, result, truth in zip(("row dots", "parameter"), results, truths, strict=True):
        error = (result / truth - 1).abs().max().item()
        if not error <= TOLERANCE[arguments.dtype]:
            sys.exit(f"{shape}, {name}: differs from its definition by {error:.2g}")


def run(arguments: argparse.Namespace) -> list[dict]:
    """Measure and print every shape; one dictionary each."""
    arguments.quick = False
    rows = []
    for shape in SHAPES[arguments.device]:
        torch.manual_seed(0)
        check(shape, arguments)
        rounds = measure(make_cases(make_linear(shape, arguments)), arguments)
        row = {"shape": shape._asdict(), "dtype": arguments.dtype, "rounds": len(rounds)}
        bases = {"frozen_linear": "frozen linear", "wgrad": "wgrad + abs-sum"}
        for key, base in bases.items():
            row[f"ratio_to_{key}"] = {
                name: statistics.median(each[name] / each[base] for each in rounds)
                for name in rounds[0]
            }
        row["milliseconds"] = {
            name: 1e3 * statistics.median(each[name] for each in rounds) for name in rounds[0]
        }
        print_row(shape, row)
        rows.append(row)
    return rows


def print_row(shape: Shape, row: dict) -> None:
    print(f"\n{shape}, {row['dtype']}: {row['rounds']} rounds")
    for name, milliseconds in row["milliseconds"].items():
        frozen, wgrad = (row[f"ratio_to_{key}"][name] for key in ("frozen_linear", "wgrad"))
        times = f"{frozen:7.3f} x frozen linear   {wgrad:7.3f} x wgrad + abs-sum"
        print(f"  {name:20} {times}   {milliseconds:9.3f} ms", flush=True)
