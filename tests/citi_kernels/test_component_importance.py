"""The arithmetic of importance against its definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from citi_kernels.ops import component_importance as op

EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def _case(dtype, tokens=37, in_features=24, out_features=19, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(tokens, in_features), draw(tokens, out_features), draw(out_features, in_features)


def _valid(tokens):
    return torch.arange(tokens) % 3 != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_row_scores_equal_their_definition(dtype, masked):
    x, _, _ = _case(dtype)
    dx, _, _ = _case(dtype, seed=1)
    valid = _valid(len(x)) if masked else None
    tolerance = 8 * EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    for score, truth in (
        (op.token_score, op.token_score_ref),
        (op.batch_score, op.batch_score_ref),
    ):
        wanted, scale = truth(x, dx, valid=valid), op.token_score_ref(x, dx, valid=valid)
        assert abs(score(x, dx, valid=valid) - wanted) <= tolerance * scale
    assert (op.row_dots(x, dx) - op.row_dots_ref(x, dx)).abs().max() <= tolerance * 24 * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_parameter_score_equals_its_definition(dtype, masked, transposed):
    x, g, weight = _case(dtype)
    valid = _valid(len(x)) if masked else None
    if transposed:
        weight = weight.T.contiguous().T
    truth = op.parameter_score_ref(weight, x, g, valid=valid)
    eps = EPS.get(dtype, EPS[torch.float32])
    assert abs(op.parameter_score(weight, x, g, valid=valid) - truth) <= 4 * eps * truth


def test_fp32_sums_over_a_large_weight_do_not_drift():
    """A plain running sum over the tile would be wrong in the fourth digit."""
    x, g, weight = _case(torch.float32, tokens=8, in_features=1024, out_features=1024)
    truth = op.parameter_score_ref(weight, x, g)
    assert abs(op.parameter_score(weight, x, g) - truth) <= 1e-6 * truth


def test_scores_do_not_depend_on_blocks_and_tiles(monkeypatch):
    x, g, weight = _case(torch.float16)
    dx = torch.randn(x.shape, dtype=torch.float16)
    whole = op.row_dots(x, dx), op.parameter_score(weight, x, g)
    monkeypatch.setitem(op._BLOCK_ELEMENTS, "cpu", 50)
    monkeypatch.setattr(op, "_TILE_ELEMENTS", 50)
    torch.testing.assert_close(op.row_dots(x, dx), whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(op.parameter_score(weight, x, g), whole[1], rtol=1e-6, atol=0)


def test_row_dot_is_the_weight_times_its_gradient():
    """The identity W · ∂L/∂W = Σ x·dx, through autograd, with a bias in the layer."""
    linear = nn.Linear(24, 19, dtype=torch.float64)
    x = torch.randn(37, 24, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    g = torch.randn_like(y)
    y.backward(g)
    truth = (linear.weight * linear.weight.grad).sum()
    assert abs(op.batch_score(x.detach(), x.grad) - truth) < 1e-11
    per_token = ((y - linear.bias) * g).sum(-1).abs().sum()
    assert abs(op.token_score(x.detach(), x.grad) - per_token) < 1e-11
    element_wise = (linear.weight * linear.weight.grad).abs().sum()
    assert abs(op.parameter_score(linear.weight.detach(), x.detach(), g) - element_wise) < 1e-11


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_case_11_a_token_that_does_not_count_is_selected_away(poison):
    x, g, weight = _case(torch.float32)
    dx, _, _ = _case(torch.float32, seed=1)
    valid = _valid(len(x))
    for bad in (x, g, dx):
        bad[~valid] = poison
    assert torch.isfinite(op.token_score(x, dx, valid=valid))
    assert torch.isfinite(op.batch_score(x, dx, valid=valid))
    assert torch.isfinite(op.parameter_score(weight, x, g, valid=valid))


def test_case_9_no_token_scores_zero():
    x, g, weight = (tensor[:0] for tensor in _case(torch.float32))
    assert op.token_score(x, x) == 0
    assert op.parameter_score(_case(torch.float32)[2], x, g) == 0
    assert op.parameter_score(weight, _case(torch.float32)[0], torch.zeros(37, 0)) == 0


def test_case_10_strides_change_nothing():
    x, g, weight = _case(torch.float32)
    dx, _, _ = _case(torch.float32, seed=1)
    x_strided, dx_strided, g_strided, weight_strided = (
        tensor.T.contiguous().T for tensor in (x, dx, g, weight)
    )
    assert torch.equal(op.row_dots(x_strided, dx_strided), op.row_dots(x, dx))
    strided = op.parameter_score(weight_strided, x_strided, g_strided)
    assert torch.equal(strided, op.parameter_score(weight, x, g))
    expanded = g[:1].expand(len(x), -1)
    assert torch.equal(
        op.parameter_score(weight, x, expanded), op.parameter_score(weight, x, expanded.clone())
    )


def test_case_13_inputs_are_left_alone():
    tensors = _case(torch.float32)
    before = [tensor.clone() for tensor in tensors]
    x, g, weight = tensors
    op.token_score(x, x, valid=_valid(len(x)))
    op.batch_score(x, x)
    op.parameter_score(weight, x, g, valid=_valid(len(x)))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_case_29_totals_over_many_half_precision_steps_equal_the_truth():
    """10⁵ steps: bf16 sums would stick at 256, fp16 squares would overflow."""
    total, truth = 0.0, 0.0
    for dtype, size in ((torch.bfloat16, 1.0), (torch.float16, 200.0)):
        x, _, _ = _case(dtype, tokens=2, in_features=8)
        x = x * size
        partial, exact = op.token_score(x, x).item(), op.token_score_ref(x, x).item()
        for _ in range(50_000):
            total, truth = total + partial, truth + exact
    assert abs(total - truth) <= 1e-6 * truth


class _RecordSizes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [t.numel() for t in [out] if isinstance(t, torch.Tensor) and t._base is None]
        return out


def test_case_37_no_tensor_as_large_as_the_gradient_is_formed():
    x, g, weight = _case(torch.float32, tokens=3, in_features=40, out_features=50)
    with _RecordSizes() as record:
        op.parameter_score(weight, x, g)
    assert record.sizes
    assert max(record.sizes) <= weight.numel() // 2


def _run(linear, x, forward, weight, needs_dx=True):
    seen = []
    y = op.scored_linear(
        x,
        forward,
        weight=weight,
        anchor=torch.ones((), requires_grad=True),
        on_backward=lambda *tensors: seen.append(tensors),
        needs_dx=needs_dx,
    )
    torch.manual_seed(3)
    g = torch.randn(y.shape, dtype=y.dtype)
    y.backward(g)
    return y.detach(), g, seen


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_scored_linear_equals_the_linear_and_hands_out_its_own_dx(plain, needs_grad):
    linear = nn.Linear(24, 19, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=needs_grad)
    y, g, seen = _run(linear, x, linear.forward, linear.weight if plain else None)
    assert torch.equal(y, linear(x).detach())
    assert len(seen) == 1
    seen_x, seen_g, seen_dx = seen[0]
    assert torch.equal(seen_x, x.detach().view(10, 24))
    assert torch.equal(seen_g, g.view(10, 19))
    torch.testing.assert_close(seen_dx, (g @ linear.weight).view(10, 24))
    if needs_grad:
        torch.testing.assert_close(x.grad, g @ linear.weight)
    else:
        assert x.grad is None


def test_scored_linear_leaves_dx_out_where_nobody_wants_it():
    linear = nn.Linear(24, 19).requires_grad_(False)
    _, _, seen = _run(linear, torch.randn(5, 24), linear.forward, linear.weight, needs_dx=False)
    assert seen[0][2] is None


def test_case_21_scored_linear_under_autocast_has_the_dtype_of_linear():
    linear = nn.Linear(24, 19).requires_grad_(False)
    x = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _, seen = _run(linear, x, linear.forward, linear.weight)
    assert y.dtype == torch.bfloat16
    assert (x.grad.dtype, seen[0][2].dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, g, w: op.row_dots(x, g), "dx"),
        (lambda x, g, w: op.row_dots(x[0], x[0]), "x"),
        (lambda x, g, w: op.row_dots(x.long(), x), "x"),
        (lambda x, g, w: op.token_score(x, x, valid=_valid(3)), "valid"),
        (lambda x, g, w: op.parameter_score(w.T, x, g), "weight"),
        (lambda x, g, w: op.parameter_score(w, x[:3], g), "g"),
    ],
)
def test_case_20_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        call(*_case(torch.float32))
