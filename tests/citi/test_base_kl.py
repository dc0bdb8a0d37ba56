"""The divergence from the base: its value, its scale, what it leaves alone, and what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_cases import InOrder, Items, adapted_model, make_trainer, snapshot, tiny_recipe
from test_trainer_loss import assert_close_gradients, step_gradients
from torch import Tensor, nn
from torch.nn import functional

import citi.base_kl
from citi.base_kl import as_base
from citi.baseline import Baseline, full_stage, train_baseline
from citi.data import Collator
from citi.stage_training import _checkpointing
from citi.stages import MI, RP, UCO, apply_stage
from tiny import ARCHITECTURES, tiny_model

ALONE = {"router_loss_weight": 0.0, "base_kl_weight": 0.7}


def far_model(architecture: str = "llama") -> nn.Module:
    """Experts that count for enough to move it from its base."""
    return adapted_model(architecture, lora_alpha=80)


def batch_of(num_samples: int) -> dict[str, Tensor]:
    dataset = Items(num_samples)
    return Collator(0)([dataset[i] for i in range(num_samples)])


def expected(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross entropy, and the summed divergence on general answers, token by token in fp64."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with model.disable_adapter(), torch.no_grad():
        base = model(**inputs).logits.double().softmax(-1)
    outputs = model(**inputs, labels=batch["labels"])
    ours = outputs.logits.double().softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for sample, task_type in enumerate(batch["task_types"].tolist()):
        for position, label in enumerate(batch["labels"][sample, 1:].tolist()):
            if label != -100 and task_type == 0:
                p, q = base[sample, position], ours[sample, position]
                total = total + (p * (p / q).log()).sum()
    return outputs.loss, total.float()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_sum_over_general_answer_tokens_a_token_of_all(
    architecture: str, tmp_path: Path
) -> None:
    model, batch = far_model(architecture), batch_of(5)
    trainer = make_trainer(model, tmp_path, Items(5), stage=MI, **ALONE)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    loss = trainer.compute_loss(model, batch)
    cross_entropy, divergence = expected(model, batch)
    num_answers = (batch["labels"][:, 1:] != -100).sum()
    assert divergence > 0.01
    torch.testing.assert_close(loss, cross_entropy + 0.7 * divergence / num_answers)
    window = (num_answers + 9).float()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=window)
    torch.testing.assert_close(
        loss, (cross_entropy * num_answers + 0.7 * divergence) / window, rtol=1e-5, atol=1e-6
    )


def test_chunks_give_what_one_piece_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step_gradients(tmp_path / "a", Items(6), model=far_model(), batch_size=6, **ALONE)
    monkeypatch.setattr(citi.base_kl, "_CHUNK", 3)
    pieces = step_gradients(tmp_path / "b", Items(6), model=far_model(), batch_size=6, **ALONE)
    assert_close_gradients(whole[0], pieces[0])


@pytest.mark.parametrize("stage", [RP, MI, UCO], ids=lambda stage: stage.name)
def test_what_trains_and_every_mode_are_as_before(stage, tmp_path: Path) -> None:
    model = far_model()
    names = set(apply_stage(model, stage))
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    with as_base(model):
        assert not any(module.training for module in model.modules())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    assert {name: module.training for name, module in model.named_modules()} == modes
    before = snapshot(model)
    make_trainer(
        model, tmp_path, Items(4), stage=stage, router_loss_weight=0.1, base_kl_weight=1.0
    ).train()
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} <= names


def test_it_ends_as_it_began_when_the_base_fails() -> None:
    model = far_model()
    model.train()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="no"), as_base(model):
        raise RuntimeError("no")
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert model.training


@pytest.mark.parametrize("stage", [MI, UCO], ids=lambda stage: stage.name)
def test_a_model_that_is_its_base_has_none(stage, tmp_path: Path) -> None:
    model = adapted_model(fresh=True)
    logged = make_trainer(
        model,
        tmp_path,
        Items(4),
        stage=stage,
        learning_rate=0.0,
        router_loss_weight=0.0,
        base_kl_weight=1.0,
    )
    logged.train()
    rows = [row for row in logged.state.log_history if "base_kl" in row]
    assert len(rows) == 2
    assert all(abs(row["base_kl"]) < 1e-6 for row in rows)


def test_the_base_runs_without_dropout_on_general_samples_alone(tmp_path: Path) -> None:
    model = far_model()
    trainer = make_trainer(model, tmp_path, Items(5), stage=MI, **ALONE)
    trainer.current_gradient_accumulation_steps = 1
    seen = []
    embeddings = model.get_base_model().get_input_embeddings()
    embeddings.register_forward_hook(
        lambda module, args, output: seen.append((len(args[0]), module.training))
    )
    model.train()
    trainer.compute_loss(model, batch_of(5))
    assert seen == [(2, False), (5, True)]
    tool_alone = {key: value[::2] for key, value in batch_of(5).items()}
    seen.clear()
    trainer.compute_loss(model, tool_alone)
    assert seen == [(3, True)]


def test_case_42_it_does_not_depend_on_the_accumulation_split(tmp_path: Path) -> None:
    whole = step_gradients(tmp_path / "a", Items(10), model=far_model(), batch_size=4, **ALONE)
    for batch_size, accumulation in ((2, 2), (1, 4)):
        split = step_gradients(
            tmp_path / f"b{accumulation}",
            Items(10),
            model=far_model(),
            batch_size=batch_size,
            accumulation=accumulation,
            **ALONE,
        )
        assert len(split) == len(whole) == 3
        for one, other in zip(whole, split, strict=True):
            assert_close_gradients(one, other)


class _MeanLossModel(InOrder):
    """As for a model that takes no loss arguments: the Trainer divides by the steps itself."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def test_models_without_loss_arguments_have_the_mean_of_a_micro_batch(tmp_path: Path) -> None:
    with_arguments = step_gradients(
        tmp_path / "a", Items(4), model=far_model(), batch_size=4, **ALONE
    )
    without = step_gradients(
        tmp_path / "b", Items(4), model=far_model(), batch_size=4, trainer=_MeanLossModel, **ALONE
    )
    assert_close_gradients(with_arguments[0], without[0])


