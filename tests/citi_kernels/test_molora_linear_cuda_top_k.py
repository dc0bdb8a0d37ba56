"""Top-k of the backend "cuda" on the CPU: its routing and algebra, with `grouped_in_torch` for _C.

What the kernels compute is tested in tests/csrc.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import citi_kernels
from citi_kernels import backends, compiled
from citi_kernels.ops import molora_linear_cuda_top_k as top_k_path
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Settings
from citi_kernels.ops.molora_linear_reference import choose_experts
from citi_kernels.testing import (
    Accuracy,
    MoLoRACase,
    check_molora_linear,
    embed,
    evaluate,
    poisoned_memory,
    random_case,
)
from grouped_in_torch import GroupedInTorch

NAN, INF = float("nan"), float("inf")
# T, K, N, E, r, top_k
SIZES = [
    (37, 40, 24, 4, 8, 2),
    (70, 45, 33, 3, 33, 1),
    (33, 19, 65, 2, 1, 1),
    (40, 70, 50, 64, 16, 3),
    (20, 33, 17, 8, 24, 7),
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> GroupedInTorch:
    """The path in the place of the op's backend "torch", over a stand-in for the kernels."""
    if reason := compiled.why_missing("native"):
        pytest.skip(reason)
    find, stand_in = backends.find, GroupedInTorch()

    def find_path(op: str, backend: str) -> object:
        return top_k_path if op == "molora_linear" else find(op, backend)

    monkeypatch.setattr(backends, "find", find_path)
    monkeypatch.setattr(compiled, "extension", lambda: stand_in)
    monkeypatch.setattr(compiled, "launch_place", lambda _: {"device": 0, "stream": 0})
    return stand_in


def case_of(*sizes: int, top_k: int = 2, E: int = 4, r: int = 8, **options: object) -> MoLoRACase:
    options.setdefault("dtype", torch.bfloat16)
    return random_case(*sizes, num_experts=E, r=r, top_k=top_k, device="cpu", **options)


def settings_of(case: MoLoRACase) -> Settings:
    defaults = {"renormalize": False, "segment_ids": None, "num_segments": 0, "dropout_p": 0.0}
    options = {**defaults, "dropout_seed": None, **case.options}
    return Settings(**{name: options[name] for name in Settings._fields})


def check(case: MoLoRACase) -> dict[str, Accuracy]:
    with citi_kernels.use_backend("torch"), poisoned_memory():
        return check_molora_linear(citi_kernels.molora_linear, case)


