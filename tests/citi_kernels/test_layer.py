"""MoLoRALinear: equal to its linear at the start, and a well-behaved nn.Module."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from citi_kernels.layers.molora_linear import MoLoRALinear
from citi_kernels.layers.routing import RoutingContext
from citi_kernels.ops.molora_linear import molora_linear, molora_linear_ref
from under_test import WIDEST_LAYER

ADAPTER = ("molora_A", "molora_B", "molora_router")


def live(layer: MoLoRALinear) -> MoLoRALinear:
    """The layer with experts that do something."""
    with torch.no_grad():
        generator = torch.Generator(layer.molora_B.device).manual_seed(3)
        layer.molora_B.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, WIDEST_LAYER])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("top_k", [None, 1])
def test_case_51_fresh_layer_equals_the_linear_bitwise(dtype, bias, top_k):
    linear = nn.Linear(33, 47, bias=bias, dtype=dtype)
    x = torch.randn(2, 7, 33, dtype=dtype)
    layer = MoLoRALinear.from_linear(linear, num_experts=3, r=5, top_k=top_k)
    assert torch.equal(layer(x), linear(x))
    with RoutingContext(torch.zeros(14).long(), num_segments=1):
        assert torch.equal(layer(x), linear(x))


def test_from_linear_shares_and_freezes_the_parameters():
    linear = nn.Linear(8, 4).eval()
    layer = MoLoRALinear.from_linear(linear, num_experts=2, r=3, alpha=6)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trainable == list(ADAPTER)
    assert layer.settings.scaling == 2.0
    with torch.no_grad():
        linear.weight.zero_()
    assert (layer.weight == 0).all()


def test_from_linear_refuses_what_is_not_a_floating_linear():
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear.*got Conv1d"):
        MoLoRALinear.from_linear(nn.Conv1d(2, 2, 1))


class Doubled(nn.Linear):
    """A linear whose call is more than its product."""

    def forward(self, x):
        return 2 * super().forward(x)


def with_hook() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, inputs, y: 2 * y)
    return linear


def with_replaced_forward() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.forward = torch.neg
    return linear


@pytest.mark.parametrize(
    "make",
    [
        lambda: Doubled(4, 4),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        with_hook,
        with_replaced_forward,
    ],
)
def test_from_linear_refuses_a_linear_whose_call_is_more_than_its_product(make):
    with pytest.raises(TypeError, match=r"linear must be a plain nn\.Linear"):
        MoLoRALinear.from_linear(make())


def test_from_linear_refuses_a_dtype_that_the_op_does_not_take():
    linear = nn.Linear(16, 16)
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), False)
    with pytest.raises(TypeError, match="floating weight"):
        MoLoRALinear.from_linear(linear)


def test_shapes_and_initialisation_are_the_authors():
    torch.manual_seed(0)
    layer = MoLoRALinear(64, 24, num_experts=4, r=8)
    assert layer.settings.scaling == 0.25
    assert layer.molora_A.shape == (32, 64)
    assert layer.molora_B.shape == (24, 32)
    assert layer.molora_router.shape == (5, 64)
    assert (layer.molora_B == 0).all()
    bound = 1 / math.sqrt(64)  # Kaiming-uniform with a = sqrt(5), fan-in 64
    for expert in layer.molora_A.chunk(4):
        assert 0.9 * bound < expert.abs().max() <= bound
    assert 0.9 * bound < layer.molora_router.abs().max() <= bound
    assert 0.9 * bound < layer.weight.abs().max() <= bound


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 2, "renormalize": True}])
def test_forward_is_the_op_with_the_layers_settings(options):
    layer = live(MoLoRALinear(12, 9, num_experts=4, r=3, alpha=1.5, **options))
    x = torch.randn(5, 12)
    adapter = [getattr(layer, name) for name in ADAPTER]
    operands = (x, layer.weight, layer.bias, *adapter)
    y, _ = molora_linear(*operands, num_experts=4, scaling=0.5, **options)
    assert torch.equal(layer(x), y)
    truth, _ = molora_linear_ref(*operands, num_experts=4, scaling=0.5, **options)
    torch.testing.assert_close(layer(x), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_case_41_a_16_bit_layer_trains_fp32_adapters(dtype):
    layer = live(MoLoRALinear.from_linear(nn.Linear(16, 8, dtype=dtype), num_experts=2, r=4))
    x = torch.randn(3, 16, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    for name in ADAPTER:
        parameter = getattr(layer, name)
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_dropout_drops_in_training_only_and_follows_the_default_generator():
    layer = live(MoLoRALinear(32, 8, num_experts=2, r=4, dropout=0.5))
    x = torch.randn(6, 32)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    state = torch.get_rng_state()
    clean = layer(x)
    assert torch.equal(layer(x), clean)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(clean, first)


def test_without_dropout_training_draws_nothing():
    layer = live(MoLoRALinear(32, 8, num_experts=2, r=4))
    state = torch.get_rng_state()
    layer(torch.ones(6, 32))
    assert torch.equal(torch.get_rng_state(), state)


def test_case_28_deepcopy_pickle_and_state_dict_keep_every_bit():
    layer = live(MoLoRALinear(12, 9, num_experts=3, r=2, top_k=2, dropout=0.1)).eval()
    x = torch.randn(4, 12)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    fresh = MoLoRALinear(12, 9, num_experts=3, r=2, top_k=2).eval()
    assert list(fresh.state_dict()) == ["weight", "bias", *ADAPTER]
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False), fresh):
        assert torch.equal(other(x), layer(x))
        assert other.molora_A is not layer.molora_A
        trainable = [name for name, p in other.named_parameters() if p.requires_grad]
        assert trainable == list(ADAPTER)


def test_case_28_deepcopy_after_a_backward_with_a_context():
    layer = live(MoLoRALinear(12, 9, num_experts=3, r=2))
    with RoutingContext(torch.zeros(4).long(), num_segments=1) as context:
        layer(torch.randn(4, 12))
    context.stacked()[0].sum().backward()
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.molora_A, layer.molora_A)


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_case_28_converted_layers_run_and_train(convert):
    layer = convert(live(MoLoRALinear(12, 9, num_experts=3, r=2)))
    dtype = layer.weight.dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}
    y = layer(torch.randn(4, 12, dtype=dtype))
    y.float().sum().backward()
    assert y.dtype == layer.molora_A.grad.dtype == dtype


def test_case_28_meta_initialisation_then_reset_gives_a_working_layer():
    layer = MoLoRALinear(12, 9, num_experts=3, r=2, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device=torch.get_default_device())
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    other = MoLoRALinear(12, 9, num_experts=3, r=2, dtype=torch.bfloat16)
    for (name, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad, name


def test_resetting_the_adapter_alone_keeps_the_weight():
    layer = live(MoLoRALinear(12, 9, num_experts=3, r=2))
    weight = layer.weight.clone()
    layer.reset_adapter_parameters()
    x = torch.randn(4, 12)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_case_22_compiles_without_a_graph_break():
    layer = live(MoLoRALinear(12, 9, num_experts=3, r=2))
    x = torch.randn(4, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    compiled_grad, layer.molora_A.grad = layer.molora_A.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(compiled_grad, layer.molora_A.grad)


def test_case_22_equal_layers_compiled_by_themselves_share_a_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layers = [live(MoLoRALinear(12, 12, num_experts=3, r=2)) for _ in range(12)]
    x = torch.randn(4, 12, requires_grad=True)
    for layer in layers:
        y = torch.compile(layer, fullgraph=True, backend=counter)(x)
        torch.testing.assert_close(y, layer(x))
    assert counter.frame_count == 1


def test_case_22_in_a_context_each_compiled_layer_records_with_a_graph_of_its_own():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layers = [live(MoLoRALinear(12, 12, num_experts=3, r=2)) for _ in range(3)]
    for _ in range(2):
        with RoutingContext(torch.arange(4), num_segments=4) as context:
            for layer in layers:
                torch.compile(layer, fullgraph=True, backend=counter)(torch.randn(4, 12))
        assert list(context.gate_sums) == [id(layer) for layer in layers]
        assert counter.frame_count == len(layers)


def test_a_compiled_layer_reports_to_the_context_of_each_call():
    layer = live(MoLoRALinear(12, 9, num_experts=3, r=2))
    compiled = torch.compile(layer, backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(4, 12)
        with RoutingContext(torch.arange(4), num_segments=4) as context:
            y = compiled(x)
        with RoutingContext(torch.arange(4), num_segments=4) as eager:
            torch.testing.assert_close(layer(x), y)
        torch.testing.assert_close(context.stacked(), eager.stacked())
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_traced_layer_holds_the_op_and_survives_saving(mode):
    layer, example, x = live(MoLoRALinear(16, 12)).eval(), torch.randn(3, 16), torch.randn(3, 16)
    with mode():
        traced = torch.jit.trace(layer, example)
    assert "citi::molora_linear" in str(traced.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_an_exported_layer_holds_the_op_and_takes_any_batch(mode, strict):
    layer = live(MoLoRALinear(16, 12)).eval()
    dynamic = {0: torch.export.Dim("samples"), 1: torch.export.Dim("positions")}
    with mode():
        program = torch.export.export(
            layer, (torch.randn(2, 3, 16),), dynamic_shapes=(dynamic,), strict=strict
        )
    assert "citi.molora_linear.default" in str(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    exported, x = torch.export.load(buffer).module(), torch.randn(5, 7, 16)
    assert torch.equal(exported(x), layer(x))


def test_repr_says_what_the_layer_is():
    assert repr(MoLoRALinear(12, 9, top_k=2)) == (
        "MoLoRALinear(in_features=12, out_features=9, bias=True, num_experts=4, r=8, alpha=2, "
        "dropout=0, top_k=2, renormalize=False)"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"num_experts": 0}, "num_experts must be an integer >= 1, got 0"),
        ({"alpha": 0}, "alpha must be a number > 0, got 0"),
        ({"dropout": 1.0}, r"dropout must lie within \[0, 1\), got 1.0"),
        ({"alpha": "2"}, "alpha must be a number > 0, got '2'"),
        ({"dropout": "0"}, r"dropout must lie within \[0, 1\), got '0'"),
        ({"top_k": 5}, r"top_k must be None \(all experts\) or within \[1, 4\]"),
        ({"top_k": 1.5}, r"top_k must be None .* and an integer, got 1.5"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        MoLoRALinear(4, 4, **change)