@pytest.mark.parametrize("stage", [MI, UCO], ids=lambda stage: stage.name)
def test_case_33_activation_checkpointing_changes_nothing(stage, tmp_path: Path) -> None:
    ends = []
    for enabled in (False, True):
        model = far_model()
        trainer = make_trainer(
            model,
            tmp_path / str(enabled),
            Items(6),
            stage=stage,
            settings=_checkpointing(enabled),
            router_loss_weight=0.1,
            base_kl_weight=2.0,
        )
        trainer.train()
        ends.append(snapshot(model))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_it_keeps_the_model_near_its_base_on_general_answers(tmp_path: Path) -> None:
    ends = {}
    for weight in (0.0, 1e-9, 100.0):
        model = adapted_model(fresh=True, lora_alpha=80)
        trainer = make_trainer(
            model,
            tmp_path / str(weight),
            Items(8),
            stage=MI,
            epochs=6,
            router_loss_weight=0.0,
            base_kl_weight=weight,
        )
        trainer.train()
        ends[weight] = expected(model.eval(), batch_of(8))[1].item()
        logged = [row["base_kl"] for row in trainer.state.log_history if "base_kl" in row]
        assert len(logged) == (24 if weight else 0)
    assert ends[1e-9] == pytest.approx(ends[0.0], rel=1e-3), "a weight near 0 is as none"
    assert ends[100.0] < ends[0.0] / 4


def test_log_lines_carry_the_mean_over_general_answer_tokens(tmp_path: Path) -> None:
    model = far_model()
    trainer = make_trainer(
        model,
        tmp_path,
        Items(4),
        stage=MI,
        batch_size=1,
        accumulation=4,
        learning_rate=0.0,
        **ALONE,
    )
    trainer.train()
    row = trainer.state.log_history[0]
    batch = batch_of(4)
    general = (batch["labels"][1::2, 1:] != -100).sum()
    assert row["base_kl"] == pytest.approx((expected(model, batch)[1] / general).item(), rel=1e-4)
    answers = (batch["labels"][:, 1:] != -100).sum()
    part = 0.7 * row["base_kl"] * (general / answers).item()
    assert row["loss"] == pytest.approx(row["ce_loss"] + part, rel=1e-4)


def test_refusals_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base_kl_weight wants a PEFT model.*LlamaForCausalLM"):
        make_trainer(tiny_model("llama"), tmp_path, Items(2), **ALONE)
    model = far_model()
    trainer = make_trainer(model, tmp_path, Items(2), stage=MI, **ALONE)
    model.train()
    without = {key: value for key, value in batch_of(2).items() if key != "task_types"}
    with pytest.raises(ValueError, match="task_types"):
        trainer.compute_loss(model, without)
    without = {key: value for key, value in batch_of(2).items() if key != "labels"}
    with pytest.raises(ValueError, match="base_kl_weight wants `labels`"):
        trainer.compute_loss(model, without)


def test_full_fine_tuning_has_no_base_to_compare_with(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, base_kl_weight=1.0)
    with pytest.raises(ValueError, match="base_kl_weight wants a PEFT model"):
        train_baseline(
            recipe, tmp_path / "full", Baseline(components=None), stages=[full_stage(1e-3, 1.0)]
        )


def test_plain_softmax_is_what_a_divergence_means() -> None:
    torch.manual_seed(0)
    ours, base = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    answers = citi.base_kl.BaseAnswers(torch.ones(5, dtype=torch.bool), base)
    answers.divergence(ours).backward()
    torch.testing.assert_close(ours.grad, functional.softmax(ours, -1) - base.softmax(-1))