def evaluated(case: MoLoRACase) -> dict[str, Tensor]:
    with citi_kernels.use_backend("torch"), poisoned_memory():
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("T", "K", "N", "E", "r", "top_k"), SIZES)
def test_outputs_and_gradients_hold_the_accuracy_rule(
    kernels: GroupedInTorch, T: int, K: int, N: int, E: int, r: int, top_k: int, dtype: torch.dtype
) -> None:
    check(case_of(T, K, N, E=E, r=r, top_k=top_k, dtype=dtype))
    wanted = ["product"] * (1 + top_k) + ["product"] * (1 + top_k) + ["gradient"] * 2
    assert kernels.calls == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": True},
        {"dropout_p": 0.4, "dropout_seed": torch.tensor(2**40 + 7)},
        {"dropout_p": 0.4, "dropout_seed": torch.tensor(3), "weight": False, "renormalize": True},
        {"weight": False},
        {"bias": False},
        {"num_segments": None},
        {"num_segments": 1},
        {"parameter_dtype": torch.float32},
        {"weight": False, "num_segments": None, "renormalize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("top_k", [2, 5])
def test_every_option_holds_the_accuracy_rule(options: dict, top_k: int) -> None:
    check(case_of(50, 44, 36, E=6, r=8, top_k=top_k, **options))


def test_many_choices_do_not_round_many_times() -> None:
    accuracy = check(case_of(9, 20, 36, E=24, r=1, top_k=20, dtype=torch.float16))
    assert max(accuracy["y"]) < 0.5


@pytest.mark.parametrize("T", [0, 1])
def test_no_token_and_one_token_are_right(T: int) -> None:
    case = case_of(T, 24, 40, E=8, top_k=3)
    results = evaluated(case)
    assert results["y"].shape == (T, 40)
    if T == 0:
        for name in ("gate_sums", "dweight", "dbias", "da", "db", "drouter"):
            assert results[name].count_nonzero() == 0, name
    else:
        check(case)


def test_case_8_all_tokens_on_one_expert_and_others_without_any() -> None:
    case = steered(case_of(150, 24, 40, E=5, r=8, top_k=1), expert=2)
    check(case)
    results = evaluated(case)
    used = torch.arange(5 * 8) // 8 == 2
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
    rows = torch.arange(40) != 7
    for name, result in evaluated(replace(case, x=x_TK)).items():
        if name in ("y", "dx"):
            assert torch.equal(result[rows], healthy[name][rows]), name
            assert not result[7].isfinite().any(), name


def test_nan_of_a_token_in_no_segment_is_not_counted() -> None:
    case = case_of(40, 24, 20, E=4, top_k=2)
    x_TK = case.x.clone()
    x_TK[case.options["segment_ids"] == -1] = NAN
    assert torch.equal(evaluated(replace(case, x=x_TK))["gate_sums"], evaluated(case)["gate_sums"])


def test_nan_gradient_of_the_gate_sums_of_dropped_experts_is_not_seen() -> None:
    case = steered(case_of(40, 24, 20, E=4, top_k=2), expert=0)
    dgate_sums = case.dgate_sums.clone()
    dgate_sums[:, -1] = NAN
    assert_equal(evaluated(replace(case, dgate_sums=dgate_sums)), evaluated(case))


def test_renormalized_logits_of_dropped_experts_get_no_gradient_of_a_bad_token() -> None:
    case = steered(case_of(8, 24, 20, E=4, top_k=2, renormalize=True, num_segments=None), 0)
    dy = torch.full_like(case.dy, NAN)
    drouter = evaluated(replace(case, dy=dy))["drouter"]
    assert drouter[-1].count_nonzero() == 0
    assert drouter[1].isnan().all()


def test_case_10_strides_change_nothing_bitwise() -> None:
    case = case_of(30, 24, 20, E=4, top_k=2)
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


def test_case_51_zero_up_projections_leave_the_base_product_bitwise() -> None:
    case = case_of(70, 24, 20, E=4, top_k=2)
    y_TN = evaluated(replace(case, b=torch.zeros_like(case.b)))["y"]
    assert torch.equal(y_TN, F.linear(case.x, case.weight, case.bias))


@pytest.mark.parametrize("without", ["nothing", "dy", "dgate_sums"])
@pytest.mark.parametrize("has_weight", [True, False])
def test_case_23_a_gradient_is_the_same_whatever_else_is_asked_for(
    without: str, has_weight: bool
) -> None:
    case = case_of(20, 24, 18, E=4, top_k=2, weight=has_weight, bias=has_weight)
    operands, settings = Operands(*case.operands), settings_of(case)
    _, saved, _ = top_k_path.forward(operands, settings)
    dy = None if without == "dy" else case.dy
    dgate_sums = None if without == "dgate_sums" else case.dgate_sums
    possible = [name == "x" or name == "router" or dy is not None for name in Needs._fields]
    possible[1] = possible[2] = dy is not None and has_weight
    everything = top_k_path.backward(dy, dgate_sums, operands, saved, settings, Needs(*possible))
    for asked in itertools.product([False, True], repeat=len(Needs._fields)):
        needs = Needs(*(each and may for each, may in zip(asked, possible, strict=True)))
        x_TK = operands.x if needs.weight or needs.a or needs.router else None
        given = operands._replace(x=x_TK, bias=None)
        with poisoned_memory():
            gradients = top_k_path.backward(dy, dgate_sums, given, saved, settings, needs)
        for name, ours, need in zip(Needs._fields, gradients, needs, strict=True):
            assert (ours is not None) == need, name
            assert ours is None or torch.equal(ours, getattr(everything, name)), name


def routed(x_TK: Tensor, router_GK: Tensor, top_k: int) -> tuple[Tensor, top_k_path.Routing]:
    E = router_GK.shape[0] - 1
    settings = Settings(E, 1.0, top_k, False, None, 0, 0.0, None)
    saved = top_k_path.empty_saved(x_TK, x_TK.new_empty(E, 1), settings)
    saved.kept.fill_(-1)
    routing = top_k_path.routing_of(saved, settings)
    return top_k_path._route_(saved.probs, routing, x_TK, router_GK, settings), routing


@pytest.mark.parametrize("T", [0, 1, 50])
@pytest.mark.parametrize(("E", "top_k"), [(2, 1), (5, 3), (8, 7), (64, 2)])
def test_case_17_slots_ties_and_choices_are_as_defined(T: int, E: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(E)
    logits_TE = torch.randint(-1, 2, (T, E), generator=generator).float()
    logits_TE[7:8], logits_TE[8:9, ::2], logits_TE[9:10, 1] = 0.0, -0.0, NAN
    router_GK = F.pad(torch.eye(E), (0, 0, 1, 0))
    kept_TE, routing = routed(logits_TE, router_GK, top_k)
    wanted = choose_experts(F.linear(logits_TE, router_GK), top_k)
    assert torch.equal(kept_TE, wanted)
    pairs_S, order_S = routing.pairs.flatten().long(), routing.order.long()
    assert torch.equal(order_S, pairs_S.argsort(stable=True))
    for pair in range(top_k * E):
        start, end = routing.offsets[pair : pair + 2].tolist()
        assert torch.equal(order_S[start:end], (pairs_S == pair).nonzero()[:, 0])
    choices = torch.arange(top_k, dtype=torch.int32)[:, None].expand(top_k, T)
    assert torch.equal(routing.pairs % top_k, choices)
    assert torch.equal(F.one_hot((routing.pairs // top_k).long(), E).sum(0).bool(), kept_TE)


@pytest.mark.parametrize("options", [{}, {"renormalize": True}, {"num_segments": None}], ids=str)
def test_nothing_on_the_device_is_read_by_the_host(
    monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    """Tensors without values refuse an `item`, a `nonzero` or a mask that picks rows."""
    case = case_of(12, 24, 20, E=4, top_k=2, **options)
    monkeypatch.setattr(top_k_path, "_multiply_", lambda *_, **__: None)
    with FakeTensorMode() as mode:
        operands = Operands(*(mode.from_tensor(each) for each in case.operands))
        settings = settings_of(case)
        dgate_sums = None
        if settings.segment_ids is not None:
            settings = settings._replace(segment_ids=mode.from_tensor(settings.segment_ids))
            dgate_sums = mode.from_tensor(case.dgate_sums)
        _, saved, _ = top_k_path.forward(operands, settings)
        dy, needs = mode.from_tensor(case.dy), Needs(True, True, True, False, False, True)
        gradients = top_k_path.backward(dy, dgate_sums, operands, saved, settings, needs)
    assert gradients.x.shape == case.x.shape


def test_another_dtype_is_refused() -> None:
    assert top_k_path.refuses(torch.ones(1, dtype=torch.bfloat16)) is None
    assert "bf16 and fp16" in top_k_path.refuses(torch.ones(1))
