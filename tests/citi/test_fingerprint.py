"""A model's fingerprint tells models apart and knows one model in two dtypes."""

from __future__ import annotations

import pytest
import torch

from citi.fingerprint import differing_fields, model_fingerprint
from tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_fp32_and_bf16_loads_have_one_fingerprint(architecture, tmp_path):
    model = tiny_model(architecture)
    fingerprint = model_fingerprint(model)
    assert model_fingerprint(model.to(torch.bfloat16)) == fingerprint
    assert fingerprint["model_type"] == architecture
    assert set(fingerprint) == {
        "model_type",
        "num_components",
        "components_sha256",
        "weights_sha256",
    }


def test_other_weights_and_other_components_differ():
    fingerprint = model_fingerprint(tiny_model("llama"))
    other_weights = model_fingerprint(tiny_model("llama", seed=1))
    assert differing_fields(fingerprint, other_weights) == ["weights_sha256"]
    deeper = model_fingerprint(tiny_model("llama", num_hidden_layers=4))
    assert differing_fields(fingerprint, deeper) == [
        "components_sha256",
        "num_components",
        "weights_sha256",
    ]
    assert differing_fields(fingerprint, dict(fingerprint)) == []


def test_training_one_component_changes_the_fingerprint():
    model = tiny_model("llama")
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1.05)
    assert differing_fields(before, model_fingerprint(model)) == ["weights_sha256"]


def test_the_head_and_the_training_state_do_not_matter():
    model = tiny_model("llama")
    before = model_fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.train().requires_grad_(False)
    assert model_fingerprint(model) == before


def test_case_35_weights_that_are_not_in_memory_are_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj must be .* meta device"):
        model_fingerprint(model)
