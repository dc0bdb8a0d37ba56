"""Where backend "cuda" takes the routed GEMM, on the CPU: made of the passes it stands for.

Values of the kernel itself: tests/csrc/test_routed_gemm.cpp, test_routed_gemm_on_hopper.py.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from test_molora_linear_cuda import DROPOUT, double, extended, gradients_of
from torch import Tensor

from citi_kernels import backends, environment, molora_linear
from citi_kernels.ops import (
    extended_gemm_cuda,
    molora_linear_cuda,
    molora_linear_cuda_gradients,
    molora_linear_group,
    molora_linear_triton,
    routed_gemm_cuda,
    skinny_cuda,
)
from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.molora_linear_group import runs_together
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


def placed(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Tensor:
    """As far as a choice looks at a tensor."""
    on = torch.device(device)
    return SimpleNamespace(shape=torch.Size(shape), dim=lambda: len(shape), dtype=dtype, device=on)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(molora_linear_cuda, "_has_extended_gemm", lambda index: True)


def is_fastest(x: Tensor, rank: int = 32, has_weight: bool = True, **changes: object) -> bool:
    settings = Settings(4, 1.0, None, False, None, 0, 0.0, None)._replace(**changes)
    return molora_linear_cuda.is_fastest(x, rank, settings, has_weight=has_weight)


def test_it_comes_before_triton_where_it_was_faster(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_fastest(placed(2, 1024, 64))
    assert is_fastest(placed(2048, 64), top_k=4)
    assert not is_fastest(placed(2, 1023, 64))
    assert not is_fastest(placed(2048, 64), top_k=2)
    assert not is_fastest(placed(2048, 64), dropout_p=0.1)
    assert not is_fastest(placed(2048, 64, dtype=torch.float32))
    assert not is_fastest(placed(2048, 64, device="cpu"))
    monkeypatch.setattr(molora_linear_cuda, "_has_extended_gemm", lambda index: False)
    assert not is_fastest(placed(2048, 64))


@pytest.mark.parametrize(("num_experts", "rank"), [(4, 129), (4, 256), (64, 128), (100, 100)])
def test_triton_comes_first_where_it_alone_has_a_fused_path(
    on_hopper: None, num_experts: int, rank: int
) -> None:
    settings = Settings(num_experts, 1.0, None, False, None, 0, 0.0, None)
    assert molora_linear_cuda.path(8192, (rank, 64), torch.bfloat16, settings) == "library"
    assert molora_linear_triton.path(rank, torch.bfloat16, settings) == "dense"
    assert not is_fastest(placed(8192, 64), rank, num_experts=num_experts)


def test_triton_comes_first_where_no_weight_makes_a_gemm(on_hopper: None) -> None:
    assert not is_fastest(placed(8192, 64), has_weight=False)


@pytest.fixture
def asked(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Which backend a choice was to try first."""
    firsts = []

    def choose(op: str, x: Tensor, *, first: str | None = None) -> str:
        firsts.append(first)
        return "torch"

    monkeypatch.setattr(backends, "choose", choose)
    return firsts


@pytest.mark.parametrize(
    ("options", "first"),
    [({}, "cuda"), ({"dropout_p": 0.1}, None), ({"has_weight": False}, None)],
)
def test_a_group_asks_what_its_layers_would(asked: list, options: dict, first: str | None) -> None:
    assert not runs_together(placed(8192, 64), 32, num_experts=4, **options)
    assert asked == [first]


def test_a_group_under_autocast_asks_for_the_dtype_that_its_layers_get(
    asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(molora_linear_group, "autocast_is_on", lambda x: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert not runs_together(placed(8192, 64, dtype=torch.float32), 32, num_experts=4)
    assert asked == ["cuda"]


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_group_says_what_its_layers_are(
    monkeypatch: pytest.MonkeyPatch, weight: bool, dropout_p: float
) -> None:
    told = {}
    monkeypatch.setattr(
        molora_linear_group, "runs_together", lambda *_, **options: told.update(options)
    )
    case = random_case(6, 8, 10, weight=weight)
    lists = [[each, each] for each in case.operands[1:]]
    seeds = [torch.tensor(0)] * 2
    molora_linear_group.molora_linear_group(
        case.x, *lists, **case.options | {"dropout_p": dropout_p}, dropout_seeds=seeds
    )
    assert (told["dropout_p"], told["has_weight"]) == (dropout_p, weight)
