"""Layers that share their input run together, and nothing else about them changes.

Everything here runs on the CPU: `runs_together` is made to say yes, and the layers of a group are
then computed one after the other inside one call of `apply_molora_group`, which is counted.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from citi.adapters import shared_input
from shared_input_cases import IDS, MASK, adapt, alone, assert_same, run_together, step
from tiny import tiny_model


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of layers of every group call."""
    return run_together(monkeypatch)


@pytest.mark.parametrize(
    ("architecture", "per_block"),
    [("llama", [3, 2]), ("qwen3", [3, 2]), ("gemma", [3, 2]), ("phi3", []), ("gpt2", [])],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_models_give_what_their_layers_give_alone(sizes, architecture, per_block, dropout):
    model = adapt(tiny_model(architecture), lora_dropout=dropout).train()
    expected = [alone(step, copy.deepcopy(model), seed) for seed in range(4)]
    counts = []
    for seed, theirs in enumerate(expected):
        assert_same(step(model, seed), theirs)
        counts.append(list(sizes))
        sizes.clear()
    assert counts == [[], *[per_block * 3] * 3]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_case_33_recomputation_runs_as_the_forward_did(sizes, reentrant):
    def steps(model) -> list[dict[str, Tensor]]:
        model.enable_input_require_grads()
        results = []
        for seed in range(4):
            set_seed(seed)
            model.zero_grad()
            loss = model(input_ids=IDS, labels=IDS).loss  # alive through the next forward
            loss.backward()
            grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            results.append({"logits": loss.detach(), "random": torch.rand(3)} | grads)
        return results

    model = adapt(tiny_model(), lora_dropout=0.2).train()
    expected = alone(steps, copy.deepcopy(model))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for ours, theirs in zip(steps(model), expected, strict=True):
        assert_same(ours, theirs)
    first = 3 * reentrant  # there the forward has no graph, so the recomputation is settled already
    assert sizes.count(3) == sizes.count(2) == first + 3 * 3 * 2


def test_case_33_graphs_from_before_layers_ran_together_are_recomputed_alone(sizes):
    model = adapt(tiny_model()).train()
    expected = alone(step, copy.deepcopy(model))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [model(input_ids=IDS, labels=IDS).loss for _ in range(3)]
    with torch.no_grad():
        model(input_ids=IDS)
    for loss in losses:
        loss.backward(retain_graph=True)
    model.zero_grad()
    losses.pop().backward()
    del losses, loss
    assert sizes == []
    assert_same(step(model), expected)
    assert sizes == [3, 2] * 3 * 2


def test_generation_gives_the_same_tokens(sizes):
    model = adapt(tiny_model())
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = alone(lambda: model.generate(input_ids=IDS, attention_mask=MASK, **options))
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=MASK, **options), expected)
    assert sizes == [3, 2] * 3 * 5  # all but the first of six forwards


def test_results_do_not_outlive_the_forward(sizes):
    model = adapt(tiny_model())
    seen = []
    layer = model.base_model.model.model.layers[2]
    layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=IDS)
        layer.mlp.forward = lambda x: layer.mlp.down_proj(layer.mlp.gate_proj(x))
        model(input_ids=IDS)  # the result for up_proj is never fetched
    assert sizes == [3, 2] * 6
    gc.collect()
    assert [ref() for ref in seen] == [None] * 3
    assert shared_input._of_thread.results is None
