"""Where backend "cuda" takes the routed GEMM, on the CPU: made of the passes it stands for.

Values of the kernel itself: tests/csrc/test_routed_gemm.cpp, test_routed_gemm_on_hopper.py.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from test_molora_linear_cuda import DROPOUT, double, extended, gradients_of

from citi_kernels import environment, molora_linear
from citi_kernels.ops import (
    extended_gemm_cuda,
    molora_linear_cuda,
    molora_linear_cuda_gradients,
    routed_gemm_cuda,
    skinny_cuda,
)
from citi_kernels.testing import (
    OPERANDS,
    assert_accurate,
    check_molora_linear,
    evaluate,
    poisoned_memory,
    random_case,
)
from under_test import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the double computes on the CPU")
__all__ = ["double", "extended"]  # fixtures


@pytest.fixture
def arrives() -> bool:
    """Whether dz is counted before the launches beside the GEMM look."""
    return True


@pytest.fixture
def routed(extended: list[str], monkeypatch: pytest.MonkeyPatch, arrives: bool) -> list[str]:
    """The GEMM that makes its own ranks, out of the passes that it stands for."""

    def routed_linear(x, weight, bias, stack, b, sizes, settings, counts):
        assert counts is None or counts.count_nonzero() == 0
        extended.append("routed y")
        h, u, probs = skinny_cuda.shrink_route(x, stack, sizes, settings)
        y = extended_gemm_cuda.extended_linear(x, weight, bias, u[:, : sizes.R], b[:, : sizes.R])
        return y, h, u, probs

    def routed_input_gradient(
        dy, weight, b, h, probs, dgate, stack, sizes, settings, counts, dz_TZ
    ):
        assert counts.count_nonzero() == 0
        extended.append("routed dx")
        b_PN = torch.nn.functional.pad(b.T[: sizes.R], (0, 0, 0, sizes.P - sizes.R)).contiguous()
        du = skinny_cuda.row_products(dy, b_PN)
        dz = dz_TZ.copy_(skinny_cuda.rank_gradients(du, h, probs, dgate, sizes, settings))
        counts.fill_(2 if arrives else 1)
        return extended_gemm_cuda.extended_input_gradient(dy, weight, dz, stack), dz

    monkeypatch.setattr(environment, "ROUTED_GEMM", True)
    monkeypatch.setattr(molora_linear_cuda_gradients, "MIN_ROUTED_TOKENS", 1)
    monkeypatch.setattr(routed_gemm_cuda, "routed_linear", routed_linear)
    monkeypatch.setattr(routed_gemm_cuda, "routed_input_gradient", routed_input_gradient)
    return extended


def test_the_ranks_come_from_the_product_where_it_can_make_them(routed: list[str]) -> None:
    with poisoned_memory():
        check_molora_linear(molora_linear, random_case(61, 96, 80, dtype=torch.bfloat16))
    assert (routed.count("routed y"), routed.count("routed dx")) == (1, 1)
    for options in (DROPOUT, {"top_k": 2}, {"num_experts": 8, "r": 8}, {"weight": False}):
        routed.clear()
        evaluate(molora_linear, random_case(61, 96, 80, dtype=torch.bfloat16, **options))
        assert not {"routed y", "routed dx"} & set(routed)


def test_every_subset_of_gradients_with_the_routed_gemm_is_the_same_to_rounding(
    routed: list[str],
) -> None:
    case = random_case(9, 24, 16, dtype=torch.bfloat16)
    expected = evaluate(molora_linear, case)
    for size in range(1, len(OPERANDS) + 1):
        for subset in itertools.combinations(OPERANDS, size):
            for name, gradient in gradients_of(case, subset).items():
                assert_accurate(
                    gradient, expected[f"d{name}"].double(), expected[f"d{name}"], name=name
                )


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("subset", [OPERANDS, ("x", "a"), ("x", "router"), ("x", "b")])
def test_gradients_that_begin_beside_the_gemm_are_the_same(
    routed: list[str], double, monkeypatch: pytest.MonkeyPatch, subset: tuple[str, ...]
) -> None:
    case = random_case(61, 96, 80, dtype=torch.bfloat16)
    monkeypatch.setattr(environment, "TRIALS", frozenset())
    expected = gradients_of(case, subset)
    double.calls.clear()
    trials = frozenset({"down_beside", "zeros_in_pack", "fit_up", "fit_narrow", "group_16"})
    monkeypatch.setattr(environment, "TRIALS", trials)
    with poisoned_memory():
        given = gradients_of(case, subset)
    for name, gradient in given.items():
        assert torch.equal(gradient, expected[name]), name
    has_up, has_down = "b" in subset, bool({"a", "router"} & set(subset))
    assert double.calls["factor_gradients_cuda"] == has_up + 2 * has_down


def test_it_comes_before_triton_where_it_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(molora_linear_cuda, "_has_extended_gemm", lambda index: True)

    def is_fastest(*shape: int, dtype=torch.bfloat16, device="cuda", top_k=None, p=0.0) -> bool:
        x = SimpleNamespace(shape=torch.Size(shape), dtype=dtype, device=torch.device(device))
        return molora_linear_cuda.is_fastest(x, 4, top_k, p)

    assert is_fastest(2, 1024, 64)
    assert is_fastest(2048, 64, top_k=4)
    assert not is_fastest(2, 1023, 64)
    assert not is_fastest(2048, 64, top_k=2)
    assert not is_fastest(2048, 64, p=0.1)
    assert not is_fastest(2048, 64, dtype=torch.float32)
    assert not is_fastest(2048, 64, device="cpu")
    monkeypatch.setattr(molora_linear_cuda, "_has_extended_gemm", lambda index: False)
    assert not is_fastest(2048, 64)
