"""The backend "native" of `molora_linear`: when its kernels run, and what does not change a bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from citi_kernels import compiled, environment, molora_linear, use_backend
from citi_kernels.ops import molora_linear_native
from citi_kernels.tensor_memory import TensorMemory
from citi_kernels.testing import MoLoRACase, check_molora_linear, evaluate, random_case

pytestmark = pytest.mark.skipif(
    compiled.why_missing("native") is not None, reason="the extension is not built"
)
SEED = torch.tensor(7, device="cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    threads = torch.get_num_threads()
    with use_backend("native"):
        yield
    torch.set_num_threads(threads)
    compiled.extension().use_cpu_variant(environment.CPU_FEATURES)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@each_dtype
def test_every_variant_of_this_cpu_holds_the_rule(dtype: torch.dtype) -> None:
    extension = compiled.extension()
    for variant in extension.cpu_features:
        extension.use_cpu_variant(variant)
        few = ((1, 700, 90), {}), ((8, 130, 1300), {}), ((5, 9, 300), {"num_experts": 3, "r": 5})
        few = *few, ((16, 300, 90), {}), ((9, 70, 130), {"num_experts": 3, "r": 5})
        for shape, sizes in (((67, 150, 211), {}), *few):
            case = random_case(*shape, dtype=dtype, parameter_dtype=torch.float32, **sizes)
            check_molora_linear(molora_linear, case)


@each_dtype
@pytest.mark.parametrize(
    ("num_tokens", "weight"), [(3, False), (3, True), (12, True), (150, False)]
)
def test_neither_threads_nor_repeats_change_a_bit(
    dtype: torch.dtype, num_tokens: int, weight: bool
) -> None:
    case = random_case(num_tokens, 320, 400, dtype=dtype, weight=weight)
    results = []
    for num_threads in (1, 2, 3, 2):
        torch.set_num_threads(num_threads)
        results.append(evaluate(molora_linear, case))
    for other in results[1:]:
        assert_same(other, results[0])


@each_dtype
@pytest.mark.parametrize(("num_tokens", "weight"), [(3, False), (3, True), (12, True), (40, False)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_without_a_gradient_nothing_is_kept_and_no_bit_changes(
    dtype: torch.dtype, num_tokens: int, weight: bool, dropout_p: float
) -> None:
    case = random_case(num_tokens, 70, 50, dtype=dtype, weight=weight)
    options = case.options | {"dropout_p": dropout_p, "dropout_seed": SEED}
    case.a.requires_grad_()
    y, sums = molora_linear(*case.operands, **options)
    with torch.no_grad():
        assert all(map(torch.equal, molora_linear(*case.operands, **options), (y, sums)))
        options |= {"segment_ids": None, "num_segments": None}
        with TensorMemory() as memory:
            alone, _ = molora_linear(*case.operands, **options)
    assert torch.equal(alone, y)
    if num_tokens == 3 and dropout_p == 0:
        assert memory.allocations == [y.nbytes], "h, gates or a workspace"


@each_dtype
def test_few_tokens_read_weight_where_it_lies_once_b_is_not_zero(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    library_calls = []

    def linear(*operands: Tensor | None) -> Tensor:
        library_calls.append(operands)
        return F.linear(*operands)

    monkeypatch.setattr(molora_linear_native, "F", SimpleNamespace(linear=linear, pad=F.pad))

    def asks_the_library(case: MoLoRACase, **changed: Tensor | None) -> bool:
        library_calls.clear()
        check_molora_linear(molora_linear, replace(case, **changed))
        return bool(library_calls)

    few = random_case(molora_linear_native.MAX_FEW_TOKENS[dtype], 50, 37, dtype=dtype)
    assert not asks_the_library(few)
    assert not asks_the_library(few, bias=None)
    rows_apart = torch.cat([few.weight, few.weight], 1)[:, :50]
    assert not asks_the_library(few, weight=rows_apart)
    assert asks_the_library(few, weight=few.weight.T.contiguous().T)
    assert asks_the_library(few, bias=few.bias.repeat_interleave(2)[::2])
    assert asks_the_library(few, b=torch.zeros_like(few.b))
    last_alone = torch.zeros_like(few.b)
    last_alone[-1, -1] = 1
    assert not asks_the_library(few, b=last_alone)
    dropout = random_case(3, 50, 37, dtype=dtype, dropout_p=0.3, dropout_seed=SEED)
    assert asks_the_library(dropout)
    assert asks_the_library(random_case(few.x.shape[0] + 1, 50, 37, dtype=dtype))


@each_dtype
def test_case_51_few_tokens_of_a_fresh_layer_are_the_linears_bitwise(dtype: torch.dtype) -> None:
    case = random_case(1, 576, 192, dtype=dtype, num_segments=None)
    options = case.options
    for x in (case.x, case.x.expand(5, -1), case.x.expand(11, -1)):
        base = F.linear(x, case.weight, case.bias)
        operands = (x, case.weight, case.bias, case.a)
        fresh, _ = molora_linear(*operands, torch.zeros_like(case.b), case.router, **options)
        assert torch.equal(fresh, base)
        trained, _ = molora_linear(*operands, case.b, case.router, **options)
        assert not torch.equal(trained, base)


@each_dtype
@pytest.mark.parametrize("parameter_dtype", [torch.float16, torch.float64])
def test_parameters_of_other_dtypes_are_rounded_as_the_others_are(
    dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    case = random_case(33, 40, 24, dtype=dtype, parameter_dtype=parameter_dtype)
    check_molora_linear(molora_linear, case)
    rounded = {
        name: getattr(case, name).to(dtype).to(torch.float32) for name in ("a", "b", "router")
    }
    ours, expected = (
        evaluate(molora_linear, case),
        evaluate(molora_linear, replace(case, **rounded)),
    )
    for name in expected:
        assert torch.equal(ours[name], expected[name].to(ours[name].dtype)), name
    assert ours["da"].dtype == parameter_dtype


@pytest.mark.parametrize("sizes", [(0, 16, 12), (5, 0, 12), (5, 16, 0)], ids=["T", "K", "N"])
@each_dtype
def test_a_dimension_of_0_gives_what_is_left_of_the_formula(
    dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    case = random_case(*sizes, dtype=dtype) if sizes[1] else _without_features(dtype)
    ours = evaluate(molora_linear, case)
    with use_backend("torch"):
        expected = evaluate(molora_linear, case)
    assert ours.keys() == expected.keys()
    # the torch backend rounds logits to bf16
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=tolerance, atol=tolerance)


def _without_features(dtype: torch.dtype):
    case = random_case(5, 1, 12, dtype=dtype)
    return replace(case, **{n: getattr(case, n)[:, :0] for n in ("x", "weight", "a", "router")})


def test_the_kernels_run_up_to_a_rank() -> None:
    path, most = molora_linear_native.path, molora_linear_native.MAX_STACKED_RANK
    assert most <= compiled.extension().molora_max_stacked_rank
    assert path(32, torch.bfloat16) == path(most, torch.float32) == "fused"
    others = (most + 1, torch.bfloat16), (32, torch.float16), (32, torch.float64)
    assert {path(*each) for each in others} == {"library"}


@pytest.mark.parametrize("options", [{}, {"renormalize": True}], ids=["kept", "renormalized"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("num_tokens", [2, 11, 40])
@each_dtype
def test_what_is_not_finite_reaches_the_tokens_that_keep_its_expert_alone(
    dtype: torch.dtype, num_tokens: int, name: str, value: float, options: dict
) -> None:
    case = random_case(num_tokens, 40, 24, dtype=dtype, top_k=1, num_segments=1, **options)
    case.x[1] = -case.x[0]  # which keep different experts
    expert = F.linear(case.x[0].float(), case.router.float())[1:].argmax()
    broken = replace(case, **{name: getattr(case, name).clone()})
    row = 8 * expert
    getattr(broken, name)[(row, 3) if name == "a" else (3, row)] = value
    clean, ours = evaluate(molora_linear, case), evaluate(molora_linear, broken)
    with torch.no_grad():
        y, _ = molora_linear(*broken.operands, **broken.options)
    with use_backend("torch"):
        expected = evaluate(molora_linear, broken)
    for each in ("y", "dx", "da", "db", "drouter"):
        assert torch.equal(ours[each].isfinite(), expected[each].isfinite()), each
    is_reached_T = ~ours["y"].isfinite().all(1)
    assert 0 < is_reached_T.sum() < num_tokens
    for each in ("y", "dx"):
        # the experts are computed one by one then
        torch.testing.assert_close(
            ours[each][~is_reached_T], clean[each][~is_reached_T], rtol=2e-2, atol=2e-2
        )
    torch.testing.assert_close(y, ours["y"], equal_nan=True)


def test_a_number_that_rounding_makes_infinite_is_not_finite() -> None:
    case = random_case(12, 40, 24, dtype=torch.bfloat16, parameter_dtype=torch.float32, top_k=1)
    wide = random_case(12, 40, 24, parameter_dtype=torch.float64, top_k=1)
    for each, large in ((case, 3.4e38), (wide, 1e300)):
        each.b[0, 8] = large
        y, _ = molora_linear(*each.operands, **each.options)
        assert 0 < y[:, 0].isfinite().sum() < 12
        assert y[:, 1:].isfinite().all()
    fine = random_case(12, 40, 24, top_k=1)
    fine.b[0, 8] = 3.4e38  # a number in fp32
    assert evaluate(molora_linear, fine)["y"][:, 1:].isfinite().all()


@pytest.mark.parametrize("r", [16, 32, 33])
def test_ranks_around_the_limit_hold_the_rule(r: int) -> None:
    check_molora_linear(molora_linear, random_case(37, 70, 53, num_experts=4, r=r))


def test_a_lazily_negated_tensor_is_no_place_for_the_kernels() -> None:
    negated = torch.complex(torch.ones(2, 3), torch.ones(2, 3)).conj().imag
    with pytest.raises(AssertionError):
        compiled.matrix(negated)
    assert compiled.matrix(negated.resolve_neg())
