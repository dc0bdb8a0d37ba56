"""The judge is judged: the accuracy rule, poison, guard bands, random cases."""

from __future__ import annotations

import pytest
import torch

from citi_kernels import molora_linear
from citi_kernels.testing import (
    OPERANDS,
    assert_accurate,
    check_molora_linear,
    embed,
    evaluate,
    exact_matmul,
    poison_like,
    poisoned_memory,
    random_case,
    stacked_molora_linear,
)

TRUTH = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
EXACT = TRUTH.float()
EPS = torch.finfo(torch.float32).eps


def off_by(error: float) -> torch.Tensor:
    return (TRUTH + torch.tensor([0.0, 0.0, error])).float()


@pytest.mark.parametrize(("kind", "factor"), [("forward", 2), ("backward", 3)])
def test_the_rule_allows_the_factor_times_the_error_of_the_baseline(kind: str, factor: int) -> None:
    baseline = off_by(1e-3)
    assert_accurate(off_by(factor * 0.99e-3), TRUTH, baseline, kind=kind)
    with pytest.raises(AssertionError, match="want at most 1"):
        assert_accurate(off_by(factor * 1.01e-3), TRUTH, baseline, kind=kind)


def test_the_rule_allows_one_eps_of_the_largest_where_the_baseline_is_exact() -> None:
    assert assert_accurate(off_by(4 * EPS), TRUTH, EXACT).largest == 1
    with pytest.raises(AssertionError):
        assert_accurate(off_by(8 * EPS), TRUTH, EXACT)
    assert_accurate(off_by(8 * EPS), TRUTH, EXACT, dtype=torch.bfloat16)


def test_the_norm_catches_what_hides_below_the_largest_error() -> None:
    truth = torch.zeros(1000, dtype=torch.float64)
    baseline = truth.float().clone()
    baseline[0] = 1.0
    with pytest.raises(AssertionError, match="norm"):
        assert_accurate(truth.float() + 0.5, truth, baseline)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_specials_must_stand_in_the_same_places(value: float) -> None:
    special = TRUTH.clone()
    special[1] = value
    assert_accurate(special.float(), special, special.float())
    for out, truth in ((EXACT, special), (special.float(), TRUTH)):
        with pytest.raises(AssertionError, match="1 places differ"):
            assert_accurate(out, truth, EXACT)


def test_a_wrong_value_beside_a_special_one_is_seen() -> None:
    special = TRUTH.clone()
    special[1] = float("nan")
    out = special.float()
    out[0] = 1.5
    with pytest.raises(AssertionError, match="want at most 1"):
        assert_accurate(out, special, special.float())


def test_overflow_of_the_dtype_counts_as_inf_in_the_truth() -> None:
    truth = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_accurate(truth.half(), truth, truth.half())


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_accurate(EXACT[:2], TRUTH, EXACT)


def test_the_rule_prints_how_much_was_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert_accurate(off_by(1e-3), TRUTH, off_by(1e-3), name="dx")
    assert "dx: measured/allowed 0.50 (max)" in capsys.readouterr().out


@pytest.mark.parametrize("broken", OPERANDS)
def test_check_molora_linear_catches_a_wrong_gradient(broken: str) -> None:
    case = random_case(8, 16, 12)

    def off(*operands: torch.Tensor, **options: object) -> tuple:
        operands = list(operands)
        i = OPERANDS.index(broken)
        operands[i] = operands[i] * 1.01 - operands[i].detach() * 0.01
        return molora_linear(*operands, **options)

    with pytest.raises(AssertionError, match=f"d{broken}: "):
        check_molora_linear(off, case)


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "renormalize": True}])
def test_the_baseline_itself_holds_the_rule(options: dict) -> None:
    check_molora_linear(stacked_molora_linear, random_case(8, 16, 12, **options))


def test_poison_is_nan_or_the_least_value() -> None:
    assert torch.isnan(poison_like(torch.ones(3, dtype=torch.bfloat16))).all()
    assert poison_like(torch.ones(2, dtype=torch.int32)).tolist() == [-(2**31)] * 2
    assert poison_like(torch.zeros(2, dtype=torch.bool)).all()


def test_fresh_memory_is_nan_inside_the_block_alone() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.isnan(torch.empty(5)).all()
        assert torch.isnan(torch.ones(2).new_empty(3)).all()
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize("guard", [float("nan"), 7.0])
def test_a_guard_band_notices_a_write_outside_the_view(guard: float) -> None:
    tensor = torch.randn(4, 5)
    embedded = embed(tensor, guard=guard)
    assert torch.equal(embedded.view, tensor)
    assert not embedded.view.is_contiguous()
    embedded.view.fill_(3.0)
    assert embedded.is_intact()
    embedded.buffer[0, 0] = 1.0
    assert not embedded.is_intact()


def test_exact_matmul_turns_tf32_off_and_restores_it() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    with exact_matmul():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision(before)


def test_random_case_is_the_same_for_the_same_seed() -> None:
    first, again, other = (random_case(6, 8, 4, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(first.operands, again.operands, strict=True))
    assert not torch.equal(first.x, other.x)


def test_random_case_separates_the_logits_at_the_choice_of_top_k() -> None:
    case = random_case(500, 16, 4, num_experts=8, top_k=3, dtype=torch.bfloat16)
    logits = case.x.double() @ case.router[1:].double().T
    ranked = logits.sort(dim=1, descending=True).values
    assert (ranked[:, 2] - ranked[:, 3]).min() >= 1e-2


def test_evaluate_returns_outputs_and_a_gradient_per_operand() -> None:
    names = {"y", "gate_sums", "dx", "dweight", "dbias", "da", "db", "drouter"}
    assert evaluate(molora_linear, random_case(6, 8, 4)).keys() == names
    bare = random_case(6, 8, 4, weight=False, num_segments=None)
    assert evaluate(molora_linear, bare).keys() == names - {"gate_sums", "dweight", "dbias"}
