"""Baselines other than LoRA everywhere: full fine-tuning, chosen components, components whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_cases import adapter_tensors, tiny_recipe
from torch import nn
from torch.utils.data import Dataset

import citi.baseline
from citi.base_model import load_base
from citi.baseline import Baseline, full_stage, lora_stage, train_baseline, whole_stage
from citi.components import find_components
from citi.data import Collator
from citi.observer import RunObserver
from citi.stages import StageError

SHORT = {"epochs_rp": 0.0, "epochs_mi": 1.0, "epochs_uco": 0.0}


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


class KillAt(RunObserver):
    def __init__(self, stage: str, step: int) -> None:
        self.place = (stage, step)

    def metrics(self, stage: str, step: int, values) -> None:
        if (stage, step) == self.place:
            raise Killed


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logged(folder: Path) -> list[tuple[str, int]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["stage"], row["step"]) for row in map(json.loads, lines) if "loss" in row]


def test_full_fine_tuning_moves_every_parameter_and_is_loaded_afterwards(tmp_path: Path) -> None:
    recipe, full = tiny_recipe(tmp_path, **SHORT), Baseline(components=None)
    base = weights(load_base(recipe.model, dtype=recipe.dtype)[0])
    stages = [full_stage(1e-2, 2.0)]
    model, _ = train_baseline(recipe, tmp_path / "full", full, stages=stages)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, base[name])}
    assert moved == {name for name, _ in model.named_parameters()}
    assert logged(tmp_path / "full") == [("full", step) for step in (1, 2, 3, 4)]
    again, _ = train_baseline(recipe, tmp_path / "full", full, stages=stages)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["metrics.jsonl", "model"]


def test_a_bf16_base_is_trained_in_fp32_and_given_back_in_bf16(tmp_path: Path, monkeypatch) -> None:
    recipe = tiny_recipe(tmp_path, **(SHORT | {"dtype": "bf16"}))
    trained_in = set()
    train_stage = citi.baseline.train_stage

    def look(model, *args, **kwargs):
        train_stage(model, *args, **kwargs)
        trained_in.update(parameter.dtype for parameter in model.parameters())

    monkeypatch.setattr(citi.baseline, "train_stage", look)
    full, stages = Baseline(components=None), [full_stage(1e-3, 1.0)]
    model, _ = train_baseline(recipe, tmp_path / "full", full, stages=stages)
    assert trained_in == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    again, _ = train_baseline(recipe, tmp_path / "full", full, stages=stages)
    buffers = dict(model.named_buffers())
    assert buffers
    for name, buffer in again.named_buffers():  # rotary frequencies stay in fp32
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype, name


@pytest.mark.parametrize(("stage", "step"), [("lora", 1), ("whole", 1)])
def test_pairs_and_whole_components_train_in_stages_of_their_own(
    tmp_path: Path, stage: str, step: int
) -> None:
    recipe = tiny_recipe(tmp_path, **SHORT)
    names = [c.name for c in find_components(load_base(recipe.model)[0])[0]]
    baseline = Baseline(components=tuple(names[:2]), whole=(names[-1],))
    stages = [lora_stage(1e-2, 1.0), whole_stage(1e-2, 1.0)]
    train_baseline(recipe, tmp_path / "unbroken", baseline, stages=stages)
    tensors = adapter_tensors(tmp_path / "unbroken" / "adapter")
    owners = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in tensors}
    assert owners == {*names[:2], names[-1].rpartition(".")[0]}
    assert all(tensor.any() for tensor in tensors.values())
    assert logged(tmp_path / "unbroken") == [("lora", 1), ("lora", 2), ("whole", 1), ("whole", 2)]

    with pytest.raises(Killed):
        train_baseline(
            recipe, tmp_path / "broken", baseline, stages=stages, observer=KillAt(stage, step + 1)
        )
    train_baseline(recipe, tmp_path / "broken", baseline, stages=stages)
    again = adapter_tensors(tmp_path / "broken" / "adapter")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name
    assert logged(tmp_path / "broken") == logged(tmp_path / "unbroken")


def test_the_stage_of_whole_components_leaves_the_pairs_as_they_are(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **SHORT)
    names = [c.name for c in find_components(load_base(recipe.model)[0])[0]]
    baseline = Baseline(components=(names[0],), whole=(names[-1],))
    first = [lora_stage(1e-2, 1.0)]
    train_baseline(recipe, tmp_path / "pairs", baseline, stages=first)
    train_baseline(recipe, tmp_path / "both", baseline, stages=[*first, whole_stage(1e-2, 1.0)])
    pairs, both = (adapter_tensors(tmp_path / f / "adapter") for f in ("pairs", "both"))
    for name in pairs:
        assert torch.equal(pairs[name], both[name]) == ("lora_" in name), name


def test_the_callers_training_data_is_what_a_stage_trains_on(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **SHORT)
    asked = []

    def training_data(stage, tokenizer):
        asked.append(stage.name)
        item = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "task_type": 0}
        return [item] * 9, Collator(tokenizer.pad_token_id)

    stages = [lora_stage(1e-2, 1.0)]
    folder = tmp_path / "lora"
    train_baseline(recipe, folder, Baseline(), stages=stages, training_data=training_data)
    assert asked == ["lora"]
    assert logged(folder) == [("lora", 1), ("lora", 2), ("lora", 3)], "nine samples, three a step"


class Numbered(Dataset):
    """Samples whose first token says which they are."""

    def __init__(self, shuffle: bool | None = None) -> None:
        if shuffle is not None:
            self.shuffle = shuffle

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": [index + 5, 6, 7], "labels": [-100, 6, 7], "task_type": 0}


@pytest.mark.parametrize(("shuffle", "is_in_order"), [(None, False), (True, False), (False, True)])
def test_a_data_set_may_keep_its_order(
    tmp_path: Path, shuffle: bool | None, is_in_order: bool
) -> None:
    taken = []

    def training_data(stage, tokenizer):
        def collate(items):
            taken.extend(item["input_ids"][0] - 5 for item in items)
            return Collator(tokenizer.pad_token_id)(items)

        return Numbered(shuffle), collate

    train_baseline(
        tiny_recipe(tmp_path, **SHORT),
        tmp_path / "lora",
        Baseline(),
        stages=[lora_stage(1e-2, 1.0)],
        training_data=training_data,
    )
    assert sorted(taken) == list(range(9))
    assert (taken == list(range(9))) == is_in_order


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole"):
        Baseline(components=None, whole=("model.layers.0.mlp.up_proj",))
    stages = [whole_stage(1e-2, 1.0)]
    with pytest.raises(StageError, match="unimportant"):
        train_baseline(tiny_recipe(tmp_path, **SHORT), tmp_path / "x", Baseline(), stages=stages)
