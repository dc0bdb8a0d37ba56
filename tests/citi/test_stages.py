"""Stages: exactly the right parameters train, in fp32, and nothing else moves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from run_cases import Items, adapted_model, changed, make_trainer, snapshot

from citi.stages import (
    MI,
    RP,
    STAGES,
    UCO,
    StageError,
    apply_stage,
    check_trainable,
    lower_to_base_dtype,
    parameter_group,
    raise_trainables_to_fp32,
    skip_reason,
    stage_parameters,
)


def test_stages_are_the_papers() -> None:
    table = [(s.name, s.directory, s.learning_rate, s.epochs, set(s.trains)) for s in STAGES]
    assert table == [
        ("rp", "stage1_rp", 2e-4, 1, {"router"}),
        ("mi", "stage2_mi", 2e-4, 2, {"router", "experts"}),
        ("uco", "stage3_uco", 2e-5, 1, {"unimportant"}),
    ]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.molora_router.default", "router"),
        ("base_model.model.model.layers.0.mlp.up_proj.molora_A.default", "experts"),
        ("base_model.model.model.layers.0.mlp.up_proj.molora_B.default", "experts"),
        ("base_model.model.lm.modules_to_save.default.weight", "unimportant"),
        ("base_model.model.model.layers.0.mlp.up_proj.molora_A.other", None),
        ("base_model.model.lm.modules_to_save.other.weight", None),
        ("base_model.model.lm.original_module.weight", None),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", None),
    ],
)
def test_a_parameter_is_grouped_by_whole_parts_of_its_name(name: str, group: str | None) -> None:
    assert parameter_group(name) == group


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_case_38_exactly_the_stages_parameters_move(
    stage, architecture: str, tmp_path: Path
) -> None:
    model = adapted_model(architecture)
    before = snapshot(model)
    trainer = make_trainer(model, tmp_path, Items(8), stage=stage)
    names = set(stage_parameters(model, stage))
    trainer.train()
    assert names
    assert changed(before, model) == names


def test_apply_stage_returns_the_names_that_train() -> None:
    model = adapted_model()
    for stage in STAGES:
        names = apply_stage(model, stage)
        assert names == [n for n, p in model.named_parameters() if p.requires_grad]
        assert {parameter_group(name) for name in names} == stage.trains


def test_apply_stage_leaves_other_adapters_frozen() -> None:
    model = adapted_model()
    model.add_adapter("other", dataclasses.replace(model.peft_config["default"]))
    assert not any(".other" in name for name in apply_stage(model, MI))
    assert all(".other" in name for name in apply_stage(model, MI, "other"))


def test_a_stage_without_its_parameters_is_refused_and_changes_nothing() -> None:
    from tiny import tiny_model

    model = tiny_model()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(StageError, match=r"trains experts, router.*no experts and no rou"):
        apply_stage(model, MI)
    assert [p.requires_grad for p in model.parameters()] == before


def test_uco_without_unimportant_components_is_skipped_with_the_reason() -> None:
    model = adapted_model(num_unimportant=0)
    assert skip_reason(model, UCO) == "the plan unfreezes no unimportant component"
    assert skip_reason(model, RP) is None
    assert skip_reason(model, dataclasses.replace(RP, epochs=0)) == "its epochs are 0"
    assert skip_reason(adapted_model(), UCO) is None


def test_check_trainable_names_what_differs() -> None:
    model = adapted_model()
    names = apply_stage(model, RP)
    check_trainable(model, names, "now")
    victim = dict(model.named_parameters())[names[0]]
    victim.requires_grad_(False)
    with pytest.raises(StageError, match=names[0]):
        check_trainable(model, names, "now")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_case_41_trainables_of_a_half_precision_base_are_fp32(dtype: torch.dtype) -> None:
    model = adapted_model(dtype=dtype)
    for stage in STAGES:
        names = apply_stage(model, stage)
        raised = raise_trainables_to_fp32(model)
        parameters = dict(model.named_parameters())
        assert {parameters[name].dtype for name in names} == {torch.float32}
        assert bool(raised) == (stage is UCO)
        optimizer = torch.optim.AdamW([parameters[name] for name in names])
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(sum(parameters[name].sum() for name in names)).backward()
        scaler.unscale_(optimizer)  # "Attempting to unscale FP16 gradients" otherwise
    frozen = {p.dtype for name, p in parameters.items() if not p.requires_grad}
    assert dtype in frozen


def test_lowering_gives_the_base_dtype_back_and_rounds_once() -> None:
    model = adapted_model(dtype=torch.bfloat16)
    names = apply_stage(model, UCO)
    raise_trainables_to_fp32(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            parameters[name].add_(1e-3)
    wanted = {name: parameters[name].to(torch.bfloat16) for name in names}
    lower_to_base_dtype(model)
    for name in names:
        assert parameters[name].dtype == torch.bfloat16
        assert torch.equal(parameters[name], wanted[name])
