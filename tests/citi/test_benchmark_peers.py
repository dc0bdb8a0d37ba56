"""The peers compute what they stand for, so that a time beside theirs means something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from citi.benchmark.peers.addmm_lora import addmm_lora
from citi.benchmark.peers.einsum_experts import einsum_experts
from citi.benchmark.peers.expert_loop import expert_loop
from citi.benchmark.peers.grouped_experts import grouped_experts, why_not
from citi.benchmark.peers.peft_lora import peft_lora
from citi_kernels import molora_linear_ref
from citi_kernels.testing import MoLoRACase, random_case


def case_of(**options: object) -> MoLoRACase:
    return random_case(40, 24, 16, bias=False, num_segments=None, **options)


def results(function: Callable[..., Tensor], operands: list[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of all operands but the weight, the second."""
    leaves = [each.detach().requires_grad_() for each in operands]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves[:1] + leaves[2:], dy)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peer", [expert_loop, einsum_experts])
def test_dense_peers_compute_molora(peer: Callable[..., Tensor]) -> None:
    case = case_of()
    x, weight, _, a, b, router = case.operands
    found = results(lambda *each: peer(*each, **case.options), [x, weight, a, b, router], case.dy)

    def truth(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return molora_linear_ref(x, weight, None, *rest, **case.options)[0]

    assert_same(found, results(truth, [x, weight, a, b, router], case.dy))


def test_grouped_experts_compute_molora_with_top_k() -> None:
    if reason := why_not():
        pytest.skip(reason)
    case = case_of(num_experts=4, r=8, top_k=2)
    x, weight, _, a, b, router = case.operands
    found = results(
        lambda *each: grouped_experts(*each, **case.options), [x, weight, a, b, router], case.dy
    )

    def truth(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return molora_linear_ref(x, weight, None, *rest, **case.options)[0]

    assert_same(found, results(truth, [x, weight, a, b, router], case.dy))


def test_the_loop_drops_a_share_of_each_experts_input_and_keeps_its_mean() -> None:
    case = case_of()
    x, weight, _, a, b, router = case.operands
    torch.manual_seed(0)
    draws = torch.stack(
        [expert_loop(x, weight, a, b, router, **case.options, dropout_p=0.5) for _ in range(2000)]
    )
    without = expert_loop(x, weight, a, b, router, **case.options)
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - without).abs() < 5 * error).all()


def test_addmm_lora_is_one_lora() -> None:
    case = case_of()
    x, weight, _, a, b, _ = case.operands
    found = results(lambda *each: addmm_lora(*each, scaling=0.5), [x, weight, a, b], case.dy)

    def truth(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ weight.T + 0.5 * (x @ a.T) @ b.T

    assert_same(found, results(truth, [x, weight, a, b], case.dy))


def test_peft_adapters_are_added_up_and_the_weight_is_frozen() -> None:
    case = case_of()
    x, weight = case.x, case.weight
    layer = peft_lora(weight, r=4, num_adapters=3)
    pairs = zip(layer.lora_A.values(), layer.lora_B.values(), strict=True)
    wanted = x @ weight.T + sum(b(a(x)) for a, b in pairs)
    torch.testing.assert_close(layer(x), wanted)
    trained = [name for name, each in layer.named_parameters() if each.requires_grad]
    assert len(trained) == 6
    assert all("lora_" in name for name in trained)
