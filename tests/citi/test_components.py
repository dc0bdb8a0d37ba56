"""Which modules count as components, on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from citi.components import Component, find_components
from tiny import ARCHITECTURES, tiny_model

ROLES = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
}
LLAMA_ROLES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _reasons(model):
    return {module.name: module.reason for module in find_components(model)[1]}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_of_every_layer_is_found(architecture):
    components, _ = find_components(tiny_model(architecture))
    roles = ROLES.get(architecture, LLAMA_ROLES)
    for layer in range(3):
        found = [c.role for c in components if c.layer == layer]
        assert sorted(found) == sorted(roles)
    assert len(components) == 3 * len(roles)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_those_of_the_linear_map(architecture):
    model = tiny_model(architecture)
    for component in find_components(model)[0]:
        module = model.get_submodule(component.name)
        y = module(torch.zeros(1, component.in_features))
        assert y.shape == (1, component.out_features)
        assert component.kind == ("conv1d" if architecture == "gpt2" else "linear")


def test_a_component_describes_itself():
    components, _ = find_components(tiny_model("llama"))
    assert components[1] == Component(
        "model.layers.0.self_attn.k_proj", "linear", 32, 16, 0, "k_proj"
    )


@pytest.mark.parametrize(
    ("architecture", "overrides", "head_reason"),
    [
        ("llama", {}, "output head"),
        ("gemma", {}, "output head, tied to model.embed_tokens"),
        ("llama", {"tie_word_embeddings": True}, "output head, tied to model.embed_tokens"),
    ],
)
def test_head_and_embedding_are_left_out_and_listed(architecture, overrides, head_reason):
    reasons = _reasons(tiny_model(architecture, **overrides))
    assert reasons == {
        "model.embed_tokens": "embedding, not a linear module",
        "lm_head": head_reason,
    }


def test_mixture_of_experts_lists_router_and_expert_parameters_as_skipped():
    model = tiny_model("mixtral")
    components, _ = find_components(model)
    assert {c.role for c in components} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    reasons = _reasons(model)
    for layer in range(3):
        experts = reasons[f"model.layers.{layer}.mlp.experts"]
        assert experts == "expert weights are one 3-D parameter, not a linear module"
        assert reasons[f"model.layers.{layer}.mlp.gate"].startswith("router of a mixture")


def test_a_linear_router_is_left_out_and_a_gate_projection_is_not():
    model = tiny_model("llama")
    model.model.layers[0].mlp.gate = nn.Linear(32, 4)
    assert "model.layers.0.mlp.gate" not in _reasons(model)
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    assert _reasons(model)["model.layers.0.mlp.gate"].startswith("router")
    names = [c.name for c in find_components(model)[0]]
    assert "model.layers.0.mlp.gate_proj" in names
    assert "model.layers.0.mlp.experts.0" in names


@pytest.mark.parametrize("inside", ["router", "JetMoeRouter", "gate"])
def test_linears_inside_a_router_are_left_out_too(inside):
    model = tiny_model("llama")
    block = model.model.layers[0].mlp
    kind = type(inside if inside != "gate" else "Sigmoid", (nn.Module,), {})
    router = kind()
    router.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4))
    setattr(block, inside if inside != "JetMoeRouter" else "chooser", router)
    block.experts = nn.ModuleList([nn.Linear(32, 32)])
    names = [c.name for c in find_components(model)[0]]
    assert not [name for name in names if "classifier" in name]
    assert {"model.layers.0.mlp.experts.0", "model.layers.0.mlp.gate_proj"} <= set(names)
    assert sum("classifier" in name for name in _reasons(model)) == 2


def test_case_34_a_tied_weight_is_listed_once():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    names = [c.name for c in find_components(model)[0]]
    assert "model.layers.2.mlp.up_proj" not in names
    assert "model.layers.1.self_attn.q_proj" not in names
    assert "model.layers.0.mlp.up_proj, which" in _reasons(model)["model.layers.2.mlp.up_proj"]


def test_a_subclass_of_linear_counts_and_a_convolution_does_not():
    class Scaled(nn.Linear):
        pass

    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = Scaled(32, 48)
    model.model.convolution = nn.Conv1d(4, 4, 3)
    assert "model.layers.0.mlp.up_proj" in [c.name for c in find_components(model)[0]]
    assert _reasons(model)["model.convolution"] == "convolution (Conv1d), not a linear module"


def test_a_model_with_adapters_is_refused():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"without PEFT adapters.*default.*unload"):
        find_components(model)
