"""Peers that come as packages for a GPU, on stand-ins of what these packages offer."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from citi.benchmark import models, routing, training
from citi.benchmark.group import Settings
from citi.benchmark.layer import Shape
from citi.benchmark.models import Size, loss_of, random_batch, random_model
from citi.benchmark.peers import liger, scattermoe_experts
from citi_kernels import molora_linear_ref
from citi_kernels.testing import random_case

PEERS = {"liger_kernel": liger, "scattermoe": scattermoe_experts}
REPLACED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """A module of this name, as `import` and `find_spec` see an installed one."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("package", PEERS)
def test_a_package_is_asked_for_a_gpu_first_and_then_whether_it_is_there(
    monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    peer = PEERS[package]
    monkeypatch.setitem(sys.modules, package, None)
    assert peer.why_not("cpu") == "needs a GPU"
    assert peer.why_not("cuda") == f"{package} is not installed: {peer.INSTALL}"
    assert peer.INSTALL.startswith("pip install ")
    install(monkeypatch, package)
    assert peer.why_not("cpu") == "needs a GPU"
    assert peer.why_not("cuda") is None


@pytest.mark.parametrize(
    ("suite", "row", "package"),
    [
        (routing.top_k_suite, "ScatterMoE", "scattermoe"),
        (training.training_suite, "PEFT LoRA + Liger", "liger_kernel"),
    ],
)
def test_a_row_that_cannot_run_is_listed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, suite: Callable, row: str, package: str
) -> None:
    def skipped(device: str) -> str | None:
        group = next(suite(Settings(device=device, dtypes=("fp32",), is_quick=True)))
        assert row in group.stands_for
        return group.skipped.get(row)

    monkeypatch.setitem(sys.modules, package, None)
    assert skipped("cpu") == "needs a GPU"
    assert skipped("cuda") == f"{package} is not installed: {PEERS[package].INSTALL}"
    install(monkeypatch, package)
    assert skipped("cuda") is None


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert of each choice in order, where it stood, and where each expert ends."""
    expert_S, order_S = expert_idxs.flatten().sort()
    return expert_S, order_S, expert_S.bincount(minlength=num_experts).cumsum(0)


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """A product for each choice; rows in the order of experts where they are "grouped"."""
    num_experts, num_in, num_out = expert_weights.shape
    assert len(expert_offsets) == num_experts
    assert inputs.shape == (len(sorted_expert_idxs) // k, num_in)
    assert expert_biases is None
    rows_SK = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    y_SN = torch.einsum("sk,skn->sn", rows_SK, expert_weights[sorted_expert_idxs])
    if not grouped_out:
        y_SN = y_SN[sorted_scattered_idxs.argsort()]
    if gates is None:
        return y_SN
    assert gates.dtype == inputs.dtype
    return torch.einsum("tc,tcn->tn", gates, y_SN.view(*gates.shape, num_out))


def test_scattermoe_experts_compute_molora_with_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def recorded(inputs: Tensor, expert_weights: Tensor, *rest: object, **options: object):
        shapes.append((tuple(inputs.shape), tuple(expert_weights.shape), options.keys()))
        return parallel_linear(inputs, expert_weights, *rest, **options)

    install(
        monkeypatch, "scattermoe", flatten_sort_count=flatten_sort_count, parallel_linear=recorded
    )
    case = random_case(40, 24, 16, num_experts=4, r=8, top_k=2, bias=False, num_segments=None)
    x, weight, _, a, b, router = case.operands

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in (x, weight, a, b, router)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves[:1] + leaves[2:], case.dy)]

    def truth(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return molora_linear_ref(x, weight, None, *rest, **case.options)[0]

    found = results(lambda *each: scattermoe_experts.scattermoe_experts(*each, **case.options))
    for ours, wanted in zip(found, results(truth), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert shapes == [
        ((40, 24), (4, 24, 8), {"grouped_out"}),
        ((80, 8), (4, 8, 16), {"gates", "grouped_in"}),
    ]


def test_a_row_of_scattermoe_is_timed_with_its_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear}
    install(monkeypatch, "scattermoe", **functions)
    row = routing._make_top_k((Shape(32, 32, 24), 4, 8), "fp32", "cpu", ())["ScatterMoE"]
    y = row.forward()
    assert y.shape == (32, 24)
    row.backward(y)


class Counted:
    """A stand-in of `liger_kernel.transformers`: transformers' own functions, counted."""

    def __init__(self) -> None:
        self.rotary = self.forward = 0

    def apply_liger_kernel_to_llama(
        self, rope: bool = True, rms_norm: bool = True, swiglu: bool = True, *, model: nn.Module
    ) -> None:
        assert (rope, rms_norm, swiglu) == (True, True, True)
        rotate, run = modeling_llama.apply_rotary_pos_emb, type(model).forward

        def rotary(*arguments: object, **options: object) -> object:
            self.rotary += 1
            return rotate(*arguments, **options)

        def forward(model: nn.Module, *arguments: object, **options: object) -> object:
            self.forward += 1
            return run(model, *arguments, **options)

        modeling_llama.apply_rotary_pos_emb = rotary
        modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = nn.Identity
        model.forward = MethodType(forward, model)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    stand_in = Counted()
    install(monkeypatch, "liger_kernel")
    install(
        monkeypatch,
        "liger_kernel.transformers",
        apply_liger_kernel_to_llama=stand_in.apply_liger_kernel_to_llama,
    )
    monkeypatch.setitem(models.SIZES, "mini", Size(128, 32, 48, 2, 2, 1, True))
    return stand_in


def of_transformers() -> list[object]:
    return [getattr(modeling_llama, name) for name in REPLACED]


def test_liger_reaches_its_model_alone(counted: Counted) -> None:
    originals = of_transformers()
    model, batch = random_model("mini", torch.float32, "cpu"), random_batch("mini", (2, 8), "cpu")
    untouched = copy.deepcopy(model)
    adapted = training.lora_model(liger.liger(model)).train()
    assert of_transformers() == originals

    loss = loss_of(adapted, batch)
    loss.backward()
    assert of_transformers() == originals
    assert (counted.forward, counted.rotary) == (1, 2), "one model of two layers"

    torch.testing.assert_close(loss_of(untouched, batch), loss)
    assert (counted.forward, counted.rotary) == (1, 2)
    assert all(
        each.grad is not None for name, each in adapted.named_parameters() if "lora_" in name
    )


def test_liger_leaves_transformers_as_it_was_when_a_forward_fails(counted: Counted) -> None:
    originals = of_transformers()
    model = liger.liger(random_model("mini", torch.float32, "cpu"))
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1000]]))
    assert of_transformers() == originals


def test_a_row_on_liger_is_a_training_step(
    monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    monkeypatch.setattr(liger, "why_not", lambda device: None)
    rows = training._make_steps("mini", (2, 8), "fp32", Settings(device="cpu"))
    before = counted.forward
    row = rows["PEFT LoRA + Liger"]
    row.backward(row.forward())
    rows["PEFT LoRA"].forward()
    assert counted.forward == before + 1
