"""The loss of RouterLossMixin: its value, its scale, and that it does not depend on the split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_cases import InOrder, Items, adapted_model, make_trainer, snapshot
from torch import Tensor, nn
from transformers import TrainerCallback

from citi.data import Collator
from citi.stages import MI, UCO
from citi.trainer import RouterLossMixin
from citi_kernels import RoutingContext, router_loss
from tiny import ARCHITECTURES


class GradientKeeper(TrainerCallback):
    """Keeps the gradients that each optimizer step was given."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append(
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )


class LogKeeper(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.logs.append(dict(logs))


def step_gradients(
    folder: Path, dataset, *, model: nn.Module | None = None, settings=None, **arguments
) -> list[dict[str, Tensor]]:
    """Gradients of every optimizer step, unclipped, with weights that stay put."""
    keeper = GradientKeeper()
    trainer = make_trainer(
        adapted_model() if model is None else model,
        folder,
        dataset,
        stage=MI,
        learning_rate=0.0,
        settings={"max_grad_norm": 0.0, "optim": "sgd"} | (settings or {}),
        callbacks=[keeper],
        **arguments,
    )
    trainer.train()
    return keeper.steps


def assert_close_gradients(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], rtol=1e-4, atol=1e-7, msg=name)


def expected_parts(model: nn.Module, batch: dict, *, kind: str, delta: float) -> tuple:
    """Cross entropy and summed router loss of one batch, by the formulas."""
    with RoutingContext.from_attention_mask(batch["attention_mask"]) as context:
        outputs = model(**{k: v for k, v in batch.items() if k != "task_types"})
    routing = sum(
        router_loss(
            layer, batch["attention_mask"].sum(1), batch["task_types"], kind=kind, delta=delta
        ).sum()
        for layer in context.stacked()
    )
    return outputs.loss, routing


@pytest.mark.parametrize("kind", ["cv2", "dispersion"])
def test_the_loss_is_cross_entropy_plus_the_weighted_sum_of_the_layers(
    kind: str, tmp_path: Path
) -> None:
    model, dataset = adapted_model(), Items(3)
    batch = Collator(0)([dataset[i] for i in range(3)])
    settings = {"router_loss": kind, "router_loss_weight": 0.3, "delta": 0.5}
    trainer = make_trainer(model, tmp_path, dataset, stage=MI, **settings)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    loss = trainer.compute_loss(model, batch)
    cross_entropy, routing = expected_parts(model, batch, kind=kind, delta=0.5)
    torch.testing.assert_close(loss, cross_entropy + 0.3 * routing)
    assert routing > 0
    assert "task_types" in batch


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_sees_positions_that_predict_an_answer_only(
    architecture: str, tmp_path: Path
) -> None:
    model, dataset = adapted_model(architecture), Items(3)
    batch = Collator(0)([dataset[i] for i in range(3)])
    trainer = make_trainer(model, tmp_path, dataset, stage=MI, router_loss_weight=0.0)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    seen = []
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss = trainer.compute_loss(model, batch)
    whole = model(**{k: v for k, v in batch.items() if k != "task_types"}).loss
    answers = (batch["labels"][:, 1:] != -100).any(0).sum().item()
    assert seen == [answers, batch["input_ids"].shape[1]]
    torch.testing.assert_close(loss, whole)
    assert_close_gradients(gradients(loss), gradients(whole))


def test_every_router_gets_a_gradient_from_the_router_loss_alone(tmp_path: Path) -> None:
    model = adapted_model(fresh=True)  # B = 0: the cross entropy says nothing to the routers
    steps = step_gradients(tmp_path / "on", Items(4), model=model)
    routers = [name for name in steps[0] if "molora_router" in name]
    assert routers
    assert all(steps[0][name].abs().sum() > 0 for name in routers)
    off = step_gradients(tmp_path / "off", Items(4), model=model, router_loss_weight=0.0)
    assert all(off[0][name].abs().sum() == 0 for name in routers)


