"""RoutingContext: what it counts and collects, and that no gradient is lost on the way."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from citi_kernels.layers.molora_linear import MoLoRALinear
from citi_kernels.layers.routing import RoutingContext
from citi_kernels.ops.router_loss import router_loss

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
TASKS = torch.tensor([1, 0, 1])


class TwoLayers(nn.Module):
    """Two MOLoRA layers with live experts, optionally checkpointed."""

    def __init__(self, use_reentrant: bool | None = None, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first = MoLoRALinear(6, 8, num_experts=3, r=2, dropout=dropout)
        self.second = MoLoRALinear(8, 6, num_experts=3, r=2, dropout=dropout)
        self.use_reentrant = use_reentrant
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.molora_B.normal_()

    def block(self, x):
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x):
        if self.use_reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


def train_step(model, *, routed=True):
    """Loss with the router loss, and every gradient."""
    torch.manual_seed(1)
    x = torch.randn(3, 4, 6, requires_grad=True)
    context = RoutingContext.from_attention_mask(MASK, task_types=TASKS)
    if routed:
        with context:
            y = model(x)
    else:
        y = model(x)
    loss = y.square().mean()
    for gate_sums in context.stacked():
        loss = loss + router_loss(gate_sums, context.token_counts, context.task_types).sum()
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {"x": x.grad, **named}, context


def test_padding_is_in_no_segment_and_counts_are_per_sample():
    context = RoutingContext.from_attention_mask(MASK, task_types=TASKS)
    expected = torch.tensor([[0, 0, 0, -1], [-1, 1, 1, 1], [2, 2, 2, 2]])
    assert torch.equal(context.segment_ids, expected)
    assert context.token_counts.tolist() == [3, 3, 4]
    assert context.num_segments == 3
    boolean = RoutingContext.from_attention_mask(MASK.bool())
    assert torch.equal(boolean.segment_ids, expected)


def test_gate_sums_are_recorded_per_layer_and_equal_the_gates_of_real_tokens():
    model = TwoLayers()
    x = torch.randn(3, 4, 6)
    with RoutingContext.from_attention_mask(MASK) as context:
        model(x)
    gates = torch.softmax(x @ model.first.molora_router.T, dim=-1)
    expected = (gates * MASK.unsqueeze(-1)).sum(1)
    assert list(context.gate_sums) == [id(model.first), id(model.second)]
    torch.testing.assert_close(context.gate_sums[id(model.first)], expected)
    (stacked,) = context.stacked()
    assert stacked.shape == (2, 3, 4)
    assert torch.equal(stacked[0], context.gate_sums[id(model.first)])


def test_every_token_can_be_a_segment_of_its_own():
    layer = MoLoRALinear(6, 8, num_experts=3, r=2)
    x = torch.randn(2, 5, 6)
    with RoutingContext(torch.arange(10), num_segments=10) as context:
        layer(x)
    gates = torch.softmax(x.reshape(10, 6) @ layer.molora_router.T, dim=-1)
    torch.testing.assert_close(context.gate_sums[id(layer)], gates)


def test_a_second_call_of_a_layer_adds():
    layer = MoLoRALinear(6, 8, num_experts=3, r=2)
    x = torch.randn(3, 4, 6)
    with RoutingContext.from_attention_mask(MASK) as once:
        layer(x)
    with RoutingContext.from_attention_mask(MASK) as twice:
        layer(x)
        layer(x)
    assert torch.equal(twice.gate_sums[id(layer)], 2 * once.gate_sums[id(layer)])


def test_layers_of_different_width_are_stacked_apart():
    narrow, wide = MoLoRALinear(6, 6, num_experts=1, r=2), MoLoRALinear(6, 6, num_experts=4, r=2)
    x = torch.randn(3, 4, 6)
    with RoutingContext.from_attention_mask(MASK) as context:
        narrow(wide(narrow(x)))
        wide(x)
    assert [tuple(s.shape) for s in context.stacked()] == [(1, 3, 2), (1, 3, 5)]


def test_outside_a_context_nothing_is_recorded_and_the_output_is_the_same():
    layer = MoLoRALinear(6, 8, num_experts=3, r=2)
    x = torch.randn(3, 4, 6)
    context = RoutingContext.from_attention_mask(MASK)
    outside = layer(x)
    assert context.gate_sums == {}
    assert RoutingContext.active() is None
    with context:
        assert torch.equal(layer(x), outside)
    assert torch.equal(layer(x), outside)


def test_contexts_nest_and_come_back_also_after_an_error():
    outer, inner = (RoutingContext(torch.zeros(2).long(), num_segments=1) for _ in range(2))
    with outer:
        with inner:
            assert RoutingContext.active() is inner
        assert RoutingContext.active() is outer
        with pytest.raises(TypeError), inner:
            inner.segment_ids_for(None)
        assert RoutingContext.active() is outer
        with pytest.raises(RuntimeError, match="open already"), outer:
            pass
        assert RoutingContext.active() is outer
    assert RoutingContext.active() is None


def test_entering_again_starts_anew():
    layer = MoLoRALinear(6, 8, num_experts=3, r=2)
    x = torch.randn(3, 4, 6)
    context = RoutingContext.from_attention_mask(MASK)
    for _ in range(2):
        with context:
            layer(x)
    with RoutingContext.from_attention_mask(MASK) as once:
        layer(x)
    assert torch.equal(context.gate_sums[id(layer)], once.gate_sums[id(layer)])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_on_and_off_gives_equal_gradients_with_the_router_loss(dropout):
    plain = train_step(TwoLayers(dropout=dropout))
    recomputed = train_step(TwoLayers(use_reentrant=False, dropout=dropout))
    assert torch.equal(plain[0], recomputed[0])
    assert plain[1].keys() == recomputed[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, recomputed[1][name]), name
    for sums, again in zip(plain[2].stacked(), recomputed[2].stacked(), strict=True):
        assert torch.equal(sums, again)


def test_the_router_loss_reaches_the_router_and_the_input():
    with_loss = train_step(TwoLayers(use_reentrant=False))[1]
    without = train_step(TwoLayers(use_reentrant=False), routed=False)[1]
    for name in ("first.molora_router", "second.molora_router", "x"):
        assert not torch.allclose(with_loss[name], without[name]), name
    # Padding has no router loss: its gradient is the one without, save through nothing.
    torch.testing.assert_close(with_loss["x"][MASK == 0], without["x"][MASK == 0])


def test_backward_inside_the_block_gives_the_same_gradients():
    model, x = TwoLayers(use_reentrant=False), torch.randn(3, 4, 6)
    gradients = []
    for inside in (True, False):
        model.zero_grad()
        context = RoutingContext.from_attention_mask(MASK, task_types=TASKS)
        with context:
            loss = model(x).square().mean()
            (sums,) = context.stacked()
            loss = loss + router_loss(sums, context.token_counts, TASKS).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_compiled_block_is_recomputed_in_a_backward_inside_the_with_block():
    def gradients(model, is_inside):
        x = torch.randn(3, 4, 6, generator=torch.Generator(MASK.device).manual_seed(2))
        context = RoutingContext.from_attention_mask(MASK, task_types=TASKS)
        with context:
            loss = model(x.requires_grad_()).square().mean()
            for gate_sums in context.stacked():
                loss = loss + router_loss(gate_sums, context.token_counts, TASKS).sum()
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    torch._dynamo.reset()
    compiled, eager = TwoLayers(use_reentrant=False), TwoLayers()
    compiled.block = torch.compile(compiled.block, backend="aot_eager")
    ours, expected = gradients(compiled, True), gradients(eager, False)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(CheckpointError):
        gradients(compiled, False)


def test_reentrant_checkpointing_is_refused_while_training_only():
    model = TwoLayers(use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        train_step(model)
    assert RoutingContext.active() is None
    model.eval()
    with torch.no_grad(), RoutingContext.from_attention_mask(MASK) as context:
        model(torch.randn(3, 4, 6, requires_grad=True))
    assert len(context.gate_sums) == 2


def test_modules_keep_nothing_so_deepcopy_and_memory_are_safe():
    model = TwoLayers()
    before = set(vars(model.first))
    _, _, context = train_step(model)
    assert set(vars(model.first)) == before
    copy.deepcopy(model)
    held = [context.gate_sums[id(model.first)]]
    del context
    gc.collect()
    assert len(gc.get_referrers(held[0])) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.zeros(2, 3), 2, None), TypeError, "segment_ids must be int64"),
        ((torch.full((2, 3), 2), 2, None), ValueError, r"lie in \[-1, 2\)"),
        ((torch.full((2, 3), -2), 2, None), ValueError, "got values from -2 to -2"),
        ((torch.zeros(3).long(), -1, None), ValueError, "num_segments must be at least 0"),
        ((torch.zeros(3).long(), 2, torch.zeros(3).long()), ValueError, "task_types must have"),
        ((torch.zeros(3).long(), 2, torch.zeros(2)), TypeError, "task_types must be integers"),
    ],
)
def test_case_20_wrong_input_is_named(arguments, error, words):
    segment_ids, num_segments, task_types = arguments
    with pytest.raises(error, match=words):
        RoutingContext(segment_ids, num_segments=num_segments, task_types=task_types)


def test_case_20_another_number_of_tokens_or_mask_rank_is_named():
    layer = MoLoRALinear(6, 8, num_experts=3, r=2)
    context = RoutingContext.from_attention_mask(MASK)
    with pytest.raises(ValueError, match="describes 12 tokens"), context:
        layer(torch.randn(3, 5, 6))
    with pytest.raises(ValueError, match="attention_mask must have the shape"):
        RoutingContext.from_attention_mask(torch.ones(2, 1, 4, 4))


def test_an_empty_batch_is_allowed():
    layer = MoLoRALinear(6, 8, num_experts=3, r=2)
    with RoutingContext.from_attention_mask(torch.ones(0, 4).long()) as context:
        assert layer(torch.randn(0, 4, 6)).shape == (0, 4, 8)
    assert context.token_counts.shape == (0,)
    assert context.gate_sums[id(layer)].shape == (0, 4)
