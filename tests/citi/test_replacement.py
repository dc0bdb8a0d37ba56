"""The replacement experiment: which components are put where, and that they come out again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from citi.components import find_components
from citi.replacement import chosen_components, components_replaced, replacement_experiment
from tiny import tiny_model


def names_of(model: nn.Module) -> list[str]:
    return [component.name for component in find_components(model)[0]]


def taken_from(tuned: nn.Module, model: nn.Module) -> set[str]:
    return {
        name
        for name in names_of(model)
        if torch.equal(model.get_submodule(name).weight, tuned.get_submodule(name).weight)
    }


def test_the_ends_are_those_of_the_ranking() -> None:
    importance = {f"c{i}": float(i) for i in range(10)}
    assert chosen_components(importance, 0.2, end="top") == ("c8", "c9")
    assert chosen_components(importance, 0.2, end="bottom") == ("c0", "c1")
    assert set(chosen_components(importance, 1.0, end="top")) == set(importance)
    assert chosen_components(importance, 0.0, end="bottom") == ()
    for share, end in ((1.1, "top"), (0.5, "middle")):
        with pytest.raises(ValueError, match="must be"):
            chosen_components(importance, share, end=end)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_each_step_has_the_tuned_components_and_the_model_is_whole_afterwards(
    architecture: str,
) -> None:
    model, tuned = tiny_model(architecture), tiny_model(architecture, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    importance = {name: float(i) for i, name in enumerate(names_of(model))}
    steps = replacement_experiment(
        model, tuned, importance, lambda each: taken_from(tuned, each), shares=(0.2, 0.5)
    )
    assert [(step.end, step.share) for step in steps] == [
        ("top", 0.2),
        ("top", 0.5),
        ("bottom", 0.2),
        ("bottom", 0.5),
    ]
    for step in steps:
        assert (
            step.figures
            == set(step.components)
            == set(chosen_components(importance, step.share, end=step.end))
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_everything_replaced_is_the_tuned_model_but_for_norms_and_embeddings() -> None:
    model, tuned = tiny_model(), tiny_model(seed=1)
    tuned.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    tuned.lm_head.load_state_dict(model.lm_head.state_dict())
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = tuned(tokens).logits
        with components_replaced(model, tuned, names_of(model)):
            assert torch.equal(model(tokens).logits, wanted)
        assert not torch.allclose(model(tokens).logits, wanted)


def test_the_model_is_whole_after_an_exception_too() -> None:
    model, tuned = tiny_model(), tiny_model(seed=1)
    name = names_of(model)[0]
    before = model.get_submodule(name).weight.clone()
    with pytest.raises(KeyError), components_replaced(model, tuned, [name]):
        raise KeyError
    assert torch.equal(model.get_submodule(name).weight, before)


def test_components_that_do_not_fit_are_refused_before_anything_changes() -> None:
    model = tiny_model()
    first, *_, last = names_of(model)
    before = model.get_submodule(first).weight.clone()
    with (
        pytest.raises(ValueError, match="lm_head"),
        components_replaced(model, tiny_model(seed=1), ["lm_head"]),
    ):
        pass
    other = tiny_model(seed=1, intermediate_size=64)
    with pytest.raises(ValueError, match="shape"), components_replaced(model, other, [first, last]):
        pass
    assert torch.equal(model.get_submodule(first).weight, before)
