"""Values of `molora_linear` against the fp64 truth, and what its options mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from citi_kernels import environment, molora_linear, molora_linear_ref, use_backend
from citi_kernels.testing import check_molora_linear, evaluate, random_case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEED = torch.tensor(7, device="cpu")
OPTIONS = {
    "dense": {},
    "top_k": {"top_k": 2},
    "top_1_of_4": {"top_k": 1},
    "top_k_is_all": {"top_k": 4},
    "renormalized": {"top_k": 2, "renormalize": True},
    "dropout": {"dropout_p": 0.3, "dropout_seed": SEED},
    "top_k_dropout": {"top_k": 2, "dropout_p": 0.3, "dropout_seed": SEED},
    "update_only": {"weight": False},
    "update_only_top_k": {"weight": False, "top_k": 3},
    "no_bias": {"bias": False},
    "no_segments": {"num_segments": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_outputs_and_gradients_hold_the_accuracy_rule(dtype: torch.dtype, options: dict) -> None:
    check_molora_linear(molora_linear, random_case(61, 96, 80, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}], ids=["dense", "top_k"])
def test_fp32_adapters_on_a_16_bit_base_hold_the_rule(dtype: torch.dtype, options: dict) -> None:
    case = random_case(61, 96, 80, dtype=dtype, parameter_dtype=torch.float32, **options)
    check_molora_linear(molora_linear, case)
    results = evaluate(molora_linear, case)
    assert results["y"].dtype == results["dx"].dtype == dtype
    assert results["da"].dtype == results["db"].dtype == results["drouter"].dtype == torch.float32


@pytest.mark.parametrize("r", [1, 2, 4, 8, 24, 33, 64])
def test_case_3_every_rank_at_odd_sizes(r: int) -> None:
    check_molora_linear(molora_linear, random_case(19, 37, 53, num_experts=3, r=r))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("top_k", [None, 1])
def test_case_3_every_number_of_experts_at_odd_sizes(num_experts: int, top_k: int | None) -> None:
    case = random_case(19, 37, 53, num_experts=num_experts, r=4, top_k=top_k)
    check_molora_linear(molora_linear, case)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_sum_over_many_kept_experts_is_rounded_once(dtype: torch.dtype, weight: bool) -> None:
    num_experts, size = (12, 32) if environment.INTERPRETS else (64, 256)
    top_k = num_experts // 2
    case = random_case(
        32, size, size, num_experts=num_experts, r=6, dtype=dtype, top_k=top_k, weight=weight
    )
    # about 0.2; with a rounding for each expert 0.7, without a weight 0.45
    assert check_molora_linear(molora_linear, case)["y"].norm <= 0.4


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    num_tokens=st.integers(1, 40),
    num_in=st.integers(1, 48),
    num_out=st.integers(1, 48),
    num_experts=st.integers(1, 5),
    r=st.integers(1, 9),
    dtype=st.sampled_from(list(DTYPES.values())),
    narrow_parameters=st.booleans(),
    weight=st.booleans(),
    num_segments=st.sampled_from([None, 1, 4]),
    dropout_p=st.sampled_from([0.0, 0.5]),
    layout=st.sampled_from(["contiguous", "transposed", "apart"]),
    data=st.data(),
)
def test_any_shape_stride_dtype_and_option_holds_the_rule(
    num_tokens: int,
    num_in: int,
    num_out: int,
    num_experts: int,
    r: int,
    dtype: torch.dtype,
    narrow_parameters: bool,
    weight: bool,
    num_segments: int | None,
    dropout_p: float,
    layout: str,
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
        parameter_dtype=dtype if narrow_parameters else torch.float32,
        weight=weight,
        num_segments=num_segments,
        top_k=top_k,
        renormalize=data.draw(st.booleans()) if top_k else False,
        dropout_p=dropout_p,
        dropout_seed=SEED if dropout_p else None,
    )
    names = [
        name
        for name in ("x", "weight", "a", "b", "router", "dy")
        if getattr(case, name) is not None
    ]
    check_molora_linear(
        molora_linear,
        replace(case, **{name: laid_out(getattr(case, name), layout) for name in names}),
    )


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return tensor.T.contiguous().T
    if layout == "apart":
        wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + 3), float("nan"))
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]
    return tensor


def test_reference_equals_the_formula_written_out_for_one_token() -> None:
    case = random_case(1, 6, 5, num_experts=2, r=3, num_segments=None).to(torch.float64)
    x, weight, bias, a, b, router = case.operands
    gate = torch.softmax(router @ x[0], dim=0)
    expected = weight @ x[0] + bias
    for i in range(2):
        a_i, b_i = a[3 * i : 3 * i + 3], b[:, 3 * i : 3 * i + 3]
        expected = expected + case.options["scaling"] * gate[i + 1] * (b_i @ (a_i @ x[0]))
    y, gate_sums = molora_linear_ref(*case.operands, **case.options)
    assert gate_sums is None
    torch.testing.assert_close(y[0], expected, rtol=1e-12, atol=1e-12)


def test_reference_backend_runs_the_reference() -> None:
    case = random_case(9, 16, 12, top_k=2)
    with use_backend("reference"):
        chosen = evaluate(molora_linear, case)
    direct = evaluate(molora_linear_ref, case)
    assert all(torch.equal(chosen[name], direct[name]) for name in direct)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}], ids=["dense", "top_k"])
def test_case_51_zero_b_gives_the_linear_layer_bitwise(
    dtype: torch.dtype, bias: bool, options: dict
) -> None:
    case = random_case(24, 64, 48, dtype=dtype, bias=bias, num_segments=None, **options)
    x, weight, bias_N, a, b, router = case.operands
    x = x.reshape(2, 12, 64)
    for layout in (weight, weight.T.contiguous().T):
        y, _ = molora_linear(x, layout, bias_N, a, torch.zeros_like(b), router, **case.options)
        assert torch.equal(y, F.linear(x, layout, bias_N))


def test_leading_dimensions_are_tokens() -> None:
    case = random_case(24, 32, 16, num_segments=4)
    x, *others = case.operands
    y, gate_sums = molora_linear(x, *others, **case.options)
    ids = case.options["segment_ids"]
    for shape in ((24,), (2, 12), (2, 3, 4)):
        options = case.options | {"segment_ids": ids.reshape(shape)}
        y_shaped, sums_shaped = molora_linear(x.reshape(*shape, 32), *others, **options)
        assert torch.equal(y_shaped, y.reshape(*shape, 16))
        assert torch.equal(sums_shaped, gate_sums)
        y_flat_ids, _ = molora_linear(x.reshape(*shape, 32), *others, **case.options)
        assert torch.equal(y_flat_ids, y_shaped)
    y_one, _ = molora_linear(
        x[0], *others, num_experts=4, scaling=case.options["scaling"], segment_ids=None
    )
    torch.testing.assert_close(y_one, y[0])


def gates_of(router: Tensor, x: Tensor, **options: object) -> Tensor:
    """(T, G) gates of each token, through one segment per token."""
    num_experts, num_in = router.shape[0] - 1, router.shape[1]
    a, b = torch.ones(num_experts, num_in), torch.ones(2, num_experts)
    ids = torch.arange(x.shape[0])
    _, sums = molora_linear(
        x,
        None,
        None,
        a,
        b,
        router,
        num_experts=num_experts,
        scaling=1.0,
        segment_ids=ids,
        num_segments=x.shape[0],
        **options,
    )
    return sums


def test_gate_sums_are_sums_of_softmax_over_the_tokens_of_each_segment() -> None:
    x, router = torch.randn(6, 8), torch.randn(4, 8)
    gate_TG = torch.softmax(x @ router.T, dim=1)
    torch.testing.assert_close(gates_of(router, x), gate_TG)
    ids = torch.tensor([2, 0, -1, 2, 2, -1])
    _, sums = molora_linear(
        x,
        None,
        None,
        torch.ones(3, 8),
        torch.ones(2, 3),
        router,
        num_experts=3,
        scaling=1.0,
        segment_ids=ids,
        num_segments=3,
    )
    expected = torch.stack([gate_TG[1], torch.zeros(4), gate_TG[0] + gate_TG[3] + gate_TG[4]])
    torch.testing.assert_close(sums, expected)


def test_top_k_keeps_the_backbone_and_the_largest_experts_and_zeroes_the_rest() -> None:
    router = torch.tensor([[-3.0], [0.5], [2.0], [1.0], [-1.0]])
    x = torch.ones(1, 1)
    probs = torch.softmax(router[:, 0], dim=0)
    gate = gates_of(router, x, top_k=2)[0]
    assert gate[[1, 4]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(gate[[0, 2, 3]], probs[[0, 2, 3]])
    renormalized = gates_of(router, x, top_k=2, renormalize=True)[0]
    torch.testing.assert_close(renormalized, gate / gate.sum())


def test_top_k_chooses_by_logits_where_probabilities_underflow() -> None:
    router = torch.tensor([[900.0], [-300.0], [-100.0], [-200.0]])
    x = torch.ones(2, 1)
    kept_ET = torch.ops.citi.molora_linear(
        x, None, None, torch.ones(3, 1), torch.ones(2, 3), router,
        3, 1.0, 1, True, None, 0, 0.0, None, "torch",
    )[3]  # fmt: skip
    assert kept_ET.T.tolist() == [[False, True, False]] * 2
    gate = gates_of(router, x, top_k=1, renormalize=True)
    assert gate.tolist() == [[1.0, 0.0, 0.0, 0.0]] * 2


def test_dropout_touches_the_experts_alone_and_follows_its_seed() -> None:
    case = random_case(64, 32, 16, num_segments=2)
    clean = molora_linear(*case.operands, **case.options)
    runs = []
    for seed in (1, 1, 2):
        options = case.options | {
            "dropout_p": 0.5,
            "dropout_seed": torch.tensor(seed, device="cpu"),
        }
        runs.append(molora_linear(*case.operands, **options))
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert torch.equal(runs[0][1], runs[2][1])
    torch.testing.assert_close(runs[0][1], clean[1])
    no_update = torch.zeros_like(case.b)
    y, _ = molora_linear(*case.operands[:4], no_update, case.router, **options)
    assert torch.equal(y, F.linear(*case.operands[:3]))


def test_dropout_keeps_one_minus_p_of_the_inputs_and_scales_them() -> None:
    x = torch.ones(200, 300)
    y, _ = molora_linear(
        x, None, None, torch.ones(1, 300), torch.ones(1, 1), torch.zeros(2, 300),
        num_experts=1, scaling=2.0, dropout_p=0.25, dropout_seed=SEED,
    )  # fmt: skip
    assert y.mean().item() == pytest.approx(300, rel=0.01)
    assert y.std().item() == pytest.approx((300 * 0.25 / 0.75) ** 0.5, rel=0.2)
