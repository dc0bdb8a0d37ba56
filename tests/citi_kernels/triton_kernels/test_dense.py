"""The dense kernels where their grids have several tiles, shares and parts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from citi_kernels import backends, molora_linear
from citi_kernels.ops import molora_linear_reference as definition
from citi_kernels.ops import molora_linear_triton
from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.testing import (
    check_molora_linear,
    evaluate,
    poisoned_memory,
    random_case,
)
from citi_kernels.triton_kernels.dropout import dropout_of_group
from citi_kernels.triton_kernels.up_gradients import shares
from under_test import BACKEND

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_the_backend_under_test_is_triton() -> None:
    assert BACKEND == "triton"
    assert backends.choose("molora_linear", torch.ones(1, 1)) == "triton"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_several_tiles_and_shares_hold_the_rule(dtype: torch.dtype, dropout_p: float) -> None:
    options = {"dropout_p": dropout_p, "dropout_seed": torch.tensor(3, device="cpu")}
    case = random_case(
        201,
        300,
        601,
        dtype=dtype,
        parameter_dtype=torch.float32,
        **(options if dropout_p else {}),
    )
    check_molora_linear(molora_linear, case)


@pytest.mark.parametrize(
    ("num_experts", "r", "path"),
    [(1, 1, "dense"), (3, 33, "dense"), (16, 16, "dense"), (8, 64, "library"), (200, 1, "library")],
)
def test_every_width_takes_its_path_and_holds_the_rule(num_experts: int, r: int, path: str) -> None:
    case = random_case(70, 40, 50, num_experts=num_experts, r=r, dtype=torch.bfloat16)
    settings = Settings(num_experts, 1.0, None, False, None, 0, 0.0, None)
    assert molora_linear_triton.path(num_experts * r, torch.bfloat16, settings) == path
    check_molora_linear(molora_linear, case)


def test_fp32_leaves_wide_ranks_to_the_library() -> None:
    settings = Settings(4, 1.0, None, False, None, 0, 0.0, None)
    assert molora_linear_triton.path(64, torch.float32, settings) == "dense"
    assert molora_linear_triton.path(65, torch.float32, settings) == "library"


def test_workspaces_of_several_parts_are_written_whole() -> None:
    case = random_case(201, 300, 601, dtype=torch.bfloat16)
    expected = evaluate(molora_linear, case)
    with poisoned_memory():
        results = evaluate(molora_linear, case)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_rows_of_x_may_lie_apart() -> None:
    case = random_case(70, 40, 50, dtype=torch.bfloat16)
    apart = torch.full((70, 64), float("nan"), dtype=torch.bfloat16)
    apart[:, :40] = case.x
    check_molora_linear(molora_linear, replace(case, x=apart[:, :40]))


@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 8192, 70_000])
@pytest.mark.parametrize("num_tiles", [1, 16, 1000])
def test_shares_cover_every_token_once(T: int, num_tiles: int) -> None:
    num_shares, tokens = shares(T, 64, num_tiles, 132)
    assert num_shares >= 1
    assert tokens % 64 == 0
    assert num_shares * tokens >= T
    assert (num_shares - 1) * tokens < max(T, 1)
    assert num_shares * num_tiles <= max(132, num_tiles)


def test_gradients_come_in_the_dtype_of_their_parameters_from_fp32_sums() -> None:
    case = random_case(130, 40, 50, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    wide = evaluate(molora_linear, case)
    parameters = {name: getattr(case, name).bfloat16() for name in ("a", "b", "router")}
    narrow = evaluate(molora_linear, replace(case, **parameters))
    for name in ("da", "db", "drouter"):
        assert wide[name].dtype == torch.float32
        assert narrow[name].dtype == torch.bfloat16
        assert torch.equal(wide[name].bfloat16(), narrow[name])
        assert not torch.equal(wide[name], narrow[name].float())


@pytest.mark.parametrize("seed", [0, 7, 2**62 + 12345678901])
@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 0.9])
def test_the_kernels_mask_is_the_definitions_bit_for_bit(seed: int, dropout_p: float) -> None:
    """a = identity and one expert: h is x where it is kept."""
    size, seed = 32, torch.tensor(seed, device="cpu")
    x = torch.ones(70, size)
    settings = Settings(1, 1.0, None, False, None, 0, dropout_p, seed)
    operands = (x, None, None, torch.eye(size), torch.ones(3, size), torch.zeros(2, size))
    h_TR = torch.ops.citi.molora_linear(*operands, *settings, "triton")[1]
    keeps = definition.dropout_keeps((70, size), dropout_p, seed, device=x.device)
    assert torch.equal(h_TR != 0, keeps)
    assert 0 < keeps.float().mean() < 1


def test_arguments_of_dropout_fit_int32_for_every_seed() -> None:
    for seed in (0, -1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63)):
        settings = Settings(1, 1.0, None, False, None, 0, 0.999, torch.tensor(seed, device="cpu"))
        values = dropout_of_group([settings] * 3)
        integers = [value for name, value in values.items() if name != "inverse_keep"]
        assert all(-(2**31) <= value < 2**31 for value in integers)
