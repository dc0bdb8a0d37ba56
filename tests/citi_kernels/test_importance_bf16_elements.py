"""Scores of elements in bf16: stochastic rounding, the same on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from citi_kernels import use_backend
from citi_kernels.ops.importance_parameters import accumulate_parameter_scores_
from citi_kernels.ops.importance_reference import parameter_scores_ref
from importance_inputs import draw, parameter_case


def exact_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, whose scores are the same in every order of summation."""
    return tuple((4 * each).round() for each in parameter_case(19, 33, 53, dtype=dtype))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 3, 2**63 - 1])
def test_bf16_elements_are_rounded_as_by_the_torch_backend_bit_by_bit(seed: int) -> None:
    tensors = exact_case()
    tensors[2][0] = draw(33, seed=4).mul(4).round()
    before = draw(33, 53, seed=3).abs().mul(100).bfloat16()
    ours, theirs = before.clone(), before.clone()
    accumulate_parameter_scores_(ours, *tensors, scale=0.25, seed=seed)
    with use_backend("torch"):
        accumulate_parameter_scores_(theirs, *tensors, scale=0.25, seed=seed)
    assert torch.equal(ours, theirs)
    exact = before.double() + parameter_scores_ref(*tensors, (33, 53)) / 4
    assert (ours != exact).any()
    assert ((ours.double() - exact).abs() <= 2.0**-7 * exact).all()


def test_every_bit_of_the_seed_counts() -> None:
    results = []
    for seed in (0, 1, 2**31, 2**32, 2**62):
        scores = torch.full((33, 53), 100.0, dtype=torch.bfloat16)
        accumulate_parameter_scores_(scores, *exact_case(), scale=1 / 64, seed=seed)
        results.append(scores)
    assert all(not torch.equal(results[i], results[j]) for i in range(5) for j in range(i))


def test_bf16_elements_are_right_on_average() -> None:
    """64 steps of 1/16 of the spacing of bf16: nearest rounding would lose every one."""
    scores = torch.ones(32, 32, dtype=torch.bfloat16)
    weight, x, g = torch.full((32, 32), 2.0**-11), torch.ones(1, 32), torch.ones(1, 32)
    for seed in range(64):
        accumulate_parameter_scores_(scores, weight, x, g, seed=seed)
    spacing = 2.0**-7
    gained = (scores.float() - 1) / spacing
    assert abs(gained.mean().item() - 4) <= 0.25  # four standard deviations of the mean
    assert 1.7 <= gained.std().item() <= 2.2  # of each: sqrt(64 · 1/16 · 15/16) = 1.94


def test_elements_are_rounded_independently_of_each_other_over_seeds_that_count() -> None:
    """Errors of a row or column average out, which they do not where seeds move bits to others."""
    scores = torch.ones(64, 64, dtype=torch.bfloat16)
    weight, x, g = torch.full((64, 64), 2.0**-9), torch.ones(1, 64), torch.ones(1, 64)
    for seed in range(64):
        accumulate_parameter_scores_(scores, weight, x, g, seed=seed)
    gained = (scores.float() - 1) * 2.0**7
    # of the mean of 64 elements: sqrt(64 · 1/4 · 3/4 / 64) = 0.43
    for axis in (0, 1):
        assert 0.3 <= gained.mean(axis).std().item() <= 0.6


@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FFFFFFF], ids=["inf", "NaN", "all"])
def test_what_is_not_finite_stays_what_it_is(bits: int) -> None:
    weight, x, g = parameter_case(19, 33, 53)
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weight[3, 5] = value
    scores = torch.zeros(33, 53, dtype=torch.bfloat16)
    accumulate_parameter_scores_(scores, weight, x, g)
    expected = value.bfloat16()
    torch.testing.assert_close(scores[3, 5], expected, rtol=0, atol=0, equal_nan=True)
    assert scores.isfinite().sum() == scores.numel() - 1


def test_case_15_bf16_elements_repeat_bitwise() -> None:
    results = []
    for _ in range(5):
        scores = torch.ones(38, 130, dtype=torch.bfloat16)
        for seed in range(3):
            accumulate_parameter_scores_(scores, *parameter_case(dtype=torch.bfloat16), seed=seed)
        results.append(scores)
    assert all(torch.equal(each, results[0]) for each in results)
