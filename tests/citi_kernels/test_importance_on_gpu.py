"""RELIABILITY cases of the importance kernels that only a GPU can show; skipped without one."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from citi_kernels import use_backend
from citi_kernels.ops.importance_parameters import accumulate_parameter_scores_
from citi_kernels.ops.importance_reference import parameter_scores_ref, row_dots_ref
from citi_kernels.ops.importance_row_dots import accumulate_row_dots_
from citi_kernels.testing import assert_accurate
from importance_inputs import every_third_is_padding
from under_test import BACKEND, DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" or BACKEND not in ("triton", "cuda"),
    reason="needs CITI_TEST_DEVICE=cuda and CITI_BACKEND=triton or cuda",
)
T, N, K = 512, 1024, 768
SHAPES = {
    "component": (1, 1),
    "rows": (N, 1),
    "columns": (1, K),
    "heads": (N // 128, 1),
    "elements": (N, K),
}
NUM_SEGMENTS = {"component": 1, "heads": 6, "columns": K}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def dots_of(num_segments: int) -> Callable[[Tensor], Tensor]:
    b, valid = normal(T, K), every_third_is_padding(T).cuda()

    def run(x: Tensor) -> Tensor:
        scores = torch.zeros(num_segments, dtype=torch.float64, device="cuda")
        accumulate_row_dots_(scores, x, b, valid=valid)
        return scores

    return run


def parameters_of(shape: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    weight, g, valid = normal(N, K), normal(T, N), every_third_is_padding(T).cuda()
    dtype = torch.bfloat16 if shape == (N, K) else torch.float64

    def run(x: Tensor) -> Tensor:
        scores = torch.zeros(shape, dtype=dtype, device="cuda")
        accumulate_parameter_scores_(scores, weight, x, g, valid=valid, seed=3)
        return scores

    return run


CALLS = {
    **{f"row_dots {name}": (dots_of, number) for name, number in NUM_SEGMENTS.items()},
    **{f"parameters {name}": (parameters_of, shape) for name, shape in SHAPES.items()},
}
each_call = pytest.mark.parametrize(("make", "of"), CALLS.values(), ids=CALLS)


@pytest.mark.parametrize("num_out", [4096, 14336])
@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_main_sizes_hold_the_accuracy_rule(granularity: str, num_out: int, per_token: bool) -> None:
    weight, x, g = normal(num_out, 4096), normal(2048, 4096), normal(2048, num_out)
    shape = {
        "component": (1, 1),
        "rows": (num_out, 1),
        "columns": (1, 4096),
        "heads": (num_out // 128, 1),
        "elements": (num_out, 4096),
    }[granularity]
    scores = torch.zeros(shape, dtype=torch.float64, device="cuda")
    accumulate_parameter_scores_(scores, weight, x, g, per_token=per_token)
    gradient = g.abs().T @ x.abs() if per_token else g.T @ x
    products = (weight * gradient).abs()
    baseline = products.unflatten(1, (shape[1], -1)).sum(2).unflatten(0, (shape[0], -1)).sum(1)
    truth = parameter_scores_ref(weight, x, g, shape, per_token=per_token)
    assert_accurate(scores, truth, baseline, dtype=torch.bfloat16)


@pytest.mark.parametrize("num_tokens", [512, 8192])
@pytest.mark.parametrize("num_features", [4096, 14336])
@pytest.mark.parametrize("length", [1, 128, None], ids=["columns", "heads", "component"])
def test_row_dots_of_main_sizes_have_the_precision_of_fp32(
    num_tokens: int, num_features: int, length: int | None
) -> None:
    a, b = normal(num_tokens, num_features), normal(num_tokens, num_features)
    num_segments = num_features // (length or num_features)
    scores = torch.zeros(num_segments, dtype=torch.float64, device="cuda")
    accumulate_row_dots_(scores, a, b)
    truth = row_dots_ref(a, b, num_segments)
    torch.testing.assert_close(scores, truth, rtol=1e-5, atol=0)


def test_case_2_row_dots_beyond_two_to_the_31_elements_equal_a_small_run() -> None:
    b = normal(256, 512)
    a = torch.zeros(2**31 // 512 + 256, 512, dtype=torch.bfloat16, device="cuda")
    a[-256:] = normal(256, 512)
    for num_segments in (1, 4, 512):
        whole, tail = torch.zeros(2, num_segments, dtype=torch.float64, device="cuda")
        accumulate_row_dots_(whole, a, b[-1:].expand_as(a))
        accumulate_row_dots_(tail, a[-256:], b[-1:].expand(256, 512))
        torch.testing.assert_close(whole, tail, rtol=1e-6, atol=0)


def test_case_2_tokens_beyond_two_to_the_31_elements_equal_a_small_run() -> None:
    weight, g = normal(128, 512), normal(1, 128)
    x = torch.zeros(2**31 // 512 + 256, 512, dtype=torch.bfloat16, device="cuda")
    x[-256:] = normal(256, 512)
    whole, tail = torch.zeros(2, 128, 1, dtype=torch.float64, device="cuda")
    accumulate_parameter_scores_(whole, weight, x, g.expand(len(x), 128))
    accumulate_parameter_scores_(tail, weight, x[-256:], g.expand(256, 128))
    torch.testing.assert_close(whole, tail, rtol=1e-5, atol=0)


def test_case_2_a_weight_beyond_two_to_the_31_elements_equals_its_last_rows() -> None:
    num_out, num_in = 2**16 + 128, 2**15
    weight = torch.ones(1, 1, dtype=torch.bfloat16, device="cuda").expand(num_out, num_in)
    x, g = normal(16, num_in), normal(16, num_out)
    whole = torch.zeros(num_out, num_in, dtype=torch.bfloat16, device="cuda")
    accumulate_parameter_scores_(whole, weight, x, g)
    wanted = (g[:, -128:].float().T @ x.float()).abs()
    torch.testing.assert_close(whole[-128:].float(), wanted, rtol=2**-6, atol=1e-2)


def test_bf16_elements_are_rounded_as_on_the_cpu_bit_by_bit() -> None:
    weight, x, g = ((4 * normal(*shape)).round() for shape in ((N, K), (19, K), (19, N)))
    ours = torch.full((N, K), 100.0, dtype=torch.bfloat16, device="cuda")
    theirs = ours.cpu()
    accumulate_parameter_scores_(ours, weight, x, g, scale=1 / 64, seed=2**40 + 3)
    with use_backend("torch"):
        operands = (each.cpu().float() for each in (weight, x, g))
        accumulate_parameter_scores_(theirs, *operands, scale=1 / 64, seed=2**40 + 3)
    assert torch.equal(ours.cpu(), theirs)


@each_call
def test_case_14_the_first_call_equals_the_tenth(make: Callable, of: object) -> None:
    run, x = make(of), normal(T, K)
    first = run(x)
    for _ in range(9):
        assert torch.equal(run(x), first)


@each_call
def test_case_18_right_on_a_side_stream_with_a_delayed_producer(make: Callable, of: object) -> None:
    run, values = make(of), normal(T, K)
    expected = run(values)
    x = torch.full_like(values, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(values)
        scores = run(x)
    stream.synchronize()
    assert torch.equal(scores, expected)


@each_call
def test_case_25_a_captured_call_replays_equal(make: Callable, of: object) -> None:
    run, x = make(of), normal(T, K)
    expected = run(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = run(x)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(scores, expected)


@each_call
def test_nothing_waits_for_the_gpu(make: Callable, of: object) -> None:
    run, x = make(of), normal(T, K)
    run(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_call
def test_case_26_a_thousand_calls_do_not_grow(make: Callable, of: object) -> None:
    run, x = make(of), normal(T, K)
    run(x)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        run(x)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_call
def test_case_19_tensors_on_another_device_than_the_current_one(make: Callable, of: object) -> None:
    run, x = make(of), normal(T, K)
    expected = run(x)
    with torch.cuda.device(1):
        assert torch.equal(run(x), expected)
