"""`accumulate_row_dots_` against its definition in fp64, and its RELIABILITY cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from citi_kernels import use_backend
from citi_kernels.ops import importance_torch
from citi_kernels.ops.importance_reference import row_dots_ref
from citi_kernels.ops.importance_row_dots import OP, accumulate_row_dots_
from citi_kernels.testing import assert_accurate, embed, poisoned_memory
from importance_inputs import (
    DTYPES,
    EVERY_DTYPE,
    LAYOUTS,
    allocated_sizes,
    assert_unchanged_by_layout,
    draw,
    every_third_is_padding,
    guarded_zeros,
)
from under_test import REPEATS, WIDEST

FP32_EPS = torch.finfo(torch.float32).eps
each_sign = pytest.mark.parametrize("signed", [False, True], ids=["absolute", "signed"])


def added(a: Tensor, b: Tensor, num_segments: int = 1, **options: object) -> Tensor:
    scores = torch.zeros(num_segments, dtype=torch.float64)
    accumulate_row_dots_(scores, a, b, **options)
    return scores


def plain(
    a: Tensor,
    b: Tensor,
    num_segments: int,
    *,
    valid: Tensor | None = None,
    offset: Tensor | None = None,
    signed: bool = False,
) -> Tensor:
    """What one would write in PyTorch, in the dtype of the inputs."""
    if offset is not None:
        a = a - offset
    dots_TS = (a * b).unflatten(1, (num_segments, -1)).sum(2)
    if valid is not None:
        dots_TS = dots_TS[valid]
    return (dots_TS if signed else dots_TS.abs()).sum(0)


def check(a: Tensor, b: Tensor, num_segments: int, **options: object) -> None:
    assert_accurate(
        added(a, b, num_segments, **options),
        row_dots_ref(a, b, num_segments, **options),
        plain(a, b, num_segments, **options),
        dtype=a.dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "num_segments", [1, 130, 10, 2], ids=["component", "columns", "heads", "halves"]
)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("has_offset", [False, True], ids=["no_offset", "offset"])
@each_sign
def test_scores_hold_the_accuracy_rule(
    dtype: torch.dtype, num_segments: int, masked: bool, has_offset: bool, signed: bool
) -> None:
    check(
        draw(37, 130, dtype=dtype),
        draw(37, 130, dtype=dtype, seed=1),
        num_segments,
        valid=every_third_is_padding(37) if masked else None,
        offset=draw(130, dtype=dtype, seed=2) if has_offset else None,
        signed=signed,
    )


@pytest.mark.parametrize("num_tokens", [1, 37, 1000])
@pytest.mark.parametrize("num_features", [1, 19, 33, 53, 130])
def test_case_3_odd_sizes_hold_the_rule(num_tokens: int, num_features: int) -> None:
    a, b = draw(num_tokens, num_features), draw(num_tokens, num_features, seed=1)
    for num_segments in {1, num_features} | ({3} if num_features == 33 else set()):
        check(a, b, num_segments, valid=torch.arange(num_tokens) % 5 != 1)


@pytest.mark.parametrize("num_segments", [1, 2, 5, 820, 4100])
def test_segments_from_one_feature_to_thousands_hold_the_rule(num_segments: int) -> None:
    a, b = draw(5, 4100), draw(5, 4100, seed=1)
    check(a, b, num_segments, offset=draw(4100, seed=2))


@pytest.mark.parametrize("dtype", EVERY_DTYPE.values(), ids=EVERY_DTYPE)
@pytest.mark.parametrize("num_segments", [1, 4, 24], ids=["component", "heads", "columns"])
@each_sign
def test_dots_are_formed_in_fp32_whatever_the_inputs(
    dtype: torch.dtype, num_segments: int, signed: bool
) -> None:
    a, b = draw(37, 24, dtype=dtype), draw(37, 24, dtype=dtype, seed=1)
    truth, scale = row_dots_ref(a, b, num_segments, signed=signed), row_dots_ref(a, b, num_segments)
    eps = torch.finfo(dtype).eps if dtype == torch.float64 else FP32_EPS
    assert ((added(a, b, num_segments, signed=signed) - truth).abs() <= 8 * eps * scale).all()


@pytest.mark.parametrize("offset_dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_inputs_may_differ_in_dtype(offset_dtype: torch.dtype) -> None:
    a, b = draw(37, 24, dtype=torch.bfloat16), draw(37, 24, seed=1)
    options = {"offset": draw(24, dtype=offset_dtype, seed=2)}
    truth = row_dots_ref(a, b, 4, **options)
    assert ((added(a, b, 4, **options) - truth).abs() <= 8 * FP32_EPS * truth).all()


def test_fp64_in_the_second_input_is_not_rounded() -> None:
    a, b = draw(37, 24), draw(37, 24, dtype=torch.float64, seed=1)
    torch.testing.assert_close(added(a, b, 4), row_dots_ref(a, b, 4), rtol=1e-13, atol=0)


def test_scores_are_the_weight_times_its_gradient_through_autograd() -> None:
    linear = nn.Linear(24, 19, dtype=WIDEST)
    x = draw(37, 24, dtype=WIDEST).requires_grad_()
    y = linear(x)
    g = draw(37, 19, dtype=WIDEST, seed=1)
    y.backward(g)
    products_NK = (linear.weight * linear.weight.grad).detach()
    x, dx, y, bias = x.detach(), x.grad, y.detach(), linear.bias.detach()
    tolerance = {"rtol": 0.0, "atol": 1e-11 if torch.float64 == WIDEST else 1e-4}
    for ours, theirs in (
        (added(x, dx, signed=True), products_NK.sum().view(1)),
        (added(x, dx, 24, signed=True), products_NK.sum(0)),
        (added(y, g, 19, offset=bias, signed=True), products_NK.sum(1)),
        (added(y, g, offset=bias), added(x, dx)),
    ):
        torch.testing.assert_close(ours, theirs.double(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_scores_are_added_to_what_is_there(dtype: torch.dtype) -> None:
    a, b = draw(37, 24), draw(37, 24, seed=1)
    scores = torch.arange(4.0, dtype=dtype)
    accumulate_row_dots_(scores, a, b)
    expected = row_dots_ref(a, b, 4) + torch.arange(4.0, dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=8 * FP32_EPS, atol=0)


def test_scores_do_not_depend_on_the_blocks_of_the_torch_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = draw(37, 24, dtype=torch.float16), draw(37, 24, dtype=torch.float16, seed=1)
    with use_backend("torch"):
        whole = added(a, b, 4)
        monkeypatch.setattr(importance_torch, "_BLOCK_ELEMENTS", {})
        monkeypatch.setattr(importance_torch, "_BLOCK_ELEMENTS_DEVICE", 50)
        torch.testing.assert_close(added(a, b, 4), whole, rtol=1e-6, atol=0)


def test_reference_backend_runs_the_definition() -> None:
    a, b = draw(9, 12), draw(9, 12, seed=1)
    with use_backend("reference"):
        assert torch.equal(added(a, b, 3), row_dots_ref(a, b, 3))


@each_sign
@pytest.mark.parametrize("num_segments", [1, 4, 24], ids=["component", "heads", "columns"])
def test_case_6_no_element_of_a_workspace_is_left_unwritten(
    num_segments: int, signed: bool
) -> None:
    options = {"valid": every_third_is_padding(37), "signed": signed}
    a, b = draw(37, 24), draw(37, 24, seed=1)
    expected = added(a, b, num_segments, **options)
    with poisoned_memory():
        assert torch.equal(added(a, b, num_segments, **options), expected)


@pytest.mark.parametrize("num_segments", [1, 4, 24], ids=["component", "heads", "columns"])
def test_case_7_nothing_around_inputs_and_scores_is_read_or_written(num_segments: int) -> None:
    tensors = {
        "a": embed(draw(37, 24)),
        "b": embed(draw(37, 24, seed=1)),
        "offset": embed(draw(24, seed=2)),
        "valid": embed(every_third_is_padding(37)),
    }
    scores, is_intact = guarded_zeros(num_segments, dtype=torch.float64)
    views = {name: each.view for name, each in tensors.items()}
    accumulate_row_dots_(scores, views.pop("a"), views.pop("b"), **views)
    assert torch.isfinite(scores).all()
    assert is_intact()
    assert [name for name, each in tensors.items() if not each.is_intact()] == []


@pytest.mark.parametrize("shape", [(0, 24), (0, 0), (37, 0)], ids=str)
def test_case_9_no_token_and_no_feature_add_nothing(shape: tuple[int, int]) -> None:
    scores = torch.arange(3.0, dtype=torch.float64)
    accumulate_row_dots_(scores, draw(*shape), draw(*shape))
    assert scores.tolist() == [0.0, 1.0, 2.0]


def test_case_9_no_token_that_counts_adds_nothing() -> None:
    nobody = torch.zeros(37, dtype=torch.bool)
    assert added(draw(37, 24), draw(37, 24), 4, valid=nobody).tolist() == [0.0] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_segments", [1, 4, 24], ids=["component", "heads", "columns"])
def test_case_10_strides_change_nothing(
    layout: Callable[[Tensor], Tensor], num_segments: int
) -> None:
    a, b, offset = draw(37, 24), draw(37, 24, seed=1), draw(1, 24, seed=2)
    valid = every_third_is_padding(74)[::2]
    strided = added(layout(a), layout(b), num_segments, valid=valid, offset=layout(offset)[0])
    dense = added(a, b, num_segments, valid=valid.contiguous(), offset=offset[0])
    assert_unchanged_by_layout(strided, dense)


def test_case_10_expanded_inputs_change_nothing() -> None:
    a, b = draw(37, 24)[:, :1].expand(37, 24), draw(1, 24, seed=1).expand(37, 24)
    options = {
        "offset": draw(1, seed=2).expand(24),
        "valid": torch.ones(1, dtype=torch.bool).expand(37),
    }
    dense = {name: each.contiguous() for name, each in options.items()}
    assert_unchanged_by_layout(
        added(a, b, 4, **options), added(a.contiguous(), b.contiguous(), 4, **dense)
    )


@each_sign
@pytest.mark.parametrize("num_segments", [1, 4, 24], ids=["component", "heads", "columns"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_case_11_only_a_token_that_counts_shows_its_nan(
    poison: float, num_segments: int, signed: bool
) -> None:
    a, b, valid = draw(37, 24), draw(37, 24, seed=1), every_third_is_padding(37)
    options = {"valid": valid, "signed": signed}
    clean = added(a, b, num_segments, **options)
    for bad in (a, b):
        bad[~valid] = poison
    assert torch.equal(added(a, b, num_segments, **options), clean)
    a[1, 5] = poison
    scores = added(a, b, num_segments, **options)
    truth = row_dots_ref(a, b, num_segments, **options)
    assert torch.equal(scores.isnan(), truth.isnan())
    assert torch.equal(scores.isinf(), truth.isinf())
    assert not scores[5 * num_segments // 24].isfinite()
    others = torch.arange(num_segments) != 5 * num_segments // 24
    assert torch.equal(scores[others], clean[others])


def test_case_11_an_infinite_offset_stays_in_its_segment() -> None:
    offset = draw(24, seed=2)
    clean = added(draw(37, 24), draw(37, 24, seed=1), 4, offset=offset)
    offset[3] = float("inf")
    scores = added(draw(37, 24), draw(37, 24, seed=1), 4, offset=offset)
    assert scores[0].isinf()
    assert torch.equal(scores[1:], clean[1:])


def test_case_13_inputs_are_left_alone() -> None:
    tensors = {
        "a": draw(37, 24),
        "b": draw(37, 24, seed=1),
        "valid": every_third_is_padding(37),
        "offset": draw(24, seed=2),
    }
    before = {name: each.clone() for name, each in tensors.items()}
    scores = torch.zeros(4, dtype=torch.float64)
    accumulate_row_dots_(scores, **tensors)
    assert [name for name in before if not torch.equal(tensors[name], before[name])] == []


@pytest.mark.parametrize("num_segments", [1, 4, 24], ids=["component", "heads", "columns"])
def test_case_15_repeats_are_bitwise_equal(num_segments: int) -> None:
    a, b = draw(300, 24, dtype=torch.bfloat16), draw(300, 24, seed=1)
    first = added(a, b, num_segments)
    for _ in range(REPEATS - 1):
        assert torch.equal(added(a, b, num_segments), first)


A = torch.ones(6, 8)
WRONG = {
    "integers": ({"a": A.long()}, TypeError, "a must be floating, got torch.int64"),
    "a vector": ({"a": A[0]}, ValueError, r"a must be a matrix .* got shape \(8,\)"),
    "b of integers": ({"b": A.long()}, TypeError, "b must be floating, got torch.int64"),
    "b of another shape": ({"b": A[:5]}, ValueError, r"b must match .* \(6, 8\), got \(5, 8\)"),
    "scores in bf16": ({"scores": A[0, :4].bfloat16()}, TypeError, "scores must be .*bfloat16"),
    "scores apart": ({"scores": A.double()[:4, 0]}, ValueError, "scores must be contiguous"),
    "scores of a matrix": ({"scores": A.double()}, ValueError, "scores must .* 1 dimension"),
    "three segments": ({"scores": A[0, :3]}, ValueError, "scores must .* divides the 8 .* got 3"),
    "no segment": ({"scores": A[0, :0]}, ValueError, "scores must have .* got 0"),
    "valid of floats": ({"valid": A[:, 0]}, TypeError, "valid must be bool, got torch.float32"),
    "too few valid": ({"valid": A[:5, 0].bool()}, ValueError, r"valid must .* \(6,\), got \(5,\)"),
    "a short offset": ({"offset": A[0, :7]}, ValueError, r"offset must .* \(8,\), got \(7,\)"),
    "offset of integers": ({"offset": A[0].long()}, TypeError, "offset must be floating, got"),
    "b elsewhere": ({"b": A.to("meta")}, ValueError, "b must be on the device of scores, .* meta"),
    "offset elsewhere": ({"offset": A[0].to("meta")}, ValueError, "offset must be on the device"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_case_20_wrong_arguments_are_named(
    changes: dict, error: type[Exception], message: str
) -> None:
    arguments = {"scores": torch.zeros(4, dtype=torch.float64), "a": A, "b": A}
    with pytest.raises(error, match=f"^{message}"):
        accumulate_row_dots_(**(arguments | changes))


def test_case_22_opcheck() -> None:
    scores = torch.zeros(4, dtype=torch.float64)
    operands = (scores, draw(6, 8), draw(6, 8, seed=1), every_third_is_padding(6), draw(8), True)
    torch.library.opcheck(torch.ops.citi.accumulate_row_dots_.default, operands)


def test_case_22_compiled_without_graph_breaks_equals_eager() -> None:
    def step(scores: Tensor, a: Tensor, b: Tensor, valid: Tensor) -> Tensor:
        accumulate_row_dots_(scores, a * 2, b, valid=valid)
        return scores + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for num_tokens in (37, 21):
        inputs = (draw(num_tokens, 24), draw(num_tokens, 24, seed=1))
        results = []
        for function in (step, compiled):
            scores = torch.ones(4, dtype=torch.float64)
            results.append((function(scores, *inputs, every_third_is_padding(num_tokens)), scores))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        assert (results[0][1] > 1).all()


def test_case_29_totals_over_a_hundred_thousand_half_precision_steps_equal_the_truth() -> None:
    """bf16 sums would stick at 256, fp16 squares would overflow."""
    total, truth = 0.0, 0.0
    for dtype, size in ((torch.bfloat16, 1.0), (torch.float16, 200.0)):
        x = draw(2, 8, dtype=dtype) * size
        partial, exact = added(x, x).item(), row_dots_ref(x, x).item()
        for _ in range(50_000):
            total, truth = total + partial, truth + exact
    assert abs(total - truth) <= 1e-6 * truth


def test_case_29_fp64_scores_take_in_steps_that_fp32_would_lose() -> None:
    scores = torch.full((1,), 2.0**30, dtype=torch.float64)
    a = torch.full((1, 8), 0.125)
    for _ in range(REPEATS):
        accumulate_row_dots_(scores, a, a)
    assert scores.item() == 2.0**30 + REPEATS / 8


@pytest.mark.parametrize("num_segments", [1, 8, 64], ids=["component", "heads", "columns"])
def test_case_37_no_tensor_of_the_size_of_the_inputs_is_formed(num_segments: int) -> None:
    # wider than a block of the torch backend, or with more rows than a share of the Triton one
    a, b = draw(1 << 13, 64), draw(1 << 13, 64, seed=1)
    scores = torch.zeros(num_segments, dtype=torch.float64)
    sizes = allocated_sizes(OP, scores, a, b, None, None, False)
    assert sizes
    assert max(sizes) <= a.numel() // 2
