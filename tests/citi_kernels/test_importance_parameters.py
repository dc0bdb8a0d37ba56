"""`accumulate_parameter_scores_` against its definition in fp64, and its RELIABILITY cases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from citi_kernels import available_backends, use_backend
from citi_kernels.ops import importance_torch
from citi_kernels.ops.importance_parameters import OP, accumulate_parameter_scores_
from citi_kernels.ops.importance_reference import parameter_scores_ref
from citi_kernels.tensor_memory import TensorMemory
from citi_kernels.testing import assert_accurate, embed, exact_matmul, poisoned_memory
from importance_inputs import (
    DTYPES,
    EVERY_DTYPE,
    LAYOUTS,
    allocated_sizes,
    assert_unchanged_by_layout,
    draw,
    every_third_is_padding,
    guarded_zeros,
    parameter_case,
)
from under_test import BACKEND, DEVICE, REPEATS, WIDEST

FP32_EPS = torch.finfo(torch.float32).eps
SHAPES = {
    "component": (1, 1),
    "rows": (38, 1),
    "columns": (1, 130),
    "heads": (19, 1),
    "input heads": (1, 10),
    "blocks": (2, 5),
    "elements": (38, 130),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_mode = pytest.mark.parametrize("per_token", [False, True], ids=["batch", "per_token"])


def added(weight: Tensor, x: Tensor, g: Tensor, shape: tuple = (1, 1), **options: object) -> Tensor:
    scores = torch.zeros(shape, dtype=torch.float64)
    accumulate_parameter_scores_(scores, weight, x, g, **options)
    return scores


def plain(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    shape: tuple[int, int],
    *,
    valid: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:
    """What one would write in PyTorch, in the dtype of the inputs."""
    if valid is not None:
        x, g = x[valid], g[valid]
    if per_token:
        x, g = x.abs(), g.abs()
    scores_NK = (weight * (g.T @ x)).abs()
    return scores_NK.unflatten(1, (shape[1], -1)).sum(2).unflatten(0, (shape[0], -1)).sum(1)


def check(weight: Tensor, x: Tensor, g: Tensor, shape: tuple[int, int], **options: object) -> None:
    with exact_matmul():
        truth = parameter_scores_ref(weight, x, g, shape, **options)
        baseline = plain(weight, x, g, shape, **options)
        scores = added(weight, x, g, shape, **options)
    assert_accurate(scores, truth, baseline, dtype=g.dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_shape
@each_mode
def test_scores_hold_the_accuracy_rule(
    dtype: torch.dtype, shape: tuple[int, int], masked: bool, per_token: bool
) -> None:
    valid = every_third_is_padding(37) if masked else None
    check(*parameter_case(dtype=dtype), shape, valid=valid, per_token=per_token)


@pytest.mark.parametrize("num_tokens", [1, 37, 1000])
@pytest.mark.parametrize(
    ("num_out", "num_in"), [(1, 1), (19, 33), (53, 130), (130, 19), (33, 53)], ids=str
)
def test_case_3_odd_sizes_hold_the_rule(num_tokens: int, num_out: int, num_in: int) -> None:
    tensors = parameter_case(num_tokens, num_out, num_in)
    for shape in {(1, 1), (num_out, 1), (1, num_in), (num_out, num_in)}:
        check(*tensors, shape)


@pytest.mark.parametrize("shape", [(1, 1), (650, 1), (1, 70), (650, 70)], ids=str)
def test_more_tiles_than_a_group_hold_the_rule(shape: tuple[int, int]) -> None:
    check(*parameter_case(3, 650, 70), shape)


@pytest.mark.skipif(BACKEND != "triton", reason="tiles are the Triton backend's")
@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (150, 1), (1, 280), (150, 280)], ids=str)
def test_every_tile_holds_the_rule(
    index: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from citi_kernels.triton_kernels import parameter_scores

    tiles = parameter_scores._TILES_16_BIT
    monkeypatch.setattr(parameter_scores, "_TILES_16_BIT", (tiles[index],) * len(tiles))
    check(*parameter_case(70, 150, 280, torch.bfloat16), shape)


@pytest.mark.parametrize("dtype", EVERY_DTYPE.values(), ids=EVERY_DTYPE)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("transposed", [False, True], ids=["weight", "transposed"])
@each_mode
def test_sums_are_as_exact_as_one_rounding_of_the_gradient(
    dtype: torch.dtype, masked: bool, transposed: bool, per_token: bool
) -> None:
    weight, x, g = parameter_case(dtype=dtype)
    options = {"valid": every_third_is_padding(37) if masked else None, "per_token": per_token}
    truth = parameter_scores_ref(weight, x, g, **options)
    if transposed:
        weight = weight.T.contiguous().T
    eps = max(torch.finfo(dtype).eps, FP32_EPS) if dtype != torch.float64 else 2.0**-52
    eps = FP32_EPS if dtype == torch.float16 else eps
    assert (added(weight, x, g, **options) - truth).abs() <= 8 * eps * truth


def test_fp32_sums_over_a_large_weight_do_not_drift() -> None:
    """A plain running sum over the tile would be wrong in the fourth digit."""
    weight, x, g = parameter_case(8, 512, 512)
    truth = parameter_scores_ref(weight, x, g)
    assert abs(added(weight, x, g) - truth) <= 1e-6 * truth


@pytest.mark.parametrize("shape", [(1, 1), (38, 1), (1, 130), (38, 130)], ids=str)
def test_inputs_may_differ_in_dtype(shape: tuple[int, int]) -> None:
    weight, x, g = parameter_case()
    g = g.bfloat16()
    rounded = x.bfloat16()
    truth = parameter_scores_ref(weight, rounded, g, shape)
    baseline = plain(weight.bfloat16(), rounded, g, shape)
    assert_accurate(added(weight, x, g, shape), truth, baseline, dtype=torch.bfloat16)
    assert torch.equal(added(weight, x, g, shape), added(weight, rounded, g, shape))


def test_fp64_in_weight_and_gradient_is_not_rounded() -> None:
    weight, x, g = parameter_case()
    weight, g = weight.double() / 3, g.double() / 3
    truth = parameter_scores_ref(weight, x, g)
    torch.testing.assert_close(added(weight, x, g), truth, rtol=1e-13, atol=0)


def test_scores_are_the_weight_times_its_gradient_through_autograd() -> None:
    linear = nn.Linear(24, 19, dtype=WIDEST)
    x = draw(37, 24, dtype=WIDEST).requires_grad_()
    y = linear(x)
    g = draw(37, 19, dtype=WIDEST, seed=1)
    y.backward(g)
    truth = (linear.weight * linear.weight.grad).detach().abs()
    elements = added(linear.weight.detach(), x.detach(), g, (19, 24))
    tolerance = 1e-11 if torch.float64 == WIDEST else 1e-5
    torch.testing.assert_close(elements, truth.double(), rtol=0, atol=tolerance)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_scores_are_added_to_what_is_there_and_scaled(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight, x, g = parameter_case()
    scores = torch.arange(float(shape[0] * shape[1]), dtype=dtype).view(shape)
    expected = scores.double() + parameter_scores_ref(weight, x, g, shape) / 4096
    accumulate_parameter_scores_(scores, weight, x, g, scale=1 / 4096)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-8)


@each_shape
def test_scores_do_not_depend_on_the_tiles_of_the_torch_backend(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = parameter_case(dtype=torch.float16)
    valid = every_third_is_padding(37)
    with use_backend("torch"):
        whole = added(*tensors, shape, valid=valid)
        monkeypatch.setattr(importance_torch, "_TILE_ELEMENTS", 50)
        small = added(*tensors, shape, valid=valid)
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=1e-6)


def test_reference_backend_runs_the_definition() -> None:
    tensors = parameter_case()
    with use_backend("reference"):
        assert torch.equal(added(*tensors, (2, 5)), parameter_scores_ref(*tensors, (2, 5)))


@each_shape
@each_mode
def test_case_6_no_element_of_a_workspace_is_left_unwritten(
    shape: tuple[int, int], per_token: bool
) -> None:
    tensors = parameter_case()
    options = {"valid": every_third_is_padding(37), "per_token": per_token}
    expected = added(*tensors, shape, **options)
    with poisoned_memory():
        assert torch.equal(added(*tensors, shape, **options), expected)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_case_7_nothing_around_inputs_and_scores_is_read_or_written(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    embedded = [embed(each) for each in (*parameter_case(dtype=dtype), every_third_is_padding(37))]
    is_elements = shape == SHAPES["elements"]
    scores, is_intact = guarded_zeros(*shape, dtype=dtype if is_elements else torch.float64)
    weight, x, g, valid = (each.view for each in embedded)
    accumulate_parameter_scores_(scores, weight, x, g, valid=valid)
    assert torch.isfinite(scores).all()
    assert is_intact()
    assert all(each.is_intact() for each in embedded)


@pytest.mark.parametrize("sizes", [(0, 6, 4), (5, 0, 4), (5, 6, 0), (0, 0, 0)], ids=str)
def test_case_9_nothing_adds_nothing(sizes: tuple[int, int, int]) -> None:
    for shape in ((2, 1), (1, 2), (2, 2)):
        scores = torch.arange(4.0, dtype=torch.float64)[: shape[0] * shape[1]].view(shape)
        before = scores.clone()
        accumulate_parameter_scores_(scores, *parameter_case(*sizes))
        assert torch.equal(scores, before)


@each_shape
def test_case_9_no_token_that_counts_adds_nothing(shape: tuple[int, int]) -> None:
    weight, x, g = parameter_case()
    g.fill_(float("nan"))
    scores = added(weight, x, g, shape, valid=torch.zeros(37, dtype=torch.bool))
    assert torch.count_nonzero(scores) == 0


@each_shape
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", ["weight", "x", "g", "weight x g"])
def test_case_10_strides_change_nothing(
    names: str, layout: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    tensors = dict(zip(("weight", "x", "g"), parameter_case(), strict=True))
    valid = every_third_is_padding(74)[::2]
    dense = added(**tensors, shape=shape, valid=valid.contiguous())
    strided = tensors | {name: layout(tensors[name]) for name in names.split()}
    assert_unchanged_by_layout(added(**strided, shape=shape, valid=valid), dense)


@each_shape
def test_case_10_expanded_inputs_change_nothing(shape: tuple[int, int]) -> None:
    weight, x, g = parameter_case()
    weight, x, g = weight[:, :1].expand(38, 130), x[:1].expand(37, 130), g[:1, :1].expand(37, 38)
    valid = torch.ones(1, dtype=torch.bool).expand(37)
    dense = [each.contiguous() for each in (weight, x, g)]
    assert_unchanged_by_layout(added(weight, x, g, shape, valid=valid), added(*dense, shape))


@each_shape
@each_mode
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_case_11_only_a_token_that_counts_shows_its_nan(
    poison: float, per_token: bool, shape: tuple[int, int]
) -> None:
    weight, x, g = parameter_case()
    valid = every_third_is_padding(37)
    options = {"valid": valid, "per_token": per_token}
    clean = added(weight, x, g, shape, **options)
    x[~valid], g[~valid] = poison, poison
    assert torch.equal(added(weight, x, g, shape, **options), clean)
    for bad, column in ((x, 129), (g, 37)):
        broken = bad.clone()
        broken[1, column] = poison
        inputs = (broken, g) if bad is x else (x, broken)
        scores = added(weight, *inputs, shape, **options)
        truth = parameter_scores_ref(weight, *inputs, shape, **options)
        assert not truth.isfinite().all()
        assert torch.equal(scores.isnan(), truth.isnan())
        assert torch.equal(scores.isinf(), truth.isinf())
        assert torch.equal(scores[truth.isfinite()], clean[truth.isfinite()])


@each_shape
def test_case_13_inputs_are_left_alone(shape: tuple[int, int]) -> None:
    tensors = (*parameter_case(), every_third_is_padding(37))
    before = [each.clone() for each in tensors]
    weight, x, g, valid = tensors
    for per_token in (False, True):
        added(weight, x, g, shape, valid=valid, per_token=per_token)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


@each_shape
def test_case_15_repeats_are_bitwise_equal(shape: tuple[int, int]) -> None:
    tensors = parameter_case(70, dtype=torch.bfloat16)
    first = added(*tensors, shape)
    for _ in range(REPEATS - 1):
        assert torch.equal(added(*tensors, shape), first)


W, X, G = torch.ones(10, 8), torch.ones(6, 8), torch.ones(6, 10)
HALF = torch.bfloat16
WRONG = {
    "weight of integers": ({"weight": W.long()}, TypeError, "weight must be floating, got .*int64"),
    "a vector": ({"x": X[0]}, ValueError, r"x must be a matrix .* got shape \(8,\)"),
    "a batch": ({"g": G[None]}, ValueError, r"g must be a matrix .* \(1, 6, 10\); reshape it"),
    "weight transposed": ({"weight": W.T}, ValueError, r"weight must .* \(10, 8\), got \(8, 10\)"),
    "fewer tokens": ({"g": G[:3]}, ValueError, "g must match the tokens of x, 6, got 3"),
    "a vector of scores": ({"scores": W[:, 0]}, ValueError, r"scores must .* 2 dimension"),
    "scores apart": ({"scores": W.T.contiguous().T}, ValueError, "scores must be contiguous"),
    "bf16 rows": ({"scores": W[:, :1].to(HALF)}, TypeError, r"scores must .* \(10, 1\), got"),
    "fp16 elements": ({"scores": W.half()}, TypeError, "scores must be one of .* got .*float16"),
    "three rows": ({"scores": W[:3, :1].clone()}, ValueError, "scores .* divides the 10 rows"),
    "no column": ({"scores": W[:, :0].clone()}, ValueError, "scores .* the 8 columns .* got 0"),
    "valid of floats": ({"valid": X[:, 0]}, TypeError, "valid must be bool, got torch.float32"),
    "too few valid": ({"valid": X[:5, 0].bool()}, ValueError, r"valid must .* \(6,\), got \(5,\)"),
    "g elsewhere": ({"g": G.to("meta")}, ValueError, "g must be on the device of scores, .* meta"),
    "valid elsewhere": ({"valid": X[:, 0].bool().to("meta")}, ValueError, "valid must be on the"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_case_20_wrong_arguments_are_named(
    changes: dict, error: type[Exception], message: str
) -> None:
    arguments = {"scores": torch.zeros(5, 2), "weight": W, "x": X, "g": G}
    with pytest.raises(error, match=f"^{message}"):
        accumulate_parameter_scores_(**(arguments | changes))


@pytest.mark.parametrize(("shape", "dtype"), [((1, 1), torch.float64), ((10, 8), HALF)], ids=str)
def test_case_22_opcheck(shape: tuple[int, int], dtype: torch.dtype) -> None:
    scores = torch.zeros(shape, dtype=dtype)
    operands = (scores, *parameter_case(6, 10, 8), every_third_is_padding(6), True, 0.5, 3)
    torch.library.opcheck(torch.ops.citi.accumulate_parameter_scores_.default, operands)


def test_case_22_compiled_without_graph_breaks_equals_eager() -> None:
    def step(scores: Tensor, weight: Tensor, x: Tensor, g: Tensor, valid: Tensor) -> Tensor:
        accumulate_parameter_scores_(scores, weight, x * 2, g, valid=valid, scale=0.5)
        return scores + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for num_tokens in (37, 21):
        inputs = (*parameter_case(num_tokens), every_third_is_padding(num_tokens))
        results = []
        for function in (step, compiled):
            scores = torch.ones(19, 1, dtype=torch.float64)
            results.append((function(scores, *inputs), scores))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        assert (results[0][1] > 1).all()


def test_case_29_totals_over_a_hundred_thousand_half_precision_steps_equal_the_truth() -> None:
    """bf16 sums would stick at 256, fp16 products would overflow."""
    total, truth = 0.0, 0.0
    for dtype, size in ((torch.bfloat16, 1.0), (torch.float16, 200.0)):
        weight, x, g = (size * torch.full((2, 2), value, dtype=dtype) for value in (0.5, 1.5, 3.0))
        partial = added(weight, x, g).item()
        exact = parameter_scores_ref(weight, x, g).item()
        for _ in range(50_000):
            total, truth = total + partial, truth + exact
    assert abs(total - truth) <= 1e-6 * truth


@each_shape
def test_case_29_fp64_scores_take_in_steps_that_fp32_would_lose(shape: tuple[int, int]) -> None:
    tensors = parameter_case(3)
    scores = torch.full(shape, 2.0**30, dtype=torch.float64)
    for _ in range(5):
        accumulate_parameter_scores_(scores, *tensors)
    gained = 5 * parameter_scores_ref(*tensors, shape)
    torch.testing.assert_close(scores - 2.0**30, gained, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="counted on the CPU")
@pytest.mark.parametrize("backend", sorted({"torch", "native"} & {*available_backends(OP)}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_out", "num_in"), [(4096, 8192, 64), (64, 1280, 16384)], ids=str
)
def test_case_37_the_workspace_stays_below_its_limit(
    num_tokens: int, num_out: int, num_in: int, dtype: torch.dtype, backend: str
) -> None:
    weight, x, g = parameter_case(num_tokens, num_out, num_in, dtype)
    scores, valid = torch.zeros(1, 1, dtype=torch.float64), torch.ones(num_tokens).bool()
    strided = (weight.T.contiguous().T, x, g.repeat_interleave(2, 1)[:, ::2])
    for tensors, options in (
        ((weight, x, g), {}),
        ((weight, x, g), {"valid": valid}),
        ((weight, x, g), {"per_token": True}),
        ((weight, x, g), {"valid": valid, "per_token": True}),
        (strided, {}),
    ):
        with use_backend(backend), TensorMemory() as memory:
            accumulate_parameter_scores_(scores, *tensors, **options)
        assert memory.peak < 64 * 2**20, options


@each_shape
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_case_37_no_tensor_as_large_as_the_weight_is_formed(
    shape: tuple[int, int], masked: bool
) -> None:
    weight, x, g = parameter_case(3)
    scores = torch.zeros(shape, dtype=torch.float64)
    valid = every_third_is_padding(3) if masked else None
    sizes = allocated_sizes(OP, scores, weight, x, g, valid, False, 1.0, 0)
    assert sizes or shape == SHAPES["elements"]
    assert max(sizes, default=0) <= weight.numel() // 2
