"""`scored_linear` is the linear it wraps, and hands out what scores need."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from citi_kernels.ops.scored_linear import Backward, scored_linear


def frozen_linear(dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(24, 19, dtype=dtype).requires_grad_(False)


def run(
    x: Tensor, forward: Callable[[Tensor], Tensor], weight: Tensor | None, **needs: bool
) -> tuple[Tensor, Tensor, list[Backward]]:
    """y, g, and what the callback saw."""
    seen: list[Backward] = []
    y = scored_linear(
        x,
        forward,
        weight=None if weight is None else lambda: weight,
        anchor=torch.ones((), requires_grad=True),
        on_backward=seen.append,
        **needs,
    )
    g = torch.randn_like(y)
    y.backward(g)
    return y.detach(), g, seen


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_it_equals_the_linear_and_hands_out_its_own_dx(has_weight: bool, needs_grad: bool) -> None:
    linear = frozen_linear()
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=needs_grad)
    weight = linear.weight if has_weight else None
    y, g, seen = run(x, linear.forward, weight, needs_y=True)
    assert torch.equal(y, linear(x).detach())
    (backward,) = seen
    assert torch.equal(backward.x, x.detach().view(10, 24))
    assert torch.equal(backward.g, g.view(10, 19))
    assert torch.equal(backward.y, y.view(10, 19))
    assert backward.weight is weight
    torch.testing.assert_close(backward.dx, (g @ linear.weight).view(10, 24))
    if needs_grad:
        torch.testing.assert_close(x.grad, g @ linear.weight)
    else:
        assert x.grad is None
    assert linear.weight.grad is None


@pytest.mark.parametrize("has_weight", [True, False])
def test_dx_and_y_are_left_out_where_nobody_wants_them(has_weight: bool) -> None:
    linear = frozen_linear(torch.float32)
    weight = linear.weight if has_weight else None
    _, _, (backward,) = run(torch.randn(5, 24), linear.forward, weight, needs_dx=False)
    assert backward.dx is None
    assert backward.y is None


def test_dx_is_there_where_x_needs_it_though_the_callback_does_not() -> None:
    linear = frozen_linear()
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    _, g, (backward,) = run(x, linear.forward, linear.weight, needs_dx=False)
    torch.testing.assert_close(x.grad, g @ linear.weight)
    assert torch.equal(backward.dx, x.grad)


def test_siblings_on_one_x_each_see_their_own_dx() -> None:
    first, second = frozen_linear(), frozen_linear()
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    seen: dict[str, Backward] = {}
    outputs = [
        scored_linear(
            x,
            linear.forward,
            weight=lambda linear=linear: linear.weight,
            anchor=torch.ones((), requires_grad=True),
            on_backward=lambda backward, name=name: seen.update({name: backward}),
        )
        for name, linear in (("first", first), ("second", second))
    ]
    torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
    torch.testing.assert_close(seen["first"].dx, torch.ones(5, 19).double() @ first.weight)
    torch.testing.assert_close(seen["first"].dx + seen["second"].dx, x.grad)


def test_nothing_keeps_the_weight_between_forward_and_backward() -> None:
    linear, alive, calls = frozen_linear(), [], []

    def weight() -> Tensor:
        calls.append(len(alive))
        made = linear.weight.clone()
        alive.append(weakref.ref(made))
        return made

    y = scored_linear(
        torch.randn(5, 24, dtype=torch.float64),
        linear.forward,
        weight=weight,
        anchor=torch.ones((), requires_grad=True),
        on_backward=lambda backward: None,
    )
    assert calls == []
    y.sum().backward()
    assert calls == [0]
    assert alive[0]() is None


def test_a_recomputation_calls_back_once() -> None:
    linear, seen = frozen_linear(), []
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        y = scored_linear(
            x * 2,
            linear.forward,
            weight=lambda: linear.weight,
            anchor=torch.ones((), requires_grad=True),
            on_backward=seen.append,
            needs_y=True,
        )
        return y.sin()

    checkpoint(block, x, use_reentrant=False).sum().backward()
    (backward,) = seen
    y = linear(2 * x).detach()
    torch.testing.assert_close(backward.y, y)
    torch.testing.assert_close(backward.g, y.cos())
    torch.testing.assert_close(x.grad, 2 * backward.dx)


def test_case_21_under_autocast_it_has_the_dtype_of_linear() -> None:
    linear = frozen_linear(torch.float32)
    x = torch.randn(5, 24, requires_grad=True)
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16):
        y, _, (backward,) = run(x, linear.forward, linear.weight)
    assert y.dtype == torch.bfloat16
    assert (x.grad.dtype, backward.dx.dtype) == (torch.float32, torch.float32)
