"""Layers that share their input as one op of Triton, interpreted, through a whole model."""

from __future__ import annotations

import copy

import pytest

from citi.adapters import shared_input
from citi_kernels import environment, use_backend
from shared_input_cases import adapt, alone, assert_same, step
from tiny import tiny_model


@pytest.mark.skipif(not environment.INTERPRETS, reason="wants TRITON_INTERPRET=1")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_on_triton_a_llama_gives_what_its_layers_give_alone(checkpointing, monkeypatch):
    model = adapt(tiny_model(num_hidden_layers=2), lora_dropout=0.2).train()
    model.enable_input_require_grads()
    with use_backend("triton"):
        expected = [alone(step, copy.deepcopy(model), seed) for seed in range(3)]
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ops = []
        apply_group = shared_input.apply_molora_group
        monkeypatch.setattr(
            shared_input,
            "apply_molora_group",
            lambda *args, **options: ops.append(1) or apply_group(*args, **options),
        )
        for seed, theirs in enumerate(expected):
            assert_same(step(model, seed), theirs)
    assert len(ops) == 2 * 2 * 2 * (1 + checkpointing)
