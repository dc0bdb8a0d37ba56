"""RELIABILITY cases of the backends for a GPU that only one can show; skipped without one."""

from __future__ import annotations

import gc

import pytest
import torch

from citi_kernels import molora_linear
from citi_kernels.testing import check_molora_linear, evaluate, poisoned_memory, random_case
from under_test import BACKEND, DEVICE

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" or BACKEND not in ("triton", "cuda"),
    reason="needs CITI_TEST_DEVICE=cuda and CITI_BACKEND=triton or cuda",
)
SEED = torch.tensor(7, device="cpu")
OPTIONS = {
    "dense": {},
    "top_k": {"top_k": 2},
    "dropout": {"dropout_p": 0.3, "dropout_seed": SEED},
    "decode": {"num_tokens": 8},
    "long": {"num_tokens": 4096},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def case_of(options: dict, num_tokens: int = 512):
    options = dict(options)
    num_tokens = options.pop("num_tokens", num_tokens)
    return random_case(num_tokens, 512, 768, dtype=torch.bfloat16, device="cuda", **options)


def assert_same(results: dict, expected: dict) -> None:
    assert [name for name in expected if not torch.equal(results[name], expected[name])] == []


def test_case_2_rows_beyond_two_to_the_31_elements_equal_a_small_run() -> None:
    num_tokens, num_in = 2**31 // 512 + 256, 512
    case = random_case(256, num_in, 512, dtype=torch.bfloat16, device="cuda", num_segments=None)
    x = torch.zeros(num_tokens, num_in, dtype=torch.bfloat16, device="cuda")
    x[-256:] = case.x
    with torch.no_grad():
        y, _ = molora_linear(x, *case.operands[1:], **case.options)
        tail, _ = molora_linear(x[-256:], *case.operands[1:], **case.options)
    torch.testing.assert_close(y[-256:], tail, rtol=2e-2, atol=2e-2)


WIDE = {
    "dense": {},
    "fp16": {"dtype": torch.float16},
    "fp32_adapters": {"parameter_dtype": torch.float32},
    "dropout": {"dropout_p": 0.3, "dropout_seed": SEED},
    "no_bias": {"bias": False},
    "no_segments": {"num_segments": None},
    "rank_1": {"r": 1},
    "rank_96": {"num_experts": 6, "r": 16},
    "top_k": {"top_k": 2},
}


@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE)
def test_enough_tokens_for_every_kernel_hold_the_accuracy_rule(options: dict) -> None:
    case = random_case(2100, 1032, 1544, **{"dtype": torch.bfloat16, "device": "cuda"} | options)
    with poisoned_memory():
        check_molora_linear(molora_linear, case)


def test_memory_taken_right_after_a_backward_reaches_no_gradient() -> None:
    case = random_case(8192, 2048, 2048, dtype=torch.bfloat16, device="cuda")
    expected = evaluate(molora_linear, case)
    for _ in range(50):
        results = evaluate(molora_linear, case)
        # of every size that a backward works with
        poison = [
            torch.full((2**power,), float("nan"), device="cuda")
            for power in range(10, 27)
            for _ in "ab"
        ]
        del poison
        assert_same(results, expected)


@each_option
def test_case_14_the_first_call_equals_the_tenth(options: dict) -> None:
    case = case_of(options)
    first = evaluate(molora_linear, case)
    for _ in range(9):
        assert_same(evaluate(molora_linear, case), first)


@each_option
def test_case_18_right_on_a_side_stream_with_a_delayed_producer(options: dict) -> None:
    case = case_of(options)
    expected = evaluate(molora_linear, case)
    stream = torch.cuda.Stream()
    values = case.x.clone()
    case.x.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        case.x.copy_(values)
        results = evaluate(molora_linear, case)
    stream.synchronize()
    assert_same(results, expected)


@each_option
def test_case_25_capture_of_forward_and_backward_replays_equal(options: dict) -> None:
    case = case_of(options)
    expected = evaluate(molora_linear, case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            evaluate(molora_linear, case)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = evaluate(molora_linear, case)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert_same(results, expected)


@each_option
def test_nothing_waits_for_the_gpu(options: dict) -> None:
    case = case_of(options)
    evaluate(molora_linear, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(molora_linear, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_option
def test_case_26_a_thousand_steps_do_not_grow(options: dict) -> None:
    case = case_of(options)
    for _ in range(3):
        evaluate(molora_linear, case)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        evaluate(molora_linear, case)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@each_option
def test_case_19_tensors_on_another_device_than_the_current_one(options: dict) -> None:
    case = case_of(options)
    expected = evaluate(molora_linear, case)
    with torch.cuda.device(1):
        assert_same(evaluate(molora_linear, case), expected)
