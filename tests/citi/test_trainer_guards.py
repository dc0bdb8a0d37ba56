"""What CitiTrainer refuses to do: train the wrong things, step on NaN, trust half a checkpoint."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from run_cases import InOrder, Items, adapted_model, changed, make_trainer, snapshot
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback

from citi.checkpoints import (
    SEAL,
    checkpoint_stage,
    discard_incomplete,
    is_complete,
    last_complete_checkpoint,
)
from citi.data import Collator
from citi.durable import WriteError
from citi.stages import MI, RP, UCO, StageError, stage_parameters
from citi.trainer import (
    CitiTrainer,
    MaskedBatchError,
    NonFiniteLossError,
    TrainingError,
    takes_positions,
)
from tiny import tiny_model

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.action()


@pytest.mark.parametrize("stage", [MI, UCO], ids=lambda stage: stage.name)
def test_case_41_a_bf16_base_trains_fp32_parameters_under_autocast(stage, tmp_path: Path) -> None:
    model = adapted_model(dtype=torch.bfloat16)
    names = stage_parameters(model, stage)
    trainer = make_trainer(model, tmp_path, Items(8), stage=stage, settings={"bf16": True})
    before = snapshot(model)
    trainer.train()
    after = dict(model.named_parameters())
    assert {after[name].dtype for name in names} == {torch.float32}
    assert changed(before, model) == set(names)
    assert next(iter(trainer.optimizer.state.values()))["exp_avg"].dtype == torch.float32
    assert "forward" not in model.__dict__, "the autocast wrapper must not outlive the stage"


def test_case_43_a_batch_without_labels_is_zero_with_a_graph(tmp_path: Path) -> None:
    model = adapted_model().train()
    trainer = make_trainer(model, tmp_path, Items(2), stage=MI, router_loss_weight=0.0)
    dataset = Items(2, masked=(0, 1))
    batch = Collator(0)([dataset[0], dataset[1]])
    for accepts, items in ((True, torch.tensor(0)), (True, None), (False, None)):
        trainer.model_accepts_loss_kwargs = accepts
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
        assert loss.item() == 0
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and not g.any() for g in gradients)


def test_case_43_batches_without_labels_are_counted_and_change_nothing(tmp_path: Path) -> None:
    model = adapted_model()
    dataset = Items(8, masked=(4, 5))
    seen = {}
    trainer = make_trainer(
        model,
        tmp_path,
        dataset,
        stage=MI,
        settings={"optim": "sgd"},
        router_loss_weight=0.0,
        max_masked_share=0.25,
        callbacks=[At(2, lambda: seen.update(before=snapshot(model)))],
    )
    trainer.add_callback(At(3, lambda: seen.update(moved=changed(seen["before"], model))))
    trainer.train()
    assert trainer.num_masked_batches == 1
    assert seen["moved"] == set()
    assert changed(seen["before"], model)


def test_case_43_more_than_one_percent_of_masked_batches_stops(tmp_path: Path) -> None:
    trainer = make_trainer(
        adapted_model(), tmp_path, Items(40, masked=(2, 3)), stage=MI, router_loss_weight=0.0
    )
    with pytest.raises(MaskedBatchError, match=r"stage mi, step 2: 1 of 20 batches have no label"):
        trainer.train()


def test_case_43_one_percent_of_masked_batches_is_let_through(tmp_path: Path) -> None:
    dataset = Items(100, masked=(3,))
    trainer = make_trainer(
        adapted_model(), tmp_path, dataset, stage=MI, batch_size=1, accumulation=25
    )
    trainer.train()
    assert trainer.num_masked_batches == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_case_44_a_spoiled_weight_stops_before_the_step(accumulation: int, tmp_path: Path) -> None:
    model = adapted_model()
    name = "base_model.model.model.layers.1.post_attention_layernorm.weight"
    seen = {}

    def spoil() -> None:
        model.get_parameter(name).data[0] = float("nan")
        seen["before"] = snapshot(model)

    trainer = make_trainer(
        model,
        tmp_path,
        Items(8),
        stage=MI,
        batch_size=1,
        accumulation=accumulation,
        callbacks=[At(2, spoil)],
    )
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "stage mi, step 3: the loss is not finite" in message
    assert f"first bad parameter: {name} (its value)" in message
    after = {n: torch.nan_to_num(t) for n, t in model.state_dict().items()}
    assert all(torch.equal(torch.nan_to_num(t), after[n]) for n, t in seen["before"].items())


def test_case_44_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    model = adapted_model()
    name = stage_parameters(model, MI)[3]
    model.get_parameter(name).register_hook(lambda gradient: gradient * float("inf"))
    before = snapshot(model)
    trainer = make_trainer(model, tmp_path, Items(8), stage=MI)
    with pytest.raises(NonFiniteLossError, match=r"step 1: the gradient is not finite") as caught:
        trainer.train()
    assert f"first bad parameter: {name} (its gradient)" in str(caught.value)
    assert changed(before, model) == set()


def test_case_47_another_stages_checkpoint_gives_its_weights_and_a_fresh_optimizer(
    tmp_path: Path,
) -> None:
    first = adapted_model()
    make_trainer(first, tmp_path / "rp", Items(8), stage=RP, settings=SAVING).train()
    checkpoint = last_complete_checkpoint(tmp_path / "rp")
    assert checkpoint_stage(checkpoint) == "rp"

    second = adapted_model(seed=1)
    starts = {}

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
            starts["step"] = state.global_step
            starts["held"] = {id(p) for g in optimizer.param_groups for p in g["params"]}
            starts["moments"] = len(optimizer.state)
            starts["weights"] = snapshot(second)

    trainer = make_trainer(second, tmp_path / "mi", Items(8), stage=MI, callbacks=[Start()])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    names = stage_parameters(second, MI)
    assert starts["step"] == 0
    assert starts["moments"] == 0
    assert starts["held"] == {id(second.get_parameter(name)) for name in names}
    saved = first.state_dict()
    assert all(torch.equal(starts["weights"][name], saved[name]) for name in names)
    assert trainer.state.global_step == 4


def test_case_47_the_trainable_set_is_checked_after_a_resume(tmp_path: Path) -> None:
    make_trainer(adapted_model(), tmp_path, Items(8), stage=MI, settings=SAVING).train()

    class Thaws(InOrder):
        """As PEFT versions that make everything trainable when they load an adapter."""

        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            self.model.get_parameter(stage_parameters(self.model, UCO)[0]).requires_grad_(True)
            return optimizer

    trainer = make_trainer(
        adapted_model(), tmp_path, Items(8), stage=MI, settings=SAVING, trainer=Thaws
    )
    with pytest.raises(StageError, match=r"resumed at step 4: 1 parameters train that must not"):
        trainer.train(resume_from_checkpoint=True)


def test_a_resume_trains_the_stages_parameters_though_loading_thawed_others(tmp_path: Path) -> None:
    make_trainer(adapted_model(), tmp_path, Items(8), stage=RP, settings=SAVING).train()
    for path in tmp_path.glob("checkpoint-4"):
        path.rename(tmp_path / "set-aside")
    model = adapted_model()
    load = model.load_adapter

    def load_and_thaw(*args, **kwargs):
        result = load(*args, **kwargs)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return result

    model.load_adapter = load_and_thaw
    before = snapshot(model)
    trainer = make_trainer(model, tmp_path, Items(8), stage=RP, settings=SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert changed(before, model) == set(stage_parameters(model, RP))


def test_a_plain_trainer_without_a_stage_trains_what_it_is_given(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    before = snapshot(model)
    trainer = make_trainer(model, tmp_path, Items(8), router_loss_weight=0.0)
    trainer.train()
    assert isinstance(trainer, CitiTrainer)
    assert changed(before, model) == names
    assert "router_loss" in trainer.state.log_history[0]


def _complete_checkpoint(folder: Path, step: int) -> Path:
    trainer = make_trainer(
        adapted_model(), folder, Items(2 * step), stage=MI, settings=SAVING | {"save_steps": step}
    )
    trainer.train()
    return folder / f"checkpoint-{step}"


def test_case_45_only_whole_checkpoints_are_resumed_from(tmp_path: Path) -> None:
    early = _complete_checkpoint(tmp_path, 2)
    whole = _complete_checkpoint(tmp_path / "later", 4)
    contents = {
        path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()
    }
    assert is_complete(early)
    assert Path(SEAL) in contents
    late = tmp_path / "checkpoint-4"
    # In the order of writing, every prefix of the files, and the next one cut in half.
    written = [name for name in contents if name != Path(SEAL)] + [Path(SEAL)]
    for count in range(len(written)):
        for tail in (None, contents[written[count]][: len(contents[written[count]]) // 2]):
            for name in written[:count]:
                (late / name).parent.mkdir(parents=True, exist_ok=True)
                (late / name).write_bytes(contents[name])
            late.mkdir(exist_ok=True)
            if tail is not None:
                (late / written[count]).write_bytes(tail)
            assert last_complete_checkpoint(tmp_path) == early
            assert discard_incomplete(tmp_path) == [late]
            assert not late.exists()
    whole.rename(late)
    assert last_complete_checkpoint(tmp_path) == late


def test_case_45_a_checkpoint_whose_file_was_cut_later_is_not_complete(tmp_path: Path) -> None:
    checkpoint = _complete_checkpoint(tmp_path, 2)
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert last_complete_checkpoint(tmp_path) is None
    weights.unlink()
    assert not is_complete(checkpoint)


def test_no_checkpoint_of_a_missing_folder(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "none") is None
    assert discard_incomplete(tmp_path / "none") == []


def test_two_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch) -> None:
    from transformers import TrainingArguments

    model: nn.Module = adapted_model()
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="accelerate launch"):
        make_trainer(model, tmp_path, Items(2), stage=MI)


def test_case_45_a_cut_checkpoint_is_not_resumed_from_when_named(tmp_path: Path) -> None:
    checkpoint = _complete_checkpoint(tmp_path, 2)
    state = checkpoint / "scheduler.pt"
    state.unlink()
    trainer = make_trainer(adapted_model(), tmp_path, Items(8), stage=MI, max_steps=4)
    with pytest.raises(TrainingError, match="checkpoint-2 is no complete checkpoint"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_case_40_sharded_parameters_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP spreads them"):
        make_trainer(adapted_model(), tmp_path, Items(2), stage=MI)


def test_a_16_bit_base_without_autocast_is_refused_before_it_trains(tmp_path: Path) -> None:
    model = adapted_model(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"trains in fp32 beside a base in 16 bit.*bf16=True"):
        make_trainer(model, tmp_path, Items(2), stage=UCO)
    trainer = make_trainer(
        adapted_model(dtype=torch.bfloat16), tmp_path, Items(2), stage=UCO, settings={"bf16": True}
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_an_adapter_of_another_name_goes_on_in_the_next_stage(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_model(), adapted_model().peft_config["default"], adapter_name="tools"
    )
    settings = {"adapter": "tools", "settings": SAVING}
    make_trainer(model, tmp_path, Items(4), stage=RP, **settings).train()
    before = snapshot(model)
    trainer = make_trainer(model, tmp_path, Items(4), stage=MI, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert changed(before, model) == set(stage_parameters(model, MI, "tools"))
    with pytest.raises(ValueError, match="trains 'default', but active are \\['tools'\\]"):
        make_trainer(model, tmp_path, Items(4), stage=MI)


def test_a_model_with_a_loss_of_its_own_gets_whole_logits(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bart",
        vocab_size=300,
        d_model=32,
        decoder_layers=2,
        decoder_ffn_dim=48,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert not takes_positions(model)
    assert takes_positions(tiny_model())
    trainer = make_trainer(model, tmp_path, Items(4), router_loss_weight=0.0)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("key", ["stage", "files"])
def test_case_53_a_seal_without_a_key_is_no_seal(key: str, tmp_path: Path) -> None:
    checkpoint = _complete_checkpoint(tmp_path, 1)
    seal = json.loads((checkpoint / SEAL).read_text())
    del seal[key]
    (checkpoint / SEAL).write_text(json.dumps(seal))
    assert not is_complete(checkpoint)
    assert checkpoint_stage(checkpoint) is None
    assert last_complete_checkpoint(tmp_path) is None


def test_case_55_a_full_disk_at_a_checkpoint_is_named(tmp_path: Path, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Trainer, "_save_checkpoint", refuse)
    trainer = make_trainer(adapted_model(), tmp_path, Items(2), stage=MI, settings=SAVING)
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}: the disk is full"):
        trainer.train()
