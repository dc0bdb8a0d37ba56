"""MoLoraLinear around every kind of base layer, and the registration with PEFT."""

from __future__ import annotations

import importlib

import pytest
import torch
from peft import PeftType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

import citi.adapters
from citi.adapters import MoLoraConfig, MoLoraLinear, MoLoraModel
from citi.adapters.config import extend_peft_type
from citi.adapters.layer import is_plain
from citi_kernels.layers.routing import RoutingContext
from citi_kernels.ops.molora_linear import molora_linear_ref

CONFIG = {"r": 2, "num_experts": 3, "lora_alpha": 1}


class Int8Linear(nn.Linear):
    """A stand-in for a quantised linear: integer weights, a subclass, its own product."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.abs().max() / 127
        stored = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class PackedLinear(nn.Module):
    """A stand-in for a GPTQ layer: no `weight` at all."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.qweight, self.bias)


def live_layer(base: nn.Module, **settings) -> MoLoraLinear:
    layer = MoLoraLinear(base, "default", MoLoraConfig(**CONFIG, **settings))
    with torch.no_grad():
        layer.molora_B["default"].normal_(generator=torch.Generator().manual_seed(0))
    return layer


def truth(layer: MoLoraLinear, x: torch.Tensor) -> torch.Tensor:
    adapter = [getattr(layer, name)["default"] for name in layer.adapter_layer_names]
    update, _ = molora_linear_ref(x, None, None, *adapter, num_experts=3, scaling=0.5)
    return layer.base_layer(x) + update


def conv1d() -> Conv1D:
    base = Conv1D(6, 8)
    nn.init.normal_(base.bias)
    return base


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda: nn.Linear(8, 6), True),
        (lambda: nn.Linear(8, 6, bias=False), True),
        (conv1d, True),
        (lambda: Int8Linear(nn.Linear(8, 6)), False),
        (lambda: PackedLinear(nn.Linear(8, 6)), False),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), False),
    ],
    ids=["linear", "no_bias", "conv1d", "int8", "packed", "parametrised"],
)
def test_case_51_every_base_layer_gives_base_plus_update_and_base_at_the_start(make, plain):
    base = make()
    assert is_plain(base) is plain
    x = torch.randn(2, 5, 8, requires_grad=True)
    fresh = MoLoraLinear(base, "default", MoLoraConfig(**CONFIG))
    assert torch.equal(fresh(x), base(x))
    layer = live_layer(base)
    torch.testing.assert_close(layer(x), truth(layer, x))
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(truth(layer, x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)
    with RoutingContext(torch.zeros(10).long(), num_segments=1) as context:
        layer(x)
    torch.testing.assert_close(context.gate_sums[id(layer)].sum(), torch.tensor(10.0))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))


def test_a_hook_on_the_base_layer_is_called_and_the_fused_path_comes_back():
    base, x, seen = nn.Linear(8, 6), torch.randn(3, 8), []
    layer = live_layer(base)
    fused = layer(x)
    handle = base.register_forward_pre_hook(lambda *_: seen.append("pre"))
    torch.testing.assert_close(layer(x), fused)
    handle.remove()
    handle = base.register_forward_hook(lambda module, args, y: y + 1)
    torch.testing.assert_close(layer(x), fused + 1)
    handle.remove()
    assert torch.equal(layer(x), fused)
    assert seen == ["pre"]


def test_a_replaced_forward_is_called_as_accelerate_does_it():
    base, x = nn.Linear(8, 6), torch.randn(3, 8)
    layer = live_layer(base)
    fused = layer(x)
    original = base.forward
    base.forward = lambda x: original(x) * 2
    torch.testing.assert_close(layer(x), fused + original(x))
    del base.forward
    assert torch.equal(layer(x), fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_case_41_on_16_bit_bases_the_update_is_in_the_base_dtype(dtype):
    for base in (nn.Linear(8, 6).to(dtype), PackedLinear(nn.Linear(8, 6)).to(dtype)):
        layer = live_layer(base)
        x = torch.randn(3, 8, dtype=dtype)
        assert layer(x).dtype == dtype
        assert {p.dtype for n, p in layer.named_parameters() if "molora" in n} == {torch.float32}


def test_case_22_a_wrapped_layer_compiles_without_a_graph_break():
    layer = live_layer(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: PackedLinear(nn.Linear(8, 8))])
def test_case_22_equal_layers_compiled_by_themselves_share_a_graph(make):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layers = [live_layer(make()) for _ in range(12)]
    x = torch.randn(5, 8, requires_grad=True)
    for layer in layers:
        torch.testing.assert_close(torch.compile(layer, backend=counter)(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(4, 4), nn.LayerNorm(4), nn.Conv2d(2, 2, 1), nn.Bilinear(2, 2, 2)],
    ids=lambda module: type(module).__name__,
)
def test_what_is_not_linear_is_refused_by_name(module):
    with pytest.raises(TypeError, match=f"target: .* linear layers, got {type(module).__name__}"):
        get_peft_model(nn.ModuleDict({"target": module}), MoLoraConfig(target_modules=["target"]))


def test_the_projection_that_attention_never_calls_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        get_peft_model(model, MoLoraConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 0}, "r must be an integer >= 1"),
        ({"r": 1.5}, "r must be an integer >= 1"),
        ({"num_experts": 0}, "num_experts must be an integer >= 1"),
        ({"lora_alpha": -1}, "lora_alpha must be a number > 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must lie within"),
        ({"top_k": 9}, r"top_k must be None \(all experts\) or within \[1, 4\]"),
        ({"target_modules": ["a"], "modules_to_save": ["a"]}, r"must not share .* got \['a'\]"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        MoLoraConfig(**change)


def test_the_method_is_registered_once_and_for_good():
    member = PeftType("MOLORA")
    assert extend_peft_type() is member
    assert [each for each in PeftType if each.value == "MOLORA"] == [member]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is MoLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is MoLoraModel


def test_registration_survives_a_second_import_and_works_by_type_name():
    importlib.reload(citi.adapters)
    config = get_peft_config({"peft_type": "MOLORA", "r": 3})
    assert type(config) is MoLoraConfig
    assert config.r == 3
    assert config.peft_type is PeftType.MOLORA is PeftType["MOLORA"]
