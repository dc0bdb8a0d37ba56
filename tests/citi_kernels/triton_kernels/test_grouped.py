"""Top-k on Triton: routing bitwise as defined, values by the accuracy rule, every edge of tiles."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import citi_kernels
from citi_kernels.ops import molora_linear_top_k as grouped
from citi_kernels.ops import molora_linear_triton
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Saved, Settings
from citi_kernels.ops.molora_linear_reference import choose_experts, sum_over_segments
from citi_kernels.testing import (
    Accuracy,
    MoLoRACase,
    check_molora_linear,
    embed,
    evaluate,
    poisoned_memory,
    random_case,
)
from citi_kernels.triton_kernels.gate_sums import gate_sums
from citi_kernels.triton_kernels.grouped_tiles import max_tiles
from citi_kernels.triton_kernels.top_k_route import top_k_route_
from under_test import DEVICE

NAN, INF = float("nan"), float("inf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALL_NEEDS = Needs(True, True, True, True, True, True)
# T, K, N, E, r, top_k
SIZES = [
    (37, 40, 24, 4, 8, 2),
    (70, 45, 33, 3, 33, 1),
    (33, 19, 65, 2, 1, 1),
    (66, 130, 131, 8, 24, 7),
    (65, 64, 128, 16, 2, 5),
    (40, 70, 50, 64, 64, 2),
    (20, 33, 17, 5, 100, 3),
]


@pytest.fixture(autouse=True)
def _grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """These cases are small; left to choose, the backend would take the dense path for them."""
    monkeypatch.setattr(molora_linear_triton, "path", lambda *_: "grouped")


def case_of(*sizes: int, top_k: int = 2, E: int = 4, r: int = 8, **options: object) -> MoLoRACase:
    return random_case(*sizes, num_experts=E, r=r, top_k=top_k, device=DEVICE, **options)


def settings_of(case: MoLoRACase) -> Settings:
    defaults = {"renormalize": False, "segment_ids": None, "num_segments": 0, "dropout_p": 0.0}
    options = {**defaults, "dropout_seed": None, **case.options}
    return Settings(**{name: options[name] for name in Settings._fields})


def check(case: MoLoRACase) -> dict[str, Accuracy]:
    with citi_kernels.use_backend("triton"), poisoned_memory():
        return check_molora_linear(citi_kernels.molora_linear, case)


def evaluated(case: MoLoRACase) -> dict[str, Tensor]:
    with citi_kernels.use_backend("triton"), poisoned_memory():
        return evaluate(citi_kernels.molora_linear, case)


def steered(case: MoLoRACase, expert: int) -> MoLoRACase:
    """The case with one expert far ahead of all for every token, and the last far behind."""
    x_TK, router_GK = case.x.clone(), case.router.clone()
    x_TK[:, 0] = 4.0
    router_GK[:, 0] = 0.0
    router_GK[1 + expert, 0], router_GK[-1, 0] = 3.0, -3.0
    return replace(case, x=x_TK, router=router_GK)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        both_nan = result.isnan() & theirs[name].isnan()
        assert ((result == theirs[name]) | both_nan).all(), name


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("T", "K", "N", "E", "r", "top_k"), SIZES)
def test_outputs_and_gradients_hold_the_accuracy_rule(
    T: int, K: int, N: int, E: int, r: int, top_k: int, dtype: torch.dtype
) -> None:
    check(case_of(T, K, N, E=E, r=r, top_k=top_k, dtype=dtype))


@pytest.mark.parametrize("top_k", range(1, 6))
def test_every_number_of_choices_is_right(top_k: int) -> None:
    check(case_of(35, 24, 20, E=6, r=4, top_k=top_k, dtype=torch.bfloat16))


def test_many_choices_do_not_round_many_times() -> None:
    accuracy = check(case_of(9, 20, 36, E=24, r=1, top_k=20, dtype=torch.float16))
    assert max(accuracy["y"]) < 0.5  # 0.96 with a rounding per choice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_rank_beyond_one_tile_is_right(dtype: torch.dtype) -> None:
    check(case_of(17, 20, 18, E=3, r=300, dtype=dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": True},
        {"dropout_p": 0.4, "dropout_seed": torch.tensor(2**40 + 7, device="cpu")},
        {"weight": False},
        {"bias": False},
        {"num_segments": None},
        {"num_segments": 1},
        {"parameter_dtype": torch.float32},
        {"weight": False, "num_segments": None, "renormalize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_option_holds_the_accuracy_rule(options: dict, dtype: torch.dtype) -> None:
    check(case_of(50, 44, 36, E=5, r=8, top_k=3, dtype=dtype, **options))


@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one_token_are_right(T: int) -> None:
    case = case_of(T, 24, 40, E=8, top_k=3, dtype=torch.bfloat16)
    results = evaluated(case)
    assert results["y"].shape == (T, 40)
    if T == 0:
        for name in ("gate_sums", "dweight", "dbias", "da", "db", "drouter"):
            assert results[name].count_nonzero() == 0, name
    else:
        check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_case_8_all_tokens_on_one_expert_and_others_without_any(dtype: torch.dtype) -> None:
    case = steered(case_of(150, 24, 40, E=5, r=8, top_k=1, dtype=dtype), expert=2)
    check(case)
    results = evaluated(case)
    used = torch.arange(5 * 8, device=DEVICE) // 8 == 2
    assert results["da"][~used].count_nonzero() == 0
    assert results["db"][:, ~used].count_nonzero() == 0
    assert results["da"][used].count_nonzero() > 0


@pytest.mark.parametrize("name", ["a", "b"])
def test_case_11_nan_of_a_dropped_expert_reaches_no_token(name: str) -> None:
    case = steered(case_of(40, 24, 20, E=4, r=8, top_k=2), expert=0)
    healthy = evaluated(case)
    tensor = getattr(case, name).clone()
    dropped = tensor[-8:] if name == "a" else tensor[:, -8:]
    dropped.fill_(NAN)
    assert_equal(evaluated(replace(case, **{name: tensor})), healthy)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("renormalize", [False, True])
def test_case_11_a_row_that_is_not_finite_stays_in_its_row(value: float, renormalize: bool) -> None:
    case = case_of(40, 24, 20, E=4, top_k=2, renormalize=renormalize, num_segments=None)
    healthy = evaluated(case)
    x_TK = case.x.clone()
    x_TK[7, 3] = value
    rows = torch.arange(40, device=DEVICE) != 7
    for name, result in evaluated(replace(case, x=x_TK)).items():
        if name in ("y", "dx"):
            assert torch.equal(result[rows], healthy[name][rows]), name
            assert not result[7].isfinite().any(), name


def test_case_11_a_gradient_that_is_not_finite_stays_in_its_row() -> None:
    case = case_of(40, 24, 20, E=4, top_k=2)
    healthy = evaluated(case)["dx"]
    dy = case.dy.clone()
    dy[7, 3] = NAN
    ours = evaluated(replace(case, dy=dy))["dx"]
    rows = torch.arange(40, device=DEVICE) != 7
    assert torch.equal(ours[rows], healthy[rows])
    assert ours[7].isnan().all()


def test_nan_of_a_token_in_no_segment_is_not_counted() -> None:
    case = case_of(40, 24, 20, E=4, top_k=2)
    x_TK = case.x.clone()
    x_TK[case.options["segment_ids"] == -1] = NAN
    assert torch.equal(evaluated(replace(case, x=x_TK))["gate_sums"], evaluated(case)["gate_sums"])


@pytest.mark.parametrize("num_segments", [0, 1, 3, 300])
def test_gate_sums_in_many_shares_are_those_of_the_definition(num_segments: int) -> None:
    generator = torch.Generator("cpu").manual_seed(1)
    gate_TG = torch.rand(100, 129, generator=generator, device="cpu").to(DEVICE)
    ids_T = torch.randint(-1, max(num_segments, 1), (100,), generator=generator, device="cpu")
    ids_T = ids_T.clamp(max=num_segments - 1).to(DEVICE)
    settings = Settings(128, 1.0, 2, False, ids_T, num_segments, 0.0, None)
    with poisoned_memory():
        ours = gate_sums(gate_TG, settings)
    truth = sum_over_segments(gate_TG.double(), ids_T, num_segments)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)


def test_renormalized_logits_of_dropped_experts_get_no_gradient_of_a_bad_token() -> None:
    case = steered(case_of(8, 24, 20, E=4, top_k=2, renormalize=True, num_segments=None), 0)
    dy = torch.full_like(case.dy, NAN)
    drouter = evaluated(replace(case, dy=dy))["drouter"]
    assert drouter[-1].count_nonzero() == 0
    assert drouter[1].isnan().all()


def test_case_10_strides_change_nothing_bitwise() -> None:
    case = case_of(30, 24, 20, E=4, top_k=2, dtype=torch.bfloat16)
    strided = replace(
        case,
        **{name: embed(getattr(case, name)).view for name in ("x", "dy")},
        **{name: getattr(case, name).T.contiguous().T for name in ("a", "b", "router")},
    )
    assert_equal(evaluated(strided), evaluated(case))
    dy = case.dy[:1].expand(30, 20)
    assert_equal(evaluated(replace(case, dy=dy)), evaluated(replace(case, dy=dy.contiguous())))


def test_case_13_inputs_stay_as_they_are_and_nothing_around_them_is_written() -> None:
    case = case_of(30, 24, 20, E=4, top_k=2)
    names = ("x", "a", "b", "router", "dy", "dgate_sums")
    guarded = {name: embed(getattr(case, name), guard=3.0) for name in names}
    evaluated(replace(case, **{name: each.view for name, each in guarded.items()}))
    for name, each in guarded.items():
        assert each.is_intact(), name
        assert torch.equal(each.view, getattr(case, name)), name


def test_case_15_repeats_are_bitwise_equal() -> None:
    case = case_of(70, 24, 20, E=4, top_k=3, dtype=torch.bfloat16)
    first = evaluated(case)
    for _ in range(3):
        assert_equal(evaluated(case), first)


def test_case_16_a_token_does_not_depend_on_its_neighbours() -> None:
    case = case_of(70, 24, 20, E=4, top_k=2, num_segments=None, weight=False)
    whole = evaluated(case)
    part = evaluated(replace(case, x=case.x[11:29], dy=case.dy[11:29]))
    for name in ("y", "dx"):
        assert torch.equal(part[name], whole[name][11:29]), name


def test_case_51_zero_up_projections_leave_the_base_product_bitwise() -> None:
    case = case_of(70, 24, 20, E=4, top_k=2, dtype=torch.bfloat16)
    y_TN = evaluated(replace(case, b=torch.zeros_like(case.b)))["y"]
    assert torch.equal(y_TN, F.linear(case.x, case.weight, case.bias))


@pytest.mark.parametrize("without", ["nothing", "dy", "dgate_sums"])
@pytest.mark.parametrize("has_weight", [True, False])
def test_case_23_a_gradient_is_the_same_whatever_else_is_asked_for(
    without: str, has_weight: bool
) -> None:
    case = case_of(20, 24, 18, E=4, top_k=2, weight=has_weight, bias=has_weight)
    operands, settings = Operands(*case.operands), settings_of(case)
    _, saved, _ = grouped.forward(operands, settings)
    dy = None if without == "dy" else case.dy
    dgate_sums = None if without == "dgate_sums" else case.dgate_sums
    possible = [name == "x" or name == "router" or dy is not None for name in Needs._fields]
    possible[1] = possible[2] = dy is not None and has_weight
    everything = grouped.backward(dy, dgate_sums, operands, saved, settings, Needs(*possible))
    for asked in itertools.product([False, True], repeat=len(Needs._fields)):
        needs = Needs(*(each and may for each, may in zip(asked, possible, strict=True)))
        x_TK = operands.x if needs.weight or needs.a or needs.router else None
        given = operands._replace(x=x_TK, bias=None)
        with poisoned_memory():
            gradients = grouped.backward(dy, dgate_sums, given, saved, settings, needs)
        for name, ours, need in zip(Needs._fields, gradients, needs, strict=True):
            assert (ours is not None) == need, name
            assert ours is None or torch.equal(ours, getattr(everything, name)), name


def test_no_gradient_of_the_output_leaves_that_of_the_gate_sums() -> None:
    case = case_of(20, 24, 18, E=4, top_k=2)
    operands = [each.requires_grad_() for each in (case.x, case.router)]

    def gradients(backend: str) -> tuple[Tensor, ...]:
        with citi_kernels.use_backend(backend):
            _, gate_sums = citi_kernels.molora_linear(*case.operands, **case.options)
        return torch.autograd.grad(gate_sums, operands, case.dgate_sums)

    for ours, theirs in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def routed(x_TK: Tensor, router_GK: Tensor, top_k: int) -> grouped.Routing:
    E = router_GK.shape[0] - 1
    settings = Settings(E, 1.0, top_k, False, None, 0, 0.0, None)
    saved = grouped.empty_saved(x_TK, x_TK.new_empty(E, 1), settings)
    saved.kept.fill_(-1)
    routing = grouped.routing_of(saved, settings)
    top_k_route_(saved.probs, routing, x_TK, router_GK, settings)
    return routing


def kept_by(x_TK: Tensor, router_GK: Tensor, top_k: int) -> Tensor:
    """Kept (T, E); every choice in one slot, sorted stably, and the experts of a token distinct."""
    routing, T, E = routed(x_TK, router_GK, top_k), x_TK.shape[0], router_GK.shape[0] - 1
    pairs_S, order_S = routing.pairs.flatten().long(), routing.order.long()
    assert torch.equal(order_S, pairs_S.argsort(stable=True))
    for pair in range(top_k * E):
        start, end = routing.offsets[pair : pair + 2].tolist()
        assert torch.equal(order_S[start:end], (pairs_S == pair).nonzero()[:, 0])
    choices_CT = routing.pairs % top_k
    assert torch.equal(choices_CT, torch.arange(top_k, device=DEVICE)[:, None].expand(top_k, T))
    kept_TE = F.one_hot((routing.pairs // top_k).long(), E).sum(0)
    assert kept_TE.max() <= 1
    return kept_TE.bool()


def kept_of_logits(logits_TE: Tensor, top_k: int) -> Tensor:
    """x is the logits, and the router reads them off."""
    router_GK = F.pad(torch.eye(logits_TE.shape[1], device=DEVICE), (0, 0, 1, 0))
    return kept_by(logits_TE, router_GK, top_k)


@pytest.mark.parametrize(("E", "top_k"), [(2, 1), (5, 3), (8, 7), (17, 2)])
def test_case_17_experts_and_ties_are_chosen_as_defined(E: int, top_k: int) -> None:
    generator = torch.Generator("cpu").manual_seed(E)
    draws = torch.randint(-1, 2, (50, E), generator=generator, device="cpu")
    logits_TE = draws.float().to(DEVICE)
    logits_TE[7] = logits_TE[9] = 0.0
    logits_TE[8, ::2] = -0.0
    kept_TE = kept_of_logits(logits_TE, top_k)
    assert torch.equal(kept_TE, choose_experts(F.pad(logits_TE, (1, 0)), top_k))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_token_that_is_not_finite_still_keeps_distinct_experts(value: float) -> None:
    logits_TE = torch.randn(40, 6, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    logits_TE[3], logits_TE[5, 2] = value, value
    assert (kept_of_logits(logits_TE.to(DEVICE), 4).sum(1) == 4).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_counts_as_the_largest_logit(sign: float) -> None:
    x_TK = torch.randn(20, 6, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    case = case_of(20, 6, 5, E=6, r=2, top_k=2)
    router_GK = case.router.clone()
    router_GK[3] = torch.tensor(NAN, device=DEVICE).copysign(torch.tensor(sign, device=DEVICE))
    kept_TE = kept_by(x_TK.to(DEVICE), router_GK, 2)
    assert kept_TE[:, 2].all()


def test_saved_kept_determines_the_routing_of_the_backward() -> None:
    case = case_of(20, 24, 18, E=4, top_k=2)
    operands, settings = Operands(*case.operands), settings_of(case)
    _, saved, _ = grouped.forward(operands, settings)
    needs = ALL_NEEDS._replace(router=False)
    ours = grouped.backward(case.dy, case.dgate_sums, operands, saved, settings, needs)
    copies = Saved(*(each.clone() for each in saved))
    elsewhere = operands._replace(router=torch.zeros_like(case.router), weight=None)
    theirs = grouped.backward(case.dy, None, elsewhere, copies, settings, needs._replace(x=False))
    assert torch.equal(ours.a, theirs.a)
    assert torch.equal(ours.b, theirs.b)


def test_grids_hold_every_tile_there_can_be() -> None:
    for block in (1, 16, 64):
        for counts in ([0, 0, 5], [1, 1, 1], [64, 65, 63], [0, 0, 0], [129, 0, 1], [7] * 40):
            tiles = sum(-(-count // block) for count in counts)
            assert tiles <= max_tiles(sum(counts), len(counts), block)
