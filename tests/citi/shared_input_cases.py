"""Models whose layers run together on the CPU, and the same models with every layer alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import set_seed

from citi.adapters import MoLoraConfig, shared_input
from citi.adapters.model import routing_names
from citi_kernels.layers.routing import RoutingContext
from tiny import VOCABULARY

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)


class _SavesMore(torch.autograd.Function):
    """Saves one odd tensor, as an op of several layers saves other tensors than its layers."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y.new_empty(13))
        return y.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        assert ctx.saved_tensors[0].shape == (13,)
        return gradient


def run_together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes layers run together; returns the numbers of layers of all group calls from here on."""
    seen: list[int] = []
    apply_group = shared_input.apply_molora_group

    def counted(x, weights, *others, **options):
        seen.append(len(weights))
        outputs = apply_group(x, weights, *others, **options)
        return [(_SavesMore.apply(y), gate_sums) for y, gate_sums in outputs]

    monkeypatch.setattr(shared_input, "apply_molora_group", counted)
    monkeypatch.setattr(shared_input, "runs_together", lambda *_, **__: True)
    return seen


def adapt(model: nn.Module, targets="all-linear", **settings) -> PeftModel:
    config = MoLoraConfig(r=2, num_experts=3, lora_alpha=2, target_modules=targets, **settings)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model


def alone(function: Callable, *arguments):
    """The same with every layer by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_input, "runs_together", lambda *_, **__: False)
        return function(*arguments)


class Attention(nn.Module):
    """A parent whose calls a test writes down."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
        self.o = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1) + self.o(x * 1).sum()


def attention(targets=("q", "k", "v", "o"), **settings) -> nn.Module:
    """Settled: q leads k and v."""
    torch.manual_seed(0)
    model = adapt(Attention(), list(targets), **settings).base_model.model
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(3, 8))
    return model


def step(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Logits, gate sums by component, gradients and what is left of the random numbers."""
    set_seed(seed)
    model.zero_grad()
    context = RoutingContext.from_attention_mask(MASK)
    with context:
        output = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
    names = routing_names(model)
    results = {f"gates {names[key]}": each.detach() for key, each in context.gate_sums.items()}
    (output.loss + sum(each.square().sum() for each in context.stacked())).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    after = {"logits": output.logits.detach(), "random": torch.rand(3)}
    return results | gradients | after


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bitwise; the input gradients of a group may be added in another order."""
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        if name.startswith("gates") or name in ("logits", "random"):
            assert torch.equal(ours[name], expected), name
        else:
            torch.testing.assert_close(ours[name], expected, msg=name)
