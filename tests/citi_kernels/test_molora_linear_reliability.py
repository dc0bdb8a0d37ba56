"""RELIABILITY cases of `molora_linear` on the CPU; the number stands in each name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels import molora_linear, molora_linear_ref
from citi_kernels.testing import (
    MoLoRACase,
    assert_accurate,
    check_molora_linear,
    embed,
    evaluate,
    poisoned_memory,
    random_case,
)
from under_test import DEVICE, REPEATS

SEED = torch.tensor(7, device="cpu")
OPTIONS = {
    "dense": {},
    "top_k": {"top_k": 2},
    "dropout": {"dropout_p": 0.3, "dropout_seed": SEED},
    "top_k_dropout": {"top_k": 2, "dropout_p": 0.3, "dropout_seed": SEED},
}
TENSORS = ("x", "weight", "bias", "a", "b", "router", "dy", "dgate_sums")
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(results[name], expected[name])] == []


@each_option
def test_case_6_no_element_is_left_unwritten(options: dict) -> None:
    case = random_case(21, 40, 24, **options)
    expected = evaluate(molora_linear, case)
    with poisoned_memory():
        assert_same(evaluate(molora_linear, case), expected)


@each_option
def test_case_7_nothing_around_the_inputs_is_read_or_written(options: dict) -> None:
    case = random_case(21, 40, 24, **options)
    embedded = {name: embed(getattr(case, name)) for name in TENSORS}
    results = evaluate(molora_linear, replace(case, **{n: e.view for n, e in embedded.items()}))
    assert all(torch.isfinite(result).all() for result in results.values())
    assert [name for name, each in embedded.items() if not each.is_intact()] == []


def all_on_one_expert(expert: int, top_k: int) -> MoLoRACase:
    """Every token prefers `expert`, then the experts by index; feature 0 of x is 1."""
    case = random_case(17, 32, 24, top_k=top_k)
    case.x[:, 0], case.router[1:, 1:] = 1.0, 0.0
    case.router[1:, 0] = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    case.router[1 + expert, 0] = 3.0
    return case


def test_case_8_unused_experts_get_a_gradient_of_exactly_zero() -> None:
    case = all_on_one_expert(2, top_k=1)
    check_molora_linear(molora_linear, case)
    results = evaluate(molora_linear, case)
    used = slice(16, 24)
    for gradient in (results["da"], results["db"].T):
        assert gradient[used].abs().sum() > 0
        assert gradient[:16].abs().sum() == gradient[24:].abs().sum() == 0


def test_case_8_an_expert_without_a_token_beside_full_ones() -> None:
    case = all_on_one_expert(1, top_k=2)
    check_molora_linear(molora_linear, case)
    results = evaluate(molora_linear, case)
    assert results["da"][16:].abs().sum() == results["db"][:, 16:].abs().sum() == 0


@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_case_9_no_token_gives_empty_outputs_and_zero_gradients(
    dtype: torch.dtype, options: dict
) -> None:
    results = evaluate(molora_linear, random_case(0, 16, 12, dtype=dtype, **options))
    assert results["y"].shape == (0, 12)
    assert results["y"].dtype == dtype
    assert torch.equal(results["gate_sums"], torch.zeros(3, 5))
    assert results["dx"].shape == (0, 16)
    for name in ("dweight", "dbias", "da", "db", "drouter"):
        assert torch.count_nonzero(results[name]) == 0


def test_case_9_no_token_in_a_batch_and_no_segment() -> None:
    case = random_case(0, 16, 12, num_segments=None)
    x = case.x.reshape(3, 0, 16)
    y, gate_sums = molora_linear(
        x, *case.operands[1:], **case.options, segment_ids=torch.empty(3, 0).long(), num_segments=0
    )
    assert y.shape == (3, 0, 12)
    assert gate_sums.shape == (0, 5)


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("top_k", [None, 1])
def test_case_9_one_token_and_one_expert(num_experts: int, top_k: int | None) -> None:
    case = random_case(1, 16, 12, num_experts=num_experts, top_k=top_k, num_segments=1)
    check_molora_linear(molora_linear, case)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def sliced(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] * 2 + 1), 3.0, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [transposed, sliced])
@pytest.mark.parametrize("num_tokens", [1, 3, 21])
def test_case_10_strided_operands_and_gradients_equal_contiguous_ones(
    num_tokens: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, options: dict
) -> None:
    case = random_case(num_tokens, 40, 24, dtype=dtype, parameter_dtype=torch.float32, **options)
    names = ("x", "a", "b", "router", "dy", "dgate_sums")
    strided = replace(case, **{name: layout(getattr(case, name)) for name in names})
    # a single row that is transposed stays contiguous
    of_tokens = {"x", "dy"} if num_tokens == 1 and layout is transposed else set()
    assert {name for name in names if getattr(strided, name).is_contiguous()} == of_tokens
    assert_same(evaluate(molora_linear, strided), evaluate(molora_linear, case))


@each_option
def test_case_10_expanded_operands_and_gradients_equal_contiguous_ones(options: dict) -> None:
    case = random_case(21, 40, 24, **options)
    expanded = replace(
        case,
        x=case.x[:1].expand(21, 40),
        dy=case.dy[:1, :1].expand(21, 24),
        dgate_sums=case.dgate_sums[:1, :1].expand(3, 5),
    )
    dense = {name: getattr(expanded, name).contiguous() for name in ("x", "dy", "dgate_sums")}
    expected = evaluate(molora_linear, replace(expanded, **dense))
    assert_same(evaluate(molora_linear, expanded), expected)


def lazily_negated(tensor: Tensor) -> Tensor:
    view = torch._neg_view(-tensor)  # as of `torch.complex(…).conj().imag`
    assert view.is_neg()
    return view


@each_option
@pytest.mark.parametrize("names", [TENSORS, *([name] for name in TENSORS)], ids=" ".join)
def test_case_10_lazily_negated_operands_and_gradients_equal_plain_ones(
    names: tuple[str, ...], options: dict
) -> None:
    case = random_case(21, 40, 24, **options)

    def negated(*operands: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        named = zip(TENSORS[:6], operands, strict=True)
        return molora_linear(
            *(lazily_negated(each) if name in names else each for name, each in named), **options
        )

    changes = {name: getattr(case, name) for name in names if name.startswith("d")}
    incoming = replace(case, **{name: lazily_negated(each) for name, each in changes.items()})
    assert_same(evaluate(negated, incoming), evaluate(molora_linear, case))


@pytest.mark.parametrize("layout", [transposed, sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_case_10_a_strided_weight_holds_the_rule(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    case = random_case(21, 40, 24, dtype=dtype)
    check_molora_linear(molora_linear, replace(case, weight=layout(case.weight)))


@each_option
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_case_11_a_bad_row_stays_in_its_row(value: float, options: dict) -> None:
    case = random_case(21, 40, 24, num_segments=21, **options)
    case.options["segment_ids"] = torch.arange(21)
    clean, truth = (
        evaluate(molora_linear, case),
        evaluate(molora_linear_ref, case.to(torch.float64)),
    )
    bad = replace(case, x=case.x.clone())
    bad.x[5, 3] = value
    results = evaluate(molora_linear, bad)
    others = torch.arange(21) != 5
    for name in ("y", "gate_sums", "dx"):
        assert not torch.isfinite(results[name][5]).all()
        assert_accurate(results[name][others], truth[name][others], clean[name][others])


@pytest.mark.parametrize("renormalize", [False, True])
def test_case_11_nan_in_a_dropped_expert_reaches_no_token(renormalize: bool) -> None:
    case = all_on_one_expert(2, top_k=1)
    case.options["renormalize"] = renormalize
    clean = evaluate(molora_linear, case)
    broken = replace(case, a=case.a.clone(), b=case.b.clone())
    broken.a[:8], broken.b[:, :8] = float("nan"), float("inf")
    assert_same(evaluate(molora_linear, broken), clean)


def test_case_11_nan_in_padding_is_not_in_the_gate_sums() -> None:
    case = random_case(21, 40, 24)
    case.options["segment_ids"][4] = -1
    clean, _ = molora_linear(*case.operands, **case.options)[1], case.x[4].fill_(float("nan"))
    y, gate_sums = molora_linear(*case.operands, **case.options)
    assert torch.isnan(y[4]).all()
    assert torch.equal(gate_sums, clean)


def token_gates(logits_TG: Tensor, **options: object) -> Tensor:
    """The gates of tokens with exactly these router logits."""
    num_tokens, num_gates = logits_TG.shape
    _, sums = molora_linear(
        logits_TG,
        None,
        None,
        torch.ones(num_gates - 1, num_gates),
        torch.ones(2, num_gates - 1),
        torch.eye(num_gates),
        num_experts=num_gates - 1,
        scaling=1.0,
        segment_ids=torch.arange(num_tokens),
        num_segments=num_tokens,
        **options,
    )
    return sums


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 2, "renormalize": True}])
def test_case_12_extreme_and_equal_logits_give_finite_gates(options: dict) -> None:
    logits = torch.tensor(
        [
            [1e4, -1e4, 0.0, 1.0, 2.0],
            [-1e4, 1e4, 1e4, -1e4, 0.0],
            [-1e4] * 5,
            [1e4] * 5,
            [0.0] * 5,
        ]
    )
    gate_TG = token_gates(logits, **options)
    assert torch.isfinite(gate_TG).all()
    if options.get("renormalize", not options):
        torch.testing.assert_close(gate_TG.sum(1), torch.ones(5))
    assert (gate_TG >= 0).all()
    torch.testing.assert_close(token_gates(logits[2:] + 8.0, **options), gate_TG[2:])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 2, "renormalize": True}])
def test_case_12_gates_do_not_change_when_all_logits_shift(options: dict) -> None:
    logits = torch.randn(16, 5)
    shifted = (logits + 64.0) - 64.0  # what is left of them at that magnitude
    torch.testing.assert_close(
        token_gates(shifted + 64.0, **options), token_gates(shifted, **options)
    )


@each_option
def test_case_13_inputs_and_incoming_gradients_stay_bitwise(options: dict) -> None:
    case = random_case(21, 40, 24, **options)
    before = {name: getattr(case, name).clone() for name in TENSORS}
    ids = case.options["segment_ids"].clone()
    evaluate(molora_linear, case)
    assert_same({name: getattr(case, name) for name in TENSORS}, before)
    assert torch.equal(case.options["segment_ids"], ids)


@each_option
def test_case_15_repeats_are_bitwise_equal(options: dict) -> None:
    case = random_case(64, 72, 56, **options)
    first = evaluate(molora_linear, case)
    for _ in range(REPEATS - 1):
        assert_same(evaluate(molora_linear, case), first)


def test_case_16_a_token_ignores_its_neighbours_bitwise() -> None:
    case = random_case(32, 40, 24, num_segments=32)
    case.options["segment_ids"] = torch.arange(32)
    other = random_case(32, 40, 24, seed=1)
    mixed = replace(case, x=other.x.clone(), dy=other.dy.clone())
    mixed.x[9], mixed.dy[9] = case.x[9], case.dy[9]
    alone, among = evaluate(molora_linear, case), evaluate(molora_linear, mixed)
    for name in ("y", "gate_sums", "dx"):
        assert torch.equal(among[name][9], alone[name][9])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}], ids=["dense", "top_k"])
def test_case_16_a_token_ignores_how_many_others_there_are(options: dict) -> None:
    case = random_case(32, 40, 24, num_segments=None, **options)
    few = replace(case, x=case.x[:11], dy=case.dy[:11])
    long, short = evaluate(molora_linear, case), evaluate(molora_linear, few)
    truth = evaluate(molora_linear_ref, case.to(torch.float64))
    for name in ("y", "dx"):
        assert_accurate(short[name], truth[name][:11], long[name][:11], kind="backward")


def test_case_17_ties_go_to_the_lowest_index_also_in_recomputation() -> None:
    case = random_case(16, 32, 24, top_k=2, num_segments=16)
    case.options["segment_ids"] = torch.arange(16)
    case.x.round_()  # so that every order of summation gives the same logits
    case.router[1:] = case.router[1].mul(8).round()
    _, gate_sums = molora_linear(*case.operands, **case.options)
    assert (gate_sums[:, 1:3] > 0).all()
    assert (gate_sums[:, 3:] == 0).all()

    def recomputed(*operands: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return torch.utils.checkpoint.checkpoint(
            molora_linear, *operands, use_reentrant=False, **options
        )

    assert_same(evaluate(recomputed, case), evaluate(molora_linear, case))


def wrong(**changes: object) -> Callable[[], object]:
    case = random_case(6, 8, 10, num_experts=2, r=3)
    options = {name: changes.pop(name) for name in list(changes) if name not in TENSORS}
    case = replace(case, **changes)
    return lambda: molora_linear(*case.operands, **(case.options | options))


IDS = torch.zeros(6, dtype=torch.int64)
WRONG = [
    ({"x": torch.ones(6, 8).long()}, TypeError, "x: want one of .*, got torch.int64"),
    ({"x": torch.ones(())}, ValueError, "x: want (..., K)"),
    ({"x": torch.ones(6, 9)}, ValueError, "a: want shape (E * r, K of x) = (6, 9), got (6, 8)"),
    ({"x": torch.ones(6, 8).bfloat16()}, TypeError, "weight: want the dtype of x, torch.bfloat16"),
    ({"weight": torch.ones(10, 7)}, ValueError, "weight: want shape .* = (10, 8), got (10, 7)"),
    ({"weight": torch.ones(10)}, ValueError, "weight: want 2 dimensions, got shape (10,)"),
    ({"weight": None}, ValueError, "bias: want None where weight is None"),
    ({"weight": torch.ones(10, 8, device="meta")}, ValueError, "weight: want the device of x, .*"),
    ({"bias": torch.ones(9)}, ValueError, "bias: want shape (rows of b,) = (10,), got (9,)"),
    ({"bias": torch.ones(10).half()}, TypeError, "bias: want the dtype of x, torch.float32"),
    ({"a": torch.ones(7, 8)}, ValueError, "a: want (num_experts * r, K) with num_experts 2"),
    ({"a": torch.ones(0, 8)}, ValueError, "a: want (num_experts * r, K)"),
    ({"a": torch.ones(2, 3, 8)}, ValueError, "a: want 2 dimensions, got shape (2, 3, 8)"),
    ({"b": torch.ones(10, 5)}, ValueError, "b: want shape (N, rows of a) = (10, 6), got (10, 5)"),
    ({"router": torch.ones(2, 8)}, ValueError, "router: want shape .* = (3, 8), got (2, 8)"),
    ({"num_experts": 0}, ValueError, "num_experts: want at least 1, got 0"),
    ({"top_k": 3}, ValueError, "top_k: want 1 to num_experts = 2 or None, got 3"),
    ({"top_k": 0}, ValueError, "top_k: want 1 to num_experts = 2 or None, got 0"),
    ({"dropout_p": 0.5}, ValueError, "dropout_seed: want an int64 tensor with dropout_p"),
    ({"dropout_p": 1.0, "dropout_seed": SEED}, ValueError, "dropout_p: want 0 <= p < 1, got 1.0"),
    ({"dropout_seed": torch.ones(1).long()}, ValueError, "dropout_seed: want a () int64 tensor"),
    ({"num_segments": None}, ValueError, "num_segments: want the number of segments, got None"),
    ({"num_segments": -1}, ValueError, "num_segments: want 0 or more, got -1"),
    ({"segment_ids": IDS[:5]}, ValueError, "segment_ids: want shape (6,) or (6,), got (5,)"),
    ({"segment_ids": IDS.int()}, TypeError, "segment_ids: want int64, got torch.int32"),
    ({"segment_ids": IDS.to("meta")}, ValueError, "segment_ids: want the device of x, .*"),
    ({"segment_ids": IDS + 3}, ValueError, "segment_ids: want -1 to num_segments - 1 = 2, got 3"),
    ({"segment_ids": IDS - 2}, ValueError, "segment_ids: want -1 to num_segments - 1 = 2, got -2"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    WRONG,
    ids=[f"{i}-{'-'.join(c)}" for i, (c, _, _) in enumerate(WRONG)],
)
def test_case_20_errors_name_argument_wanted_and_got(
    changes: dict, error: type[Exception], message: str
) -> None:
    if DEVICE != "cpu" and "num_segments - 1" in message:
        pytest.skip("segments are checked where looking at them does not wait: on the CPU")
    pattern = "molora_linear: " + re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(error, match=pattern):
        wrong(**changes)()


@each_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_case_21_autocast_equals_casting_by_hand(dtype: torch.dtype, options: dict) -> None:
    case = random_case(21, 40, 24, **options)

    def under_autocast(*operands: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        with torch.autocast(DEVICE, dtype=dtype):
            y, gate_sums = molora_linear(*operands, **options)
            assert y.dtype == F.linear(*operands[:3]).dtype == dtype
        return y, gate_sums

    def by_hand(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor, **options: object):
        return molora_linear(x.to(dtype), weight.to(dtype), bias.to(dtype), *others, **options)

    case = replace(case, dy=case.dy.to(dtype))
    expected = evaluate(by_hand, case)
    assert_same(evaluate(under_autocast, case), expected)
    with torch.autocast(DEVICE, dtype=dtype):
        assert_same(evaluate(under_autocast, case), expected)
    assert {expected[f"d{name}"].dtype for name in TENSORS[:6]} == {torch.float32}


@each_option
def test_case_21_autocast_around_the_backward_alone_changes_nothing(options: dict) -> None:
    case = random_case(21, 40, 24, **options)

    def gradients(autocast: bool) -> tuple[Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in case.operands]
        outputs = molora_linear(*leaves, **case.options)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(outputs, leaves, [case.dy, case.dgate_sums])

    assert all(torch.equal(*pair) for pair in zip(gradients(True), gradients(False), strict=True))