def test_case_42_cross_entropy_does_not_depend_on_the_accumulation_split(tmp_path: Path) -> None:
    # Ten samples: windows of 4, 4 and a short one of 2, with other label counts in each.
    whole = step_gradients(tmp_path / "a", Items(10), batch_size=4, router_loss_weight=0.0)
    for batch_size, accumulation in ((2, 2), (1, 4)):
        split = step_gradients(
            tmp_path / f"b{accumulation}",
            Items(10),
            batch_size=batch_size,
            accumulation=accumulation,
            router_loss_weight=0.0,
        )
        assert len(split) == len(whole) == 3
        for one, other in zip(whole, split, strict=True):
            assert_close_gradients(one, other)


def test_case_42_logged_losses_do_not_depend_on_the_accumulation_split(tmp_path: Path) -> None:
    losses = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            adapted_model(),
            tmp_path / str(accumulation),
            Items(10),
            stage=MI,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=0.0,
            router_loss_weight=0.0,
        )
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        losses.append([(row["loss"], row["ce_loss"]) for row in rows])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


class _Twice(Items):
    """Every pair of samples is there twice, one after the other."""

    def __getitem__(self, index: int) -> dict:
        return self.items[index // 4 * 2 + index % 2]


@pytest.mark.parametrize("kind", ["cv2", "dispersion"])
def test_case_42_two_identical_micro_batches_equal_one(kind: str, tmp_path: Path) -> None:
    # The router loss pools a micro-batch, so this is what it promises of accumulation.
    settings = {"batch_size": 2, "router_loss": kind, "router_loss_weight": 1.0}
    once = step_gradients(tmp_path / "a", Items(6), **settings)
    twice = step_gradients(tmp_path / "b", _Twice(12), accumulation=2, **settings)
    assert len(once) == 3
    for step, doubled in enumerate(twice):
        assert_close_gradients(once[step], doubled)


def test_case_42_the_short_last_window_averages_its_own_micro_batches(tmp_path: Path) -> None:
    settings = {"batch_size": 1, "router_loss_weight": 1.0}
    alone = step_gradients(tmp_path / "a", Items(3), **settings)
    windows = step_gradients(tmp_path / "b", Items(3), accumulation=2, **settings)
    assert len(windows) == 2
    assert_close_gradients(windows[1], alone[2])


class _MeanLossModel(InOrder):
    """As for a model that takes no loss arguments: the Trainer divides by the steps itself."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def test_case_42_models_without_loss_arguments_are_divided_once(tmp_path: Path) -> None:
    settings = {"batch_size": 2, "router_loss_weight": 1.0}
    once = step_gradients(tmp_path / "a", Items(2), **settings)
    twice = step_gradients(
        tmp_path / "b", _Twice(4), trainer=_MeanLossModel, accumulation=2, **settings
    )
    assert_close_gradients(once[0], twice[0])


@pytest.mark.parametrize("stage", [MI, UCO], ids=lambda stage: stage.name)
def test_case_33_activation_checkpointing_changes_no_gradient(stage, tmp_path: Path) -> None:
    from citi.stage_training import _checkpointing

    runs = []
    for enabled in (False, True):
        keeper = GradientKeeper()
        trainer = make_trainer(
            adapted_model(),
            tmp_path / str(enabled),
            Items(4),
            stage=stage,
            learning_rate=0.0,
            settings=_checkpointing(enabled),
            callbacks=[keeper],
            router_loss_weight=1.0,
        )
        trainer.train()
        rows = [row for row in trainer.state.log_history if "router_loss" in row]
        runs.append((keeper.steps, [row["router_loss"] for row in rows]))
    for plain, checkpointed in zip(runs[0][0], runs[1][0], strict=True):
        assert_close_gradients(plain, checkpointed)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)


def test_case_33_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(
        adapted_model(),
        tmp_path,
        Items(4),
        stage=MI,
        settings={
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    )
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        trainer.train()


def test_log_lines_carry_the_parts_of_the_loss_and_the_gates(tmp_path: Path) -> None:
    model, dataset = adapted_model(), Items(8)
    trainer = make_trainer(
        model, tmp_path, dataset, stage=MI, batch_size=4, learning_rate=0.0, router_loss_weight=0.5
    )
    trainer.train()
    first = trainer.state.log_history[0]
    batch = Collator(0)([dataset[i] for i in range(4)])
    model.train()
    cross_entropy, routing = expected_parts(model, batch, kind="cv2", delta=0.95)
    assert first["ce_loss"] == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert first["router_loss"] == pytest.approx(routing.item(), rel=1e-5)
    assert first["loss"] == pytest.approx(first["ce_loss"] + 0.5 * first["router_loss"], rel=1e-5)
    with RoutingContext.from_attention_mask(batch["attention_mask"]) as context:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    backbone_B = sum(layer[:, :, 0].sum(0) for layer in context.stacked())
    tokens_B = batch["attention_mask"].sum(1) * sum(len(x) for x in context.stacked())
    for kind, name in ((1, "backbone_gate_tool"), (0, "backbone_gate_general")):
        chosen = batch["task_types"] == kind
        wanted = (backbone_B[chosen].sum() / tokens_B[chosen].sum()).item()
        assert first[name] == pytest.approx(wanted, rel=1e-5)


def test_evaluation_needs_no_task_types_and_measures_cross_entropy_alone(tmp_path: Path) -> None:
    model, dataset = adapted_model(), Items(4)
    trainer = make_trainer(
        model, tmp_path, dataset, stage=MI, settings={"per_device_eval_batch_size": 4}
    )
    batch = Collator(0)([dataset[i] for i in range(4)])
    model.eval()
    cross_entropy, _ = expected_parts(model, batch, kind="cv2", delta=0.95)
    measured = trainer.evaluate(dataset)["eval_loss"]
    assert measured == pytest.approx(cross_entropy.item(), rel=1e-5)
    del batch["task_types"]
    loss, logits, labels = trainer.prediction_step(model, batch, prediction_loss_only=False)
    assert loss.item() == pytest.approx(measured, rel=1e-5)
    assert logits.shape[:2] == labels.shape
    unlabelled = {"input_ids": batch["input_ids"], "task_types": torch.ones(4).long()}
    assert trainer.prediction_step(model, unlabelled, prediction_loss_only=False)[0] is None


def test_training_without_task_types_names_them(tmp_path: Path) -> None:
    model = adapted_model().train()
    trainer = make_trainer(model, tmp_path, Items(4), stage=MI)
    batch = Collator(0)([Items(4)[0]])
    wrong = batch | {"task_types": torch.tensor([1, 0])}
    with pytest.raises(ValueError, match="2 entries for 1 rows"):
        trainer.compute_loss(model, wrong)
    del batch["task_types"]
    with pytest.raises(ValueError, match=r"`task_types` in every training batch"):
        trainer.compute_loss(model, batch)


def test_a_dead_router_loss_is_refused(tmp_path: Path) -> None:
    model = adapted_model()
    trainer = make_trainer(model, tmp_path, Items(4))
    with model.disable_adapter(), pytest.raises(ValueError, match="no MOLoRA layer ran"):
        trainer.compute_loss(model.train(), Collator(0)([Items(4)[0]]))


def test_the_mixin_works_on_trls_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tiny import tiny_tokenizer

    class RoutedSFTTrainer(RouterLossMixin, trl.SFTTrainer):
        pass

    model = adapted_model()
    before = snapshot(model)
    trainer = RoutedSFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(Items(8).items),
        data_collator=Collator(0),
        processing_class=tiny_tokenizer(),
        router_loss_weight=0.1,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "router_loss" in row]
    assert len(rows) == 2
    assert rows[0]["loss"] == pytest.approx(rows[0]["ce_loss"] + 0.1 * rows[0]["router_loss"])
    assert any(
        not torch.equal(before[n], t) for n, t in model.state_dict().items() if "router" in n
    )


def test_metrics_are_json_numbers(tmp_path: Path) -> None:
    keeper = LogKeeper()
    make_trainer(
        adapted_model(), tmp_path, Items(4), stage=MI, callbacks=[keeper], batch_size=4
    ).train()
    assert json.loads(json.dumps(keeper.logs)) == keeper.logs
