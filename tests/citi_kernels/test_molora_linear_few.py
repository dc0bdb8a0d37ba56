"""Repeated calls of few tokens, of which nothing but where and what the tensors are is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from citi_kernels import compiled, molora_linear, use_backend
from citi_kernels.ops import molora_linear_few
from citi_kernels.testing import MoLoRACase, random_case

pytestmark = pytest.mark.skipif(
    compiled.why_missing("native") is not None, reason="the extension is not built"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIONS = {"num_experts": 4, "scaling": 0.25}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(molora_linear_few, "_known", {})
    with torch.device("cpu"), torch.no_grad(), use_backend("native"):
        yield


def case_of(num_tokens: int = 3, **changes: object) -> MoLoRACase:
    return random_case(num_tokens, 70, 50, parameter_dtype=torch.float32, **changes)


def output(case: MoLoRACase, **options: object) -> Tensor:
    return molora_linear(*case.operands, **(OPTIONS | options))[0]


def anew(case: MoLoRACase, **options: object) -> Tensor:
    """What a call gives that knows nothing of earlier ones."""
    known = dict(molora_linear_few._known)
    molora_linear_few._known.clear()
    y = output(case, **options)
    molora_linear_few._known.clear()
    molora_linear_few._known.update(known)
    return y


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False}, {"weight": False}, {"top_k": 2}, {"top_k": 1, "renormalize": True}],
    ids=str,
)
def test_a_repeated_call_changes_no_bit_and_runs_no_check(
    dtype: torch.dtype, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {name: changes[name] for name in changes if name in ("top_k", "renormalize")}
    case = case_of(dtype=dtype, **changes)
    first = output(case, **options)
    assert len(molora_linear_few._known) == 1
    monkeypatch.delattr("citi_kernels.ops.molora_linear.run_eager")
    again = output(case, **options)
    assert torch.equal(again, first)
    assert again.data_ptr() != first.data_ptr()
    assert (again.dtype, again.shape, again.stride()) == (first.dtype, first.shape, first.stride())


def test_outer_dimensions_stay() -> None:
    case = case_of(6)
    flat = output(case)
    case = replace(case, x=case.x.reshape(2, 3, 70))
    for _ in range(2):
        assert torch.equal(output(case), flat.reshape(2, 3, 50))


@pytest.mark.parametrize("name", ["weight", "bias", "a", "b", "router", "x"])
def test_values_are_read_anew(name: str) -> None:
    case = case_of()
    before = output(case)
    getattr(case, name).mul_(-2.0)
    after = output(case)
    assert not torch.equal(after, before)
    assert torch.equal(after, anew(case))


@pytest.mark.parametrize("name", ["weight", "bias", "a", "b", "router"])
def test_a_tensor_that_moved_or_lies_otherwise_is_another_call(name: str) -> None:
    case = case_of()
    before = output(case)
    tensor = getattr(case, name)
    spaced = torch.empty(*tensor.shape, 2)[..., 0].copy_(tensor)
    for other in (tensor.clone(), spaced):
        moved = replace(case, **{name: other})
        torch.testing.assert_close(output(moved), before)
        tensor.fill_(float("nan"))
        assert output(moved).isfinite().all()
        tensor.copy_(other)


def test_b_of_zeros_gives_the_linear_bitwise_and_back() -> None:
    case = case_of()
    before, b = output(case), case.b.clone()
    case.b.zero_()
    assert torch.equal(output(case), torch.nn.functional.linear(case.x, case.weight, case.bias))
    case.b.copy_(b)
    assert torch.equal(output(case), before)


def test_what_does_not_fit_is_refused_after_a_call_that_did() -> None:
    case = case_of()
    output(case)
    with pytest.raises(ValueError, match="a: want"):
        output(case, num_experts=3)
    with pytest.raises(ValueError, match="x: want"):
        molora_linear(case.x.new_zeros(()), *case.operands[1:], **OPTIONS)
    short = case.x[:, :60]
    for x in (short, short.contiguous()):
        with pytest.raises(ValueError, match="a: want shape"):
            output(replace(case, x=x))
    with pytest.raises(TypeError, match="weight: want the dtype of x"):
        output(replace(case, x=case.x.double()))


def test_other_backends_modes_and_settings_are_other_calls() -> None:
    case = case_of()
    before = output(case)
    assert not torch.equal(output(case, scaling=0.5), before)
    assert torch.equal(output(case, scaling=0.5), anew(case, scaling=0.5))
    with use_backend("torch"):
        ours = output(case)
        assert len(molora_linear_few._known) == 2
    with use_backend("reference"):
        torch.testing.assert_close(output(case), ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert output(case).dtype == torch.bfloat16
    top_1 = output(case, top_k=1)
    assert not torch.equal(top_1, before)
    ids = torch.zeros(3, dtype=torch.int64)
    _, sums = molora_linear(*case.operands, **OPTIONS, segment_ids=ids, num_segments=1)
    assert sums.shape == (1, 5)
    assert len(molora_linear_few._known) == 3


def test_dropped_experts_that_are_not_finite_stay_out_of_known_calls_too() -> None:
    case = case_of()
    y, last = output(case, top_k=1), slice(24, 32)
    case.router[4] = -case.x.mean(0) * 10  # no token's choice
    y = output(case, top_k=1)
    case.b[:, last] = float("nan")
    torch.testing.assert_close(output(case, top_k=1), y)
    case.b[:, last] = 0.5
    assert torch.equal(output(case, top_k=1), y)


def test_gradients_are_those_of_a_call_that_is_not_known() -> None:
    case = case_of()
    before = output(case)
    with torch.enable_grad():
        case.x.requires_grad_()
        y = output(case)
        assert torch.equal(y, before)
        y.sum().backward()
    assert case.x.grad.abs().sum() > 0


def test_lazily_negated_tensors_and_modes_that_look_on_take_the_other_way() -> None:
    case = case_of()
    output(case)
    negated = output(replace(case, x=torch._neg_view(case.x)))
    torch.testing.assert_close(negated, output(replace(case, x=-case.x)))
    seen = []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Looks():
        output(case)
    assert "citi.molora_linear.default" in seen


def test_many_tokens_ranks_and_dtypes_of_other_paths_are_not_kept() -> None:
    for case in (
        case_of(17),
        case_of(9, dtype=torch.bfloat16),
        case_of(dtype=torch.float64),
        random_case(3, 70, 50, parameter_dtype=torch.float64),
        case_of(0),
    ):
        output(case)
    wide = random_case(3, 70, 50, r=40)
    output(wide)
    assert molora_linear_few._known == {}


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(molora_linear_few, "_MAX_KNOWN", 2)
    cases = [case_of(num_tokens) for num_tokens in (1, 2, 3)]
    expected = [output(case) for case in cases]
    assert len(molora_linear_few._known) == 1
    assert all(torch.equal(output(case), y) for case, y in zip(cases, expected, strict=True))
