"""The routed GEMM on a Hopper GPU: values by the accuracy rule, the same bits at every run.

Without one they are skipped; what the kernel computes is then tested by
`tests/csrc/test_routed_gemm.cpp`, on a model of the hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from citi_kernels.ops import extended_gemm_cuda as extended
from citi_kernels.ops import routed_gemm_cuda as op
from citi_kernels.ops import skinny_cuda as skinny
from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.testing import assert_accurate, exact_matmul, poisoned_memory

# tokens, in, out, experts, rank; both kinds of tiles, edges in every dimension, the last with more
# tiles of rows than the GPU holds clusters
SHAPES = {
    "one token": (1, 64, 8, 4, 8),
    "edges": (300, 200, 520, 7, 7),
    "many tiles": (2500, 1064, 4104, 20, 2),
    "a layer": (4096, 4096, 4096, 4, 8),
    "many rows": (20000, 512, 1024, 4, 8),
}
SCALING = 1.5


class Layer(NamedTuple):
    """Operands of one dtype; dgate is fp32."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor
    router: Tensor
    dy: Tensor
    dgate: Tensor


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return extended.aligned_rows((scale * torch.randn(*shape, device="cuda")).to(dtype))


def _layer(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> Layer:
    tokens, num_in, num_out, experts, rank = shape
    return Layer(
        x=_random(tokens, num_in, dtype=dtype),
        weight=_random(num_out, num_in, dtype=dtype, scale=num_in**-0.5),
        bias=torch.randn(num_out, device="cuda").to(dtype),
        a=_random(experts * rank, num_in, dtype=dtype, scale=num_in**-0.5),
        b=_random(num_out, experts * rank, dtype=dtype),
        router=_random(experts + 1, num_in, dtype=dtype, scale=num_in**-0.5),
        dy=_random(tokens, num_out, dtype=dtype, scale=num_out**-0.5),
        dgate=torch.randn(tokens, experts + 1, device="cuda"),
    )


def _settings(experts: int) -> Settings:
    return Settings(experts, SCALING, None, False, None, 0, 0.0, None)


def _prepared(layer: Layer, experts: int) -> tuple[skinny.Sizes, Tensor]:
    sizes = skinny.Sizes(layer.x.shape[0], experts, layer.a.shape[0])
    stack = skinny.stack(layer.a, layer.router, sizes, layer.x.dtype)
    return sizes, stack[:, : layer.x.shape[1]]


def _forward_in_fp64(layer: Layer, rank: int) -> tuple[Tensor, ...]:
    x, weight, bias, a, b, router = (each.double() for each in layer[:6])
    probs = (x @ router.t()).softmax(1)
    h = x @ a.t()
    u = SCALING * h * probs[:, 1:].repeat_interleave(rank, 1)
    return x @ weight.t() + bias + u @ b.t(), h, u, probs


def _backward_in_fp64(layer: Layer, h: Tensor, probs: Tensor, rank: int) -> tuple[Tensor, ...]:
    weight, _, a, b, router, dy, dgate = (each.double() for each in layer[1:])
    h, probs, du = h.double(), probs.double(), dy @ b
    dh = SCALING * du * probs[:, 1:].repeat_interleave(rank, 1)
    dgate = dgate.clone()
    dgate[:, 1:] += SCALING * (h * du).unflatten(1, (-1, rank)).sum(2)
    dlogits = probs * (dgate - (probs * dgate).sum(1, keepdim=True))
    return dy @ weight + dh @ a + dlogits @ router, dh, dlogits


def _runs(call: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    with poisoned_memory():
        runs = [call() for _ in range(3)]
    torch.cuda.synchronize()
    return runs


def _assert_same_bits(runs: list[tuple[Tensor, ...]]) -> None:
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    matrix = torch.zeros(8, 8, device="cuda", dtype=torch.bfloat16)
    if reason := op.why_not(matrix, matrix, None, skinny.Sizes(8, 1, 8), _settings(1)):
        pytest.skip(reason)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_layer(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    *_, experts, rank = shape
    layer, settings = _layer(shape, dtype), _settings(experts)
    sizes, stack = _prepared(layer, experts)
    x, weight, bias, b = layer.x, layer.weight, layer.bias, layer.b
    assert op.why_not(x, weight, bias, sizes, settings) is None
    runs = _runs(lambda: op.routed_linear(x, weight, bias, stack, b, sizes, settings))
    rows = skinny.stack(layer.a, layer.router, sizes, dtype)
    h, u, probs = skinny.shrink_route(skinny.aligned(x), rows, sizes, settings)
    y = extended.extended_linear(x, weight, bias, u[:, : sizes.R], b)
    with exact_matmul():
        truth = _forward_in_fp64(layer, rank)
    assert runs[0][2][:, sizes.R :].count_nonzero() == 0
    ours, unfused = list(runs[0]), [y, h, u[:, : sizes.R], probs]
    ours[2] = ours[2][:, : sizes.R]
    for name, mine, true, plain in zip(("y", "h", "u", "probs"), ours, truth, unfused, strict=True):
        assert_accurate(mine, true, plain, name=name, dtype=dtype)
    _assert_same_bits(runs)


@pytest.mark.parametrize("has_dgate", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_input_gradient(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, has_dgate: bool
) -> None:
    *_, experts, rank = shape
    layer, settings = _layer(shape, dtype), _settings(experts)
    if not has_dgate:
        layer.dgate.zero_()
    sizes, stack = _prepared(layer, experts)
    h = (layer.x @ layer.a.t()).contiguous()
    probs = (layer.x.float() @ layer.router.float().t()).softmax(1)
    dy, weight, b, dgate = layer.dy, layer.weight, layer.b, layer.dgate if has_dgate else None
    assert op.why_not(dy, weight, None, sizes, settings) is None

    def call() -> tuple[Tensor, ...]:
        return op.routed_input_gradient(dy, weight, b, h, probs, dgate, stack, sizes, settings)

    runs = _runs(call)
    aligned = skinny.aligned(dy)
    rows = skinny.packed((sizes.P, aligned.shape[1]), dtype, (b.t(), 0))
    parts = skinny.row_products(aligned, rows)
    dz = skinny.rank_gradients(parts, h, probs, dgate, sizes, settings)
    dx = extended.extended_input_gradient(dy, weight, dz, stack)
    with exact_matmul():
        truth = _backward_in_fp64(layer, h, probs, rank)
    ranks, gates = slice(0, sizes.R), slice(sizes.P, sizes.P + sizes.G)
    ours = [runs[0][0], runs[0][1][:, ranks], runs[0][1][:, gates]]
    unfused = [dx, dz[:, ranks], dz[:, gates]]
    for name, mine, true, plain in zip(("dx", "dh", "dlogits"), ours, truth, unfused, strict=True):
        assert_accurate(mine, true, plain, kind="backward", name=name)
    assert runs[0][1][:, sizes.R : sizes.P].count_nonzero() == 0
    assert runs[0][1][:, sizes.P + sizes.G :].count_nonzero() == 0
    _assert_same_bits(runs)


def test_a_graph_replays_it() -> None:
    layer, settings = _layer(SHAPES["edges"], torch.bfloat16), _settings(7)
    sizes, stack = _prepared(layer, 7)

    def call() -> tuple[Tensor, ...]:
        operands = layer.x, layer.weight, layer.bias, stack, layer.b
        return op.routed_linear(*operands, sizes, settings)

    wanted, graph = call(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = call()
    for _ in range(3):
        for each in given:
            each.fill_(float("nan"))
        graph.replay()
        _assert_same_bits([wanted, given])
