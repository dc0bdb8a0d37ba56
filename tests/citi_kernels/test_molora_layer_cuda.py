"""A layer of backend "cuda" in one call: what it is given, on the CPU, by a double of the call.

What the call does with it: tests/csrc/test_layer_plan.cpp. On a GPU the results are compared with
those of the launches one by one, bitwise.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from skinny_double import SkinnyDouble, StreamDouble, _Call, _padded, _scaled
from test_molora_linear_cuda import DROPOUT, double
from torch import Tensor

from citi_kernels import environment, molora_linear, use_backend
from citi_kernels.ops import (
    extended_gemm_cuda,
    molora_layer_cuda,
    molora_linear_cuda,
    side_stream,
)
from citi_kernels.testing import (
    OPERANDS,
    check_molora_linear,
    evaluate,
    poisoned_memory,
    random_case,
)
from under_test import DEVICE

__all__ = ["double"]  # a fixture
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the double computes on the CPU")


class LayerDouble(SkinnyDouble):
    """The two calls in PyTorch, from the numbers that the kernels would get."""

    def layer_forward_bytes(self, **sizes: Any) -> int:
        return 1024 if self._checks is None else self._checks.layer_forward_bytes(**sizes)

    def layer_backward_bytes(self, **sizes: Any) -> int:
        return 1024 if self._checks is None else self._checks.layer_backward_bytes(**sizes)

    def layer_forward_cuda(self, **arguments: Any) -> None:
        call = self._begin_aligned("layer_forward_cuda", arguments)
        T, E, r, K, N = call.shape
        x_TK = call.matrix("x", T, K)
        router_GK = _rounded(call.matrix("router", E + 1, K), x_TK)
        probs_TG = (x_TK.float() @ router_GK.float().T).softmax(1)
        call.vector("probs", T, E + 1).copy_(probs_TG)
        h_TR = call.vector("h", T, E * r)
        h_TR.copy_(x_TK.float() @ _rounded(call.matrix("a", E * r, K), x_TK).float().T)
        u_TR = _gated(h_TR, probs_TG, call).to(x_TK.dtype)
        b_NR = _rounded(call.matrix("b", N, E * r), x_TK)
        y_TN = x_TK.float() @ call.matrix("weight", N, K).float().T + u_TR.float() @ b_NR.float().T
        if call.bias is not None:
            y_TN += call.vector("bias", N).float()
        call.vector("y", T, N).copy_(y_TN)

    def layer_backward_cuda(self, **arguments: Any) -> None:
        call = self._begin_aligned("layer_backward_cuda", arguments)
        T, E, r, K, N = call.shape
        dy_TN, h_TR = call.matrix("dy", T, N), call.vector("h", T, E * r)
        probs_TG = call.vector("probs", T, E + 1)
        du_TR = dy_TN.float() @ _rounded(call.matrix("b", N, E * r), dy_TN).float()
        dgate_TG = torch.zeros(T, E + 1)
        if call.dgate is not None:
            dgate_TG += call.vector("dgate", T, E + 1)
        dgate_TG[:, 1:] += call.scaling * (du_TR * h_TR.float()).reshape(T, E, r).sum(2)
        inner_T1 = (probs_TG * dgate_TG).sum(1, keepdim=True)
        dh_TR = _gated(du_TR, probs_TG, call).to(dy_TN.dtype).float()
        dlogits_TG = (probs_TG * (dgate_TG - inner_T1)).to(dy_TN.dtype).float()
        dx_TK = dy_TN.float() @ call.matrix("weight", N, K).float()
        dx_TK += dh_TR @ _rounded(call.matrix("a", E * r, K), dy_TN).float()
        dx_TK += dlogits_TG @ _rounded(call.matrix("router", E + 1, K), dy_TN).float()
        call.vector("dx", T, K).copy_(dx_TK)
        if call.db is not None:
            u_TR = _gated(h_TR, probs_TG, call).to(dy_TN.dtype).float()
            call.vector("db", N, E * r).copy_(dy_TN.float().T @ u_TR)
        if call.da is not None:
            call.vector("da", E * r, K).copy_(dh_TR.T @ call.matrix("x", T, K).float())
        if call.drouter is not None:
            call.vector("drouter", E + 1, K).copy_(dlogits_TG.T @ call.matrix("x", T, K).float())

    def _begin_aligned(self, name: str, arguments: dict[str, Any]) -> _Call:
        """The checks of `_C` see a workspace where a GPU's allocator would put one."""
        self.routed = arguments["is_routed"]
        address, num_bytes = arguments["workspace"]
        memory = torch.empty(num_bytes + 256, dtype=torch.uint8)
        place = -(-memory.data_ptr() // 256) * 256
        assert address
        return self._begin(name, arguments | {"workspace": (place, num_bytes)})


def _rounded(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.to(like.dtype)


def _gated(value_TR: Tensor, probs_TG: Tensor, call: _Call) -> Tensor:
    T, E, r, _, _ = call.shape
    ranks = _Call({"shape": (T, E, r), "scaling": call.scaling})
    return _scaled(value_TR, probs_TG, _padded(E * r), ranks)[:, : E * r]


@pytest.fixture
def layer(double: SkinnyDouble, monkeypatch: pytest.MonkeyPatch) -> LayerDouble:
    """Every layer that one call can take is taken by it."""
    from citi_kernels import compiled

    layer = LayerDouble()
    layer._checks = double._checks
    monkeypatch.setattr(compiled, "extension", lambda: layer)
    monkeypatch.setattr(environment, "EXTENDED_GEMM", True)
    monkeypatch.setattr(environment, "ROUTED_GEMM", True)
    monkeypatch.setattr(environment, "TRIALS", environment.TRIALS | {molora_layer_cuda.NAME})
    monkeypatch.setattr(molora_linear_cuda, "MIN_EXTENDED_TOKENS", 8)
    monkeypatch.setattr(molora_linear_cuda, "MIN_ROUTED_TOKENS", 48)
    monkeypatch.setattr(extended_gemm_cuda, "why_not_on", lambda device: None)
    monkeypatch.setattr(side_stream, "_side_stream", lambda _: StreamDouble("side", layer.record))
    molora_layer_cuda._forward_bytes.cache_clear()
    molora_layer_cuda._backward_bytes.cache_clear()
    return layer


CALLS = {"layer_forward_cuda": 1, "layer_backward_cuda": 1}


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"num_segments": None}, {"parameter_dtype": torch.float32}, {"r": 5}],
    ids=["plain", "no bias", "no segments", "fp32 adapters", "rank 5"],
)
@pytest.mark.parametrize("num_tokens", [20, 61], ids=["extended", "routed"])
def test_a_layer_is_one_call_a_direction(
    layer: LayerDouble, num_tokens: int, options: dict, dtype: torch.dtype
) -> None:
    with poisoned_memory():
        check_molora_linear(molora_linear, random_case(num_tokens, 96, 80, dtype=dtype, **options))
    assert layer.calls == CALLS
    assert layer.routed == (num_tokens == 61)


