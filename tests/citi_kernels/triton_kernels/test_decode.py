"""The two launches for few tokens against fp64 truth, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels.ops.molora_linear_contract import Operands, Settings
from citi_kernels.ops.molora_linear_reference import molora_linear_ref
from citi_kernels.testing import (
    MoLoRACase,
    assert_accurate,
    embed,
    poisoned_memory,
    random_case,
    rounded,
    stacked_molora_linear,
)
from citi_kernels.triton_kernels import decode
from citi_kernels.triton_kernels.decode import decode_linear, rows_launch_meta, takes
from citi_kernels.triton_kernels.launch import recorded_launches
from under_test import DEVICE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUT = {"dropout_p": 0.4, "dropout_seed": torch.tensor(2**40 + 7, device="cpu")}
OPTIONS = {"plain": {}, "dropout": DROPOUT}
DEFAULTS = {"num_segments": None, "parameter_dtype": torch.float32, "device": DEVICE}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make_case(T: int, K: int, N: int, **options: object) -> MoLoRACase:
    return random_case(T, K, N, **DEFAULTS | options)


def run(case: MoLoRACase, **base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, h, probs."""
    options = case.options
    settings = Settings(
        options["num_experts"],
        options["scaling"],
        None,
        False,
        None,
        0,
        options.get("dropout_p", 0.0),
        options.get("dropout_seed"),
    )
    return decode_linear(Operands(*case.operands), settings, **base)


def check(case: MoLoRACase) -> None:
    dtype = case.x.dtype
    with poisoned_memory():
        y, h, probs = run(case)
    wide = rounded(case).to(torch.float64)
    truth, _ = molora_linear_ref(*wide.operands, **wide.options)
    baseline, _ = stacked_molora_linear(*case.operands, **case.options)
    assert y.dtype == h.dtype == dtype
    assert_accurate(y, truth, baseline, name="y")
    logits = wide.x @ wide.router.T
    plain_logits = (case.x @ case.router.to(dtype).T).float()
    assert_accurate(probs, logits.softmax(1), plain_logits.softmax(1), name="probs", dtype=dtype)
    if not case.options.get("dropout_p"):
        assert_accurate(h, wide.x @ wide.a.T, case.x @ case.a.to(dtype).T, name="h")


@each_dtype
@each_option
@pytest.mark.parametrize("shape", [(1, 40, 24), (7, 300, 133), (16, 513, 64), (64, 130, 96)])
def test_follows_the_accuracy_rule(
    shape: tuple[int, int, int], dtype: torch.dtype, options: dict
) -> None:
    check(make_case(*shape, dtype=dtype, **options))


@each_dtype
@each_option
def test_the_update_is_added_to_a_base_in_place_and_the_base_is_y(
    dtype: torch.dtype, options: dict
) -> None:
    case = make_case(7, 300, 133, dtype=dtype, **options)
    base = F.linear(*case.operands[:3])
    kept = base.clone()
    y, h, probs = run(replace(case, b=torch.zeros_like(case.b)), base_TN=base)
    assert y is base
    assert torch.equal(y, kept)
    y, *ranks = run(case, base_TN=base)
    wide = rounded(case).to(torch.float64)
    truth, _ = molora_linear_ref(*wide.operands, **wide.options)
    baseline, _ = stacked_molora_linear(*case.operands, **case.options)
    assert_accurate(y, truth, baseline, name="y")
    assert all(map(torch.equal, ranks, (h, probs)))


@pytest.mark.parametrize(("num_experts", "r"), [(1, 1), (3, 11), (64, 4), (127, 2), (2, 128)])
def test_odd_ranks_and_many_experts(num_experts: int, r: int) -> None:
    check(make_case(5, 150, 70, num_experts=num_experts, r=r, dtype=torch.bfloat16))


@each_option
def test_without_weight_or_bias(options: dict) -> None:
    check(make_case(5, 300, 70, weight=False, dtype=torch.bfloat16, **options))
    check(make_case(5, 300, 70, bias=False, dtype=torch.bfloat16, **options))


def test_parameters_of_the_dtype_of_x() -> None:
    check(make_case(5, 300, 70, dtype=torch.bfloat16, parameter_dtype=None))


