"""The glue of the "cuda" backend, on the CPU: `SkinnyDouble` stands in for the kernels.

Values of the kernels themselves: tests/csrc/test_skinny_simt.cpp.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skinny_double import PLACE, SkinnyDouble, StreamDouble
from torch import Tensor

from citi_kernels import backends, compiled, environment, molora_linear
from citi_kernels.ops import (
    extended_gemm_cuda,
    molora_linear_cuda_gradients,
    side_stream,
    skinny_cuda,
)
from citi_kernels.ops.molora_linear_contract import Settings
from citi_kernels.ops.molora_linear_cuda import empty_saved, path
from citi_kernels.testing import (
    OPERANDS,
    MoLoRACase,
    assert_accurate,
    check_molora_linear,
    evaluate,
    poisoned_memory,
    random_case,
)
from under_test import DEVICE

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the double computes on the CPU")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEED = torch.tensor(2**40 + 7, device="cpu")
DROPOUT = {"dropout_p": 0.3, "dropout_seed": SEED}
OPTIONS = {
    "dense": {},
    "top_k": {"top_k": 2},
    "renormalized": {"top_k": 2, "renormalize": True},
    "dropout": DROPOUT,
    "top_k_dropout": {"top_k": 2, **DROPOUT},
    "update_only": {"weight": False},
    "update_only_top_k": {"weight": False, "top_k": 3},
    "no_bias": {"bias": False},
    "no_segments": {"num_segments": None},
    "fp32_adapters": {"parameter_dtype": torch.float32},
    "fp64_adapters": {"parameter_dtype": torch.float64},
    "rank_1": {"r": 1},
    "rank_96": {"num_experts": 6, "r": 16},
    "rank_128_dropout": {"num_experts": 8, "r": 16, **DROPOUT},
    "63_experts": {"num_experts": 63, "r": 2, "top_k": 4},
}


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[SkinnyDouble]:
    compiled._codes.cache_clear()
    double = SkinnyDouble()
    monkeypatch.setattr(compiled, "extension", lambda: double)
    monkeypatch.setattr(compiled, "launch_place", lambda tensor: PLACE)
    monkeypatch.setattr(backends, "choose", lambda op, x, **_: "cuda")
    yield double
    compiled._codes.cache_clear()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_outputs_and_gradients_hold_the_accuracy_rule(
    double: SkinnyDouble, dtype: torch.dtype, options: dict
) -> None:
    with poisoned_memory():
        check_molora_linear(molora_linear, random_case(61, 96, 80, dtype=dtype, **options))
    assert double.calls["shrink_cuda"] == 1
    assert double.calls["rank_gradients_cuda"] == 1


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    num_tokens=st.integers(1, 40),
    num_in=st.integers(1, 48),
    num_out=st.integers(1, 48),
    num_experts=st.integers(1, 5),
    r=st.integers(1, 9),
    dtype=st.sampled_from(list(DTYPES.values())),
    dropout_p=st.sampled_from([0.0, 0.5]),
    apart=st.sampled_from([0, 3, 8]),
    data=st.data(),
)
def test_any_size_and_row_stride_holds_the_rule(
    double: SkinnyDouble,
    num_tokens: int,
    num_in: int,
    num_out: int,
    num_experts: int,
    r: int,
    dtype: torch.dtype,
    dropout_p: float,
    apart: int,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.sampled_from([None, *range(1, num_experts + 1)]))
    case = random_case(
        num_tokens,
        num_in,
        num_out,
        num_experts=num_experts,
        r=r,
        dtype=dtype,
        top_k=top_k,
        renormalize=data.draw(st.booleans()) if top_k else False,
        dropout_p=dropout_p,
        dropout_seed=SEED if dropout_p else None,
    )
    names = ("x", "weight", "a", "b", "router", "dy")
    with poisoned_memory():
        check_molora_linear(
            molora_linear,
            replace(case, **{name: rows_apart(getattr(case, name), apart) for name in names}),
        )


def rows_apart(tensor: Tensor, gap: int) -> Tensor:
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + gap), float("nan"))
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


@pytest.mark.parametrize(
    ("gap", "shift", "is_taken"), [(0, 0, True), (8, 0, True), (4, 0, False), (8, 1, False)]
)
def test_aligned_rows_are_taken_as_they_lie_and_others_are_copied(
    gap: int, shift: int, is_taken: bool
) -> None:
    flat = torch.arange(400, dtype=torch.bfloat16)
    x_TK = flat[shift:].as_strided((9, 16), (16 + gap, 1), flat.storage_offset() + shift)
    rows_TK = skinny_cuda.aligned(x_TK)
    assert (rows_TK.data_ptr() == x_TK.data_ptr()) == is_taken
    assert rows_TK.data_ptr() % 16 == 0
    assert rows_TK.stride(0) % 8 == 0
    assert torch.equal(rows_TK, x_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *DTYPES.values()])
def test_matrices_are_packed_whatever_their_strides_and_dtypes(
    double: SkinnyDouble, dtype: torch.dtype
) -> None:
    first, second = torch.randn(5, 11).to(dtype), torch.randn(11, 3).to(torch.bfloat16)
    out = skinny_cuda.packed((16, 24), torch.bfloat16, (first, 0), (second.T, 8))
    expected = torch.zeros(16, 24, dtype=torch.bfloat16)
    expected[:5, :11], expected[8:11, :11] = first, second.T
    assert torch.equal(out, expected)
    assert double.calls["pack_rows_cuda"] == 1


def test_rows_are_padded_with_zeros_to_a_multiple_of_eight() -> None:
    x_TK = torch.ones(3, 11, dtype=torch.float16)
    rows_TK = skinny_cuda.aligned(x_TK)
    assert rows_TK.shape == (3, 16)
    assert torch.equal(rows_TK[:, :11], x_TK)
    assert not rows_TK[:, 11:].any()


SUBSETS = {
    "dense": {},
    "top_k_dropout": {"top_k": 2, **DROPOUT},
    "wide": {"num_experts": 4, "r": 12},
    "update_only": {"weight": False},
}


@pytest.mark.parametrize("options", SUBSETS.values(), ids=SUBSETS)
def test_every_subset_of_gradients_is_the_same_to_rounding(
    double: SkinnyDouble, options: dict
) -> None:
    case = random_case(9, 24, 16, dtype=torch.bfloat16, **options)
    expected = evaluate(molora_linear, case)
    present = [name for name in OPERANDS if getattr(case, name) is not None]
    for size in range(1, len(present) + 1):
        for subset in itertools.combinations(present, size):
            for name, gradient in gradients_of(case, subset).items():
                assert_accurate(
                    gradient, expected[f"d{name}"].double(), expected[f"d{name}"], name=name
                )


def gradients_of(case: MoLoRACase, subset: tuple[str, ...]) -> dict[str, Tensor]:
    leaves = {name: getattr(case, name) for name in OPERANDS}
    for name in subset:
        leaves[name] = leaves[name].clone().requires_grad_()
    y, gate_sums = molora_linear(*leaves.values(), **case.options)
    torch.autograd.backward([y, gate_sums], [case.dy, case.dgate_sums])
    return {name: leaves[name].grad for name in subset}


# passes over dy, over x in the backward, and rank space
BACKWARD = ("row_product_cuda", "factor_gradients_cuda", "rank_gradients_cuda")


@pytest.mark.parametrize(
    ("trained", "r", "calls"),
    [
        ("x a b router", 8, (0, 2, 1)),
        ("x a b router", 12, (1, 2, 1)),
        ("x router", 8, (1, 1, 1)),
        ("x", 8, (1, 0, 1)),
        ("b", 8, (0, 1, 0)),
        ("x b", 8, (0, 1, 1)),
        ("weight bias", 8, (0, 0, 0)),
    ],
)
def test_what_is_not_asked_for_is_not_computed(
    double: SkinnyDouble, trained: str, r: int, calls: tuple[int, ...]
) -> None:
    """Up to rank 32, dy is read once for b and the rank; else the rank has a pass of its own."""
    gradients_of(random_case(9, 24, 16, r=r, dtype=torch.bfloat16), tuple(trained.split()))
    assert tuple(double.calls[name] for name in BACKWARD) == calls


@pytest.mark.parametrize("output", [0, 1], ids=["y", "gate_sums"])
def test_either_output_alone_may_be_in_the_loss(double: SkinnyDouble, output: int) -> None:
    case = random_case(11, 24, 16, dtype=torch.bfloat16)
    zeros = {"dy": torch.zeros_like(case.dy), "dgate_sums": torch.zeros_like(case.dgate_sums)}
    kept = "dy" if output == 0 else "dgate_sums"
    expected = evaluate(molora_linear, replace(case, **(zeros | {kept: getattr(case, kept)})))
    leaves = [each.detach().requires_grad_() for each in case.operands]
    outputs = molora_linear(*leaves, **case.options)
    outputs[output].backward(getattr(case, kept))
    for name, leaf in zip(OPERANDS, leaves, strict=True):
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(gradient, expected[f"d{name}"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_nan_of_an_expert_reaches_the_tokens_that_keep_it_alone(
    double: SkinnyDouble, options: dict
) -> None:
    case = random_case(24, 32, 16, dtype=torch.bfloat16, top_k=1, **options)
    clean = evaluate(molora_linear, case)
    broken = replace(case, a=case.a.clone(), b=case.b.clone())
    broken.a[:8], broken.b[:, :8] = float("nan"), float("inf")
    results = evaluate(molora_linear, broken)
    logits_TE = case.x.float() @ case.router[1:].float().T
    keeps_T = logits_TE.argmax(1) == 0
    assert 0 < keeps_T.sum() < 24
    assert not results["y"][keeps_T].isfinite().any()
    for name in ("y", "dx"):
        assert torch.equal(results[name][~keeps_T], clean[name][~keeps_T])
    assert torch.equal(results["db"][:, 8:], clean["db"][:, 8:])
    assert torch.equal(results["da"][8:], clean["da"][8:])


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "options"),
    [
        (5, torch.float32, {}),
        (5, torch.bfloat16, {"num_experts": 4, "r": 40}),
        (5, torch.bfloat16, {"num_experts": 64, "r": 1}),
        (0, torch.bfloat16, {}),
    ],
    ids=["fp32", "rank_160", "65_gates", "no_token"],
)
def test_what_the_kernels_do_not_take_goes_to_the_torch_backend(
    double: SkinnyDouble, num_tokens: int, dtype: torch.dtype, options: dict
) -> None:
    check_molora_linear(molora_linear, random_case(num_tokens, 24, 16, dtype=dtype, **options))
    assert not double.calls


def test_the_path_follows_from_metadata() -> None:
    narrow, wide = (128, 16), (256, 16)
    settings = Settings(63, 1.0, None, False, None, 0, 0.0, None)
    assert path(3, narrow, torch.float16, settings) == "dense"
    assert path(3, narrow, torch.float32, settings) == "library"
    assert path(3, narrow, torch.float16, settings._replace(num_experts=64)) == "library"
    assert path(3, wide, torch.float16, settings) == "library"
    sparse = settings._replace(top_k=2)
    assert path(3, narrow, torch.float16, sparse) == "dense"
    assert path(3, wide, torch.float16, sparse) == "grouped"
    assert path(3, wide, torch.float32, sparse) == "library"


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"num_experts": 4, "r": 40}])
def test_tracing_sees_the_shapes_that_are_saved(double: SkinnyDouble, options: dict) -> None:
    case = random_case(6, 24, 16, dtype=torch.bfloat16, **options)
    shown = {}

    def pack(tensor: Tensor) -> Tensor:
        shown[tuple(tensor.shape)] = tensor.dtype
        return tensor

    leaves = [each.requires_grad_() for each in case.operands]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        molora_linear(*leaves, **case.options)
    experts = case.options["num_experts"]
    plan = Settings(experts, 1.0, case.options.get("top_k"), False, None, 0, 0.0, None)
    for each in empty_saved(case.x, case.a, plan):
        assert each is None or shown[tuple(each.shape)] == each.dtype


@pytest.fixture
def extended(double: SkinnyDouble, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GEMM of Hopper in PyTorch, from one token on; it and all streams keep one record.

    Its operands are checked; what it makes of them is tested elsewhere.
    """

    def extended_linear(x, weight, bias, u, b):
        double.record.append("y")
        assert extended_gemm_cuda._misaligned(u) is extended_gemm_cuda._misaligned(b) is None
        return (x.float() @ weight.T.float() + bias + u.float() @ b.T.float()).to(x.dtype)

    def extended_input_gradient(dy, weight, dz, stack):
        double.record.append("dx")
        assert extended_gemm_cuda._misaligned(dz) is extended_gemm_cuda._misaligned(stack) is None
        return (dy.float() @ weight.float() + dz.float() @ stack.float()).to(dy.dtype)

    monkeypatch.setattr(environment, "EXTENDED_GEMM", True)
    monkeypatch.setattr(molora_linear_cuda_gradients, "MIN_EXTENDED_TOKENS", 1)
    monkeypatch.setattr(extended_gemm_cuda, "why_not", lambda *operands: None)
    monkeypatch.setattr(extended_gemm_cuda, "extended_linear", extended_linear)
    monkeypatch.setattr(extended_gemm_cuda, "extended_input_gradient", extended_input_gradient)
    streams = {name: StreamDouble(name, double.record) for name in ("main", "side")}
    monkeypatch.setattr(side_stream, "_current_stream", lambda device: streams["main"])
    monkeypatch.setattr(side_stream, "_side_stream", lambda device: streams["side"])
    return double.record