@on_cpu
@pytest.mark.parametrize("needs", itertools.product([False, True], repeat=3))
def test_gradients_that_are_not_asked_for_are_left_out(
    layer: LayerDouble, needs: tuple[bool, bool, bool]
) -> None:
    case = random_case(61, 96, 80, dtype=torch.bfloat16)
    everything = evaluate(molora_linear, case)
    layer.calls.clear()
    asked = {"x", *itertools.compress(("a", "b", "router"), needs)}
    leaves = {
        name: each.detach().requires_grad_(name in asked)
        for name, each in zip(OPERANDS, case.operands, strict=True)
    }
    y, gate_sums = molora_linear(*leaves.values(), **case.options)
    wanted = [leaves[name] for name in asked]
    gradients = torch.autograd.grad([y, gate_sums], wanted, [case.dy, case.dgate_sums])
    for name, gradient in zip(asked, gradients, strict=True):
        assert torch.equal(gradient, everything[f"d{name}"]), name
    assert layer.calls == CALLS


@on_cpu
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((7, 96, 80), {}),
        ((61, 90, 80), {}),
        ((61, 96, 81), {}),
        ((61, 96, 80), DROPOUT),
        ((61, 96, 80), {"top_k": 2}),
        ((61, 96, 80), {"weight": False}),
        ((61, 96, 80), {"parameter_dtype": torch.float64}),
    ],
    ids=["few tokens", "odd K", "odd N", "dropout", "top-k", "no weight", "fp64 adapters"],
)
def test_what_one_call_does_not_know_goes_launch_by_launch(
    layer: LayerDouble, monkeypatch: pytest.MonkeyPatch, size: tuple, options: dict
) -> None:
    monkeypatch.setattr(extended_gemm_cuda, "why_not", lambda *_: "not here")
    check_molora_linear(molora_linear, random_case(*size, dtype=torch.bfloat16, **options))
    assert not CALLS.keys() & layer.calls.keys()


@on_cpu
def test_it_is_off_without_its_name(layer: LayerDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "TRIALS", environment.TRIALS - {molora_layer_cuda.NAME})
    monkeypatch.setattr(extended_gemm_cuda, "why_not", lambda *_: "not here")
    evaluate(molora_linear, random_case(61, 96, 80, dtype=torch.bfloat16))
    assert not CALLS.keys() & layer.calls.keys()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("num_segments", [None, 3])
@pytest.mark.parametrize(
    ("num_tokens", "num_in", "num_out"),
    [(600, 256, 1024), (2048, 4096, 4096), (4096, 1024, 264), (8192, 576, 1536)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_bits_are_those_of_the_launches_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_tokens: int,
    num_in: int,
    num_out: int,
    num_segments: int | None,
) -> None:
    if extended_gemm_cuda.why_not_on(torch.device("cuda", 0)) is not None:
        pytest.skip("needs a Hopper GPU")
    case = random_case(
        num_tokens,
        num_in,
        num_out,
        dtype=dtype,
        num_segments=num_segments,
        parameter_dtype=torch.float32,
        device="cuda",
    )
    results = []
    for name in (set(), {molora_layer_cuda.NAME}):
        monkeypatch.setattr(environment, "TRIALS", environment.TRIALS - {"one_call"} | name)
        with use_backend("cuda"), poisoned_memory():
            results.append([evaluate(molora_linear, case) for _ in range(2)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), key
