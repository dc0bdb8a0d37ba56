"""Co-directional shift: where hidden states move, and whether abilities move together."""

from __future__ import annotations

import math

import pytest
import torch
from run_cases import adapted_model
from torch import nn

from citi.capability_shift import Site, capability_change, mean_states, shift_cosines
from citi.data import Message, Sample
from citi.data.render import Renderer
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def sample(question: str, answer: str) -> Sample:
    turns = (Message("user", question), Message("assistant", answer))
    return Sample(question, 0, "chat", turns)


SAMPLES = [sample("Rome?", "A city in Italy."), sample("2 + 2?", "Four, as ever.")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_has_both_sites_in_every_architecture(architecture, tokenizer) -> None:
    states = mean_states(tiny_model(architecture), tokenizer, SAMPLES)
    assert list(states) == [Site(layer, p) for layer in range(3) for p in ("attention", "mlp")]
    assert all(state.shape == (32,) and state.any() for state in states.values())


def test_a_state_is_the_input_at_the_last_token_before_the_cut(tokenizer) -> None:
    model, one = tiny_model(), SAMPLES[:1]
    states = mean_states(model, tokenizer, one, seed=4)
    tokens = Renderer(tokenizer, max_length=4096).render(one[0]).input_ids
    prompt = Renderer(tokenizer, max_length=4096).render_prompt(one[0])
    with torch.no_grad():
        hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[1][0]
    after_norm = model.model.layers[1].input_layernorm(hidden).double()
    matches = torch.isclose(after_norm, states[Site(1, "attention")], atol=1e-5).all(-1)
    place = matches.nonzero().flatten().tolist()
    assert len(place) == 1
    assert len(prompt) - 1 <= place[0] < len(tokens) - 1


def test_cuts_depend_on_the_seed_and_repeat(tokenizer) -> None:
    model, site = tiny_model(), Site(2, "mlp")
    first = mean_states(model, tokenizer, SAMPLES, seed=0)[site]
    assert torch.equal(first, mean_states(model, tokenizer, SAMPLES, seed=0)[site])
    others = [mean_states(model, tokenizer, SAMPLES, seed=seed)[site] for seed in range(1, 5)]
    assert any(not torch.equal(first, other) for other in others)


def test_a_change_is_seen_from_the_layer_behind_it_on(tokenizer) -> None:
    model = tiny_model()
    before = mean_states(model, tokenizer, SAMPLES)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.add_(0.1)
    change = capability_change(before, mean_states(model, tokenizer, SAMPLES))
    moved = {site for site, vector in change.items() if vector.any()}
    assert moved == {Site(1, "mlp"), Site(2, "attention"), Site(2, "mlp")}
    cosines = shift_cosines(change, {site: -2 * vector for site, vector in change.items()})
    assert cosines[Site(0, "mlp")] is None
    assert cosines[Site(2, "mlp")] == pytest.approx(-1)


def test_an_adapter_is_looked_through(tokenizer) -> None:
    model = adapted_model(num_unimportant=0)
    tuned = mean_states(model, tokenizer, SAMPLES)
    with model.disable_adapter():
        original = mean_states(model, tokenizer, SAMPLES)
    plain = mean_states(tiny_model(), tokenizer, SAMPLES)
    assert all(torch.allclose(original[site], plain[site]) for site in plain)
    change = capability_change(original, tuned)
    assert not change[Site(0, "attention")].any()
    assert change[Site(2, "mlp")].any()


def test_cosines_are_those_of_the_definition() -> None:
    tool, general = {Site(0, "mlp"): torch.tensor([1.0, 0.0])}, {}
    general[Site(0, "mlp")] = torch.tensor([1.0, 1.0])
    assert shift_cosines(tool, general)[Site(0, "mlp")] == pytest.approx(math.sqrt(0.5))


def test_what_cannot_be_compared_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="same sites"):
        capability_change({Site(0, "mlp"): torch.ones(2)}, {})
    with pytest.raises(ValueError, match="same sites"):
        shift_cosines({Site(0, "mlp"): torch.ones(2)}, {})
    question = Sample("q", 0, "chat", (Message("user", "Rome?"),))
    with pytest.raises(ValueError, match="answer"):
        mean_states(tiny_model(), tokenizer, [question])


def test_hooks_are_gone_afterwards(tokenizer) -> None:
    model = tiny_model()
    mean_states(model, tokenizer, SAMPLES)
    assert not any(isinstance(m, nn.Module) and m._forward_pre_hooks for m in model.modules())
