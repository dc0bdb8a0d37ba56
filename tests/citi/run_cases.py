"""What the tests of stages, Trainer and run share: adapted tiny models, tiny data, tiny recipes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import TrainingArguments

import citi.report
from citi.adapters import MoLoraConfig
from citi.components import find_components
from citi.data import Collator
from citi.importance.ability_scores import AbilityScores
from citi.recipe import Recipe
from citi.trainer import CitiTrainer
from tiny import tiny_model, tiny_tokenizer

IGNORED = -100


def adapted_model(
    architecture: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    num_important: int = 4,
    num_unimportant: int = 2,
    seed: int = 0,
    fresh: bool = False,
    **config,
) -> PeftModel:
    """A tiny model with MOLoRA on its first components and its last ones as modules_to_save.

    Unless `fresh`, B is random, so that every parameter has a gradient.
    """
    model = tiny_model(architecture, seed=seed, dtype=dtype)
    names = [component.name for component in find_components(model)[0]]
    config = {"num_experts": 2, "r": 4, "task_type": "CAUSAL_LM"} | config
    torch.manual_seed(seed)
    adapted = get_peft_model(
        model,
        MoLoraConfig(
            target_modules=names[:num_important],
            modules_to_save=names[len(names) - num_unimportant :] or None,
            **config,
        ),
    )
    if not fresh:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "molora_B" in name:
                    parameter.normal_(std=0.1)
    return adapted


class Items(Dataset):
    """Rendered samples of random tokens; tool and general ones take turns."""

    def __init__(self, num_samples: int, *, seed: int = 0, masked: tuple[int, ...] = ()) -> None:
        rng = random.Random(seed)
        self.items = []
        for index in range(num_samples):
            length = rng.randint(6, 14)
            tokens = [rng.randint(3, 258) for _ in range(length)]
            prompt = length if index in masked else rng.randint(2, length - 2)
            labels = [IGNORED] * prompt + tokens[prompt:]
            self.items.append({"input_ids": tokens, "labels": labels, "task_type": (index + 1) % 2})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


class InOrder(CitiTrainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, *args, **kwargs) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def make_trainer(
    model: nn.Module,
    folder: Path,
    dataset: Dataset,
    *,
    stage=None,
    trainer: type = InOrder,
    batch_size: int = 2,
    accumulation: int = 1,
    max_steps: int = -1,
    epochs: float = 1.0,
    learning_rate: float = 1e-2,
    settings: dict | None = None,
    **arguments,
) -> CitiTrainer:
    """A Trainer on the CPU that saves nothing unless told to."""
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps,
        learning_rate=learning_rate,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_nan_inf_filter=False,
        **({"save_strategy": "no"} | (settings or {})),
    )
    return trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(0),
        stage=stage,
        **arguments,
    )


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names whose tensors are not bitwise what they were."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {
        name
        for name, old in before.items()
        if old.dtype != after[name].dtype or not torch.equal(old, after[name])
    }


def write_model(folder: Path, architecture: str = "llama", **settings) -> Path:
    """A tiny model and tokenizer on the disk."""
    tiny_model(architecture, **settings).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_data(folder: Path, *, num_samples: int = 6) -> dict[str, Path]:
    """tool.jsonl, math.jsonl and chat.jsonl of short conversations."""
    cities = ["Rome", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Paris", "Tunis"]
    rows = {"tool": [], "math": [], "chat": []}
    for index in range(num_samples):
        city = cities[index % len(cities)]
        rows["tool"].append((f"Weather in {city}?", f"API-Request: [Weather(city='{city}')]"))
        rows["math"].append((f"{index} + {index}?", f"The answer is: {2 * index}"))
        rows["chat"].append((f"Is {city} nice?", f"Yes, {city} is."))
    files = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in rows.items():
        files[name] = folder / f"{name}.jsonl"
        lines = [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
            for question, answer in pairs
        ]
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def tiny_recipe(folder: Path, architecture: str = "llama", **values) -> Recipe:
    """A recipe whose stages take six steps (RP), twelve (MI) and six (UCO) of three samples."""
    model = folder / f"model-{architecture}"
    if not model.is_dir():
        write_model(model, architecture)
    files = write_data(folder / "data")
    settings = {
        "model": str(model),
        "tool": {"tool": str(files["tool"])},
        "general": {"math": str(files["math"]), "chat": str(files["chat"])},
        "output": str(folder / "run"),
        "dtype": "fp32",
        "importance_samples": 2,
        "num_experts": 2,
        "r": 2,
        "batch_size": 3,
        "gradient_accumulation": 1,
        "learning_rate": 1e-2,
        "uco_learning_rate": 1e-3,
        "max_length": 96,
        "save_steps": 2,
        "eval_batch_size": 4,
        "max_new_tokens": 4,
    }
    return Recipe(**(settings | values))


@contextmanager
def without_figures() -> Iterator[None]:
    """Figures take longer than the training of a tiny run, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(citi.report, "build_report", lambda path: None)
        patch.setattr(AbilityScores, "plot", lambda scores, path: None)
        yield


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a saved adapter."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different[:5]
