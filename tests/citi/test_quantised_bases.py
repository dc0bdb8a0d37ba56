"""Bases whose weights are tensors of another kind under a plain linear's forward, as torchao's."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from test_scores import samples
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from citi.adapters import MoLoraConfig
from citi.components import find_components
from citi.fingerprint import model_fingerprint
from citi.importance.score_components import score_components
from tiny import tiny_model, tiny_tokenizer

aten = torch.ops.aten
_KNOWN = (aten.t.default, aten.mm.default, aten.addmm.default, aten.transpose.int)


class Int8(Tensor):
    """Rows of int8 with a scale each; knows products and, as torchao's, little else."""

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scales.dtype)

    def __init__(self, values: Tensor, scales: Tensor) -> None:
        self.values, self.scales = values, scales

    def __tensor_flatten__(self):
        return ["values", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["values"], parts["scales"])

    def dequantize(self) -> Tensor:
        return self.values.to(self.scales.dtype) * self.scales

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is aten.detach.default:
            return cls(args[0].values, args[0].scales)
        if func not in _KNOWN:
            raise NotImplementedError(f"Int8 dispatch: {func}")
        plain = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def quantised(weight: Tensor) -> Int8:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return Int8((weight / scales).round().to(torch.int8), scales)


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """A model with quantised components, and the same with the values that they stand for."""
    made = tiny_model(), tiny_model()
    for model, keeps in zip(made, (True, False), strict=True):
        for component in find_components(model)[0]:
            linear = model.get_submodule(component.name)
            weight = quantised(linear.weight.detach())
            value = weight if keeps else weight.dequantize()
            linear.weight = nn.Parameter(value, requires_grad=False)
    return made


def test_fingerprint_and_scores_are_those_of_the_values(models) -> None:
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])
    data = {"tool": samples("tool", 3), "general": {"math": samples("math", 2)}}
    scores, wanted = (score_components(m, tiny_tokenizer(), **data) for m in models)
    for ability, given in scores.abilities.items():
        assert dict(given) == pytest.approx(dict(wanted.abilities[ability]), rel=1e-4)


def test_parameter_scores_say_that_they_want_a_plain_weight(models) -> None:
    data = {"tool": samples("tool", 2), "general": {"math": samples("math", 2)}}
    with pytest.raises(ValueError, match=r"need the plain weight of model\.layers"):
        score_components(models[0], tiny_tokenizer(), estimator="parameter", **data)


def test_a_quantised_component_is_adapted_but_not_trained_whole(models) -> None:
    names = [component.name for component in find_components(models[0])[0]]
    before = {name: type(module) for name, module in models[0].named_modules()}
    with pytest.raises(ValueError, match=f"modules_to_save: {names[-1]} is quantised.*unimportant"):
        get_peft_model(
            models[0], MoLoraConfig(target_modules=names[:2], modules_to_save=names[-1:])
        )
    assert {name: type(module) for name, module in models[0].named_modules()} == before
    model = get_peft_model(models[0], MoLoraConfig(target_modules=names[:2]))
    ids = torch.randint(3, 250, (2, 7))
    torch.testing.assert_close(model(ids).logits, models[1](ids).logits, rtol=1e-4, atol=1e-5)
    model(ids).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
