"""The extended GEMM on a Hopper GPU: values by the accuracy rule, the same bits at every run.

Without one they are skipped; what the kernel computes is then tested by
`tests/csrc/test_extended_gemm_plan.cpp`, on a model of the hardware.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from citi_kernels.ops import extended_gemm_cuda as op
from citi_kernels.testing import assert_accurate, exact_matmul, poisoned_memory

# tokens, in, out, width of the extension; both kinds of tiles, edges in every dimension
SHAPES = {
    "one token": (1, 64, 8, 32),
    "edges": (300, 200, 520, 37),
    "many tiles": (2500, 1064, 4104, 40),
    "a layer": (4096, 4096, 4096, 32),
    "plain": (1030, 776, 2056, 0),
}


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return op.aligned_rows(torch.randn(*shape, device="cuda").to(dtype))


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    matrix = torch.zeros(8, 8, device="cuda", dtype=torch.bfloat16)
    if reason := op.why_not(matrix, matrix):
        pytest.skip(reason)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_layer(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, num_in, num_out, width = shape
    x, weight = _random(tokens, num_in, dtype=dtype), _random(num_out, num_in, dtype=dtype)
    bias = torch.randn(num_out, device="cuda").to(dtype)
    ranks = ()
    if width:
        ranks = _random(tokens, width, dtype=dtype), _random(num_out, width, dtype=dtype)
    assert op.why_not(x, weight, bias, ranks or None) is None
    with poisoned_memory():
        runs = [op.extended_linear(x, weight, bias, *ranks) for _ in range(3)]

    def product(x: Tensor, weight: Tensor, bias: Tensor, *ranks: Tensor) -> Tensor:
        y = x @ weight.t() + bias
        return y + ranks[0] @ ranks[1].t() if ranks else y

    inputs = (x, weight, bias, *ranks)
    with exact_matmul():
        truth = product(*(each.double() for each in inputs))
        assert_accurate(runs[0], truth, product(*inputs), name="y")
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_input_gradient(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tokens, num_in, num_out, width = shape
    dy, weight = _random(tokens, num_out, dtype=dtype), _random(num_out, num_in, dtype=dtype)
    extension = ()
    if width:
        extension = _random(tokens, width, dtype=dtype), _random(width, num_in, dtype=dtype)
    assert op.why_not(dy, weight, None, extension or None) is None
    with poisoned_memory():
        runs = [op.extended_input_gradient(dy, weight, *extension) for _ in range(3)]

    def product(dy: Tensor, weight: Tensor, *extension: Tensor) -> Tensor:
        dx = dy @ weight
        return dx + extension[0] @ extension[1] if extension else dx

    inputs = (dy, weight, *extension)
    with exact_matmul():
        truth = product(*(each.double() for each in inputs))
        assert_accurate(runs[0], truth, product(*inputs), kind="backward", name="dx")
    assert all(torch.equal(run, runs[0]) for run in runs)