def test_case_9_no_token() -> None:
    y, h, probs = run(make_case(0, 40, 24))
    assert (y.shape, h.shape, probs.shape) == ((0, 24), (0, 32), (0, 5))


def test_a_transposed_weight_and_rows_that_lie_apart_give_the_same_bits() -> None:
    case = make_case(9, 300, 70, dtype=torch.bfloat16)
    wide_x = case.x.new_full((9, 411), 3.0)
    wide_x[:, 100:400] = case.x
    other = replace(case, x=wide_x[:, 100:400], weight=case.weight.T.contiguous().T)
    sliced = replace(case, weight=embed(case.weight).view)
    for result in (run(other), run(sliced)):
        assert all(torch.equal(*pair) for pair in zip(result, run(case), strict=True))


def test_case_7_nothing_around_the_inputs_is_read() -> None:
    case = make_case(9, 77, 70, dtype=torch.bfloat16, **DROPOUT)
    guarded = {"x": embed(case.x).view, "weight": embed(case.weight).view}
    for name in ("bias", "a", "b", "router"):
        tensor = getattr(case, name)
        guarded[name] = embed(tensor.reshape(1, -1)).view.reshape(tensor.shape)
    for mine, expected in zip(run(replace(case, **guarded)), run(case), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@each_option
def test_case_11_what_is_not_finite_in_a_row_stays_there(value: float, options: dict) -> None:
    case = make_case(9, 300, 70, dtype=torch.bfloat16, **options)
    expected = run(case)
    case.x[4, 250] = value
    others = torch.arange(9, device=DEVICE) != 4
    for mine, before in zip(run(case), expected, strict=True):
        assert torch.equal(mine[others], before[others])
    assert not torch.isfinite(run(case)[0][4]).any()


@each_dtype
def test_case_16_a_token_depends_neither_on_its_neighbours_nor_on_padding(
    dtype: torch.dtype,
) -> None:
    case = make_case(16, 300, 70, dtype=dtype)
    expected = run(case)
    for count in (1, 3, 15):
        for mine, all_16 in zip(run(replace(case, x=case.x[:count])), expected, strict=True):
            assert torch.equal(mine, all_16[:count])
    case.x[1:] = 1e3
    for mine, before in zip(run(case), expected, strict=True):
        assert torch.equal(mine[0], before[0])


def test_case_12_large_logits_give_finite_gates() -> None:
    case = make_case(3, 40, 24)
    case.router.mul_(1e4)
    probs = run(case)[2]
    assert torch.isfinite(probs).all()
    assert torch.allclose(probs.sum(1), torch.ones(3, device=DEVICE))


def test_the_parts_of_k_do_not_depend_on_tokens() -> None:
    def parts(T: int, N: int, K: int) -> tuple[int, int]:
        meta = rows_launch_meta(T, N, K, torch.bfloat16, num_programs=132, has_dropout=False)
        return meta.constants["NUM_SPLITS"], meta.constants["K_OF_SPLIT"]

    for N, K in ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (0, 4096), (8, 1)):
        splits, size = parts(1, N, K)
        assert {parts(T, N, K) for T in (1, 16, 17, 64)} == {(splits, size)}
        assert (splits - 1) * size < K <= splits * size
        assert splits <= 8


def test_two_launches_and_what_is_taken() -> None:
    case = make_case(64, 80, 24, num_experts=2, dtype=torch.bfloat16)
    meta = {
        name: None if tensor is None else tensor.to("meta")
        for name, tensor in Operands(*case.operands)._asdict().items()
    }
    with recorded_launches() as launches:
        y, h, probs = run(replace(case, **meta))
    assert len(launches) == 2
    assert all(len(each.grid) == 1 for each in launches)
    assert (y.shape, h.shape, probs.shape) == ((64, 24), (64, 16), (64, 3))
    assert takes(case.x, 256)
    assert not takes(case.x, 257)
    assert not takes(torch.zeros(65, 80), 8)
    assert not takes(case.x.double(), 8)


def test_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "num_multiprocessors", lambda device: 4096)
    check(make_case(5, 2000, 70, dtype=torch.bfloat16))