@pytest.mark.parametrize("sizes", [(61, 96, 80), (33, 45, 51)], ids=["aligned", "ragged"])
def test_the_base_and_the_update_are_one_product(
    extended: list[str], sizes: tuple[int, int, int]
) -> None:
    with poisoned_memory():
        check_molora_linear(molora_linear, random_case(*sizes, dtype=torch.bfloat16))
    assert (extended.count("y"), extended.count("dx")) == (1, 1)
    extended.clear()
    check_molora_linear(molora_linear, random_case(*sizes, dtype=torch.bfloat16, top_k=2))
    assert "y" not in extended, "0 · NaN of a dropped expert must not reach a token"
    assert "dx" not in extended
    check_molora_linear(molora_linear, random_case(*sizes, dtype=torch.bfloat16, **DROPOUT))
    assert (extended.count("y"), extended.count("dx")) == (1, 0)


def test_the_choice_of_a_product_does_not_depend_on_where_x_lies(
    extended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        extended_gemm_cuda, "why_not", lambda left, *rest: extended_gemm_cuda._misaligned(left)
    )
    case = random_case(9, 24, 16, dtype=torch.bfloat16)
    for gap in (0, 3, 8):
        extended.clear()
        evaluate(molora_linear, replace(case, x=rows_apart(case.x, gap)))
        assert (extended.count("y"), extended.count("dx")) == (1, 1)


@pytest.mark.parametrize("r", [1, 8, 12])
def test_every_subset_of_gradients_with_the_extended_gemm_is_the_same_to_rounding(
    extended: list[str], r: int
) -> None:
    case = random_case(9, 24, 16, r=r, dtype=torch.bfloat16)
    expected = evaluate(molora_linear, case)
    for size in range(1, len(OPERANDS) + 1):
        for subset in itertools.combinations(OPERANDS, size):
            for name, gradient in gradients_of(case, subset).items():
                assert_accurate(
                    gradient, expected[f"d{name}"].double(), expected[f"d{name}"], name=name
                )


def test_few_tokens_and_the_switch_keep_the_library(
    extended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(9, 24, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(molora_linear_cuda_gradients, "MIN_EXTENDED_TOKENS", 10)
    evaluate(molora_linear, case)
    monkeypatch.setattr(molora_linear_cuda_gradients, "MIN_EXTENDED_TOKENS", 9)
    monkeypatch.setattr(environment, "EXTENDED_GEMM", False)
    evaluate(molora_linear, case)
    assert not {"y", "dx", "side waits for main"} & set(extended)


FORK, JOIN = "side waits for main", "main waits for side"


@pytest.mark.parametrize(
    ("trained", "after"),
    [
        ("x", []),
        ("x bias", []),
        ("x b", [FORK, "scale_ranks_cuda", "factor_gradients_cuda", "sum_shares_cuda", JOIN]),
        ("x a", [FORK, "factor_gradients_cuda", "sum_shares_cuda", JOIN]),
        (
            "x a b router",
            [FORK, "scale_ranks_cuda"] + 2 * ["factor_gradients_cuda", "sum_shares_cuda"] + [JOIN],
        ),
    ],
)
def test_gradients_of_factors_run_beside_the_gemm_and_begin_after_it_was_launched(
    extended: list[str], trained: str, after: list[str]
) -> None:
    gradients_of(random_case(9, 24, 16, dtype=torch.bfloat16), tuple(trained.split()))
    backward = extended[extended.index("row_product_cuda") :]
    fork = ["main records"] if after else []
    join = [*after[:-1], "side records", after[-1]] if after else []
    rank_space = ["row_product_cuda", "rank_gradients_cuda", "pack_rows_cuda"]
    assert backward == [*rank_space, *fork, "dx", *join]


def test_without_a_gradient_of_x_nothing_runs_beside(extended: list[str]) -> None:
    gradients_of(random_case(9, 24, 16, dtype=torch.bfloat16), ("a", "b", "router"))
    assert not {"dx", FORK, JOIN} & set(extended)
