"""What CITI is compared with: LoRA on chosen components, or full fine-tuning."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from citi.base_model import load_base
from citi.data import Collator, RenderedDataset
from citi.durable import directory_in_one_step, recover_directory
from citi.observer import RunObserver
from citi.positions import length_limit
from citi.recipe import Recipe
from citi.run import read_training_samples
from citi.run_directory import RunDirectory
from citi.run_evaluation import evaluation_sets, measure
from citi.run_model import save_adapter
from citi.stage_training import TrainingData, train_stage
from citi.stages import LORA, UNIMPORTANT, Stage, lower_to_base_dtype

NAME = "lora"


@dataclass(frozen=True)
class Baseline:
    """What a baseline may train.

    Attributes:
        components: Where LoRA pairs go: full names, or "all-linear". None: no adapter, every
            parameter of the model trains.
        whole: Components that are trained whole, in a stage of their own, as UCO does.
    """

    components: str | tuple[str, ...] | None = "all-linear"
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.whole and self.components is None:
            raise ValueError("whole: wanted none, since full fine-tuning trains every component")


def lora_stage(learning_rate: float, epochs: float, *, title: str = "plain LoRA") -> Stage:
    """The stage that trains LoRA pairs."""
    return Stage(NAME, title, "stage_lora", frozenset({LORA}), learning_rate, epochs)


def whole_stage(learning_rate: float, epochs: float) -> Stage:
    """The stage that trains `Baseline.whole`, with the LoRA pairs frozen."""
    title, trains = "components trained whole", frozenset({UNIMPORTANT})
    return Stage("whole", title, "stage_whole", trains, learning_rate, epochs)


def full_stage(learning_rate: float, epochs: float) -> Stage:
    """The stage that trains every parameter."""
    return Stage("full", "full fine-tuning", "stage_full", frozenset(), learning_rate, epochs)


def compare_with_lora(
    recipe: Recipe, *, learning_rate: float = 2e-4, observer: RunObserver | None = None
) -> bool:
    """Train and measure plain LoRA beside a finished CITI run: eval/lora.json.

    Args:
        recipe: The recipe of the run, with evaluation data.
        learning_rate: Of LoRA, whose best is not CITI's.
        observer: Told of progress and metrics.
    Returns:
        False when it had been measured before.
    """
    run, observer = RunDirectory.of(recipe), observer or RunObserver()
    title = "plain LoRA on the tool data, to compare with"
    if (run.evaluation / f"{NAME}.json").is_file():
        observer.phase_skipped(NAME, title, "done earlier")
        return False
    observer.phase_started(NAME, title)
    began = time.monotonic()
    model, tokenizer = train_lora_baseline(
        recipe, run.path / NAME, learning_rate=learning_rate, observer=observer
    )
    tool, general = evaluation_sets(recipe)
    measure(
        NAME,
        model,
        tokenizer,
        run=run,
        recipe=recipe,
        tool=tool,
        general=general,
        observer=observer,
    )
    observer.phase_finished(NAME, time.monotonic() - began)
    return True


def train_lora_baseline(
    recipe: Recipe,
    folder: str | Path,
    *,
    learning_rate: float = 2e-4,
    epochs: float | None = None,
    observer: RunObserver | None = None,
) -> tuple[PeftModel, Any]:
    """What most people would run: LoRA of the recipe's rank on every linear layer, tool data only.

    Args:
        recipe: Names the model and the tool data.
        folder: See `train_baseline`.
        learning_rate: Peak of the cosine schedule.
        epochs: Passes over the tool data; None takes epochs_mi, CITI's passes over its experts.
        observer: Told of progress and metrics.
    Returns:
        The trained model, in evaluation mode, and its tokenizer.
    """
    passes = recipe.epochs_mi if epochs is None else epochs
    stage = lora_stage(learning_rate, passes, title="plain LoRA on tool data")
    return train_baseline(recipe, folder, Baseline(), stages=[stage], observer=observer)


def train_baseline(
    recipe: Recipe,
    folder: str | Path,
    baseline: Baseline,
    *,
    stages: Sequence[Stage],
    training_data: TrainingData | None = None,
    observer: RunObserver | None = None,
) -> tuple[nn.Module, Any]:
    """Train a baseline, or go on with it where it stopped.

    LoRA's alpha is twice the rank; batches, schedule, rendering and seed are the recipe's.

    Args:
        recipe: Names the model and the tool data.
        folder: Gets adapter/ (model/ without an adapter), metrics.jsonl, and while it trains the
            adapters of finished stages and checkpoints.
        baseline: What may train.
        stages: One after the other: `lora_stage`, `whole_stage`; `full_stage` alone.
        training_data: What each stage trains on; None takes the recipe's tool data.
        observer: Told of progress and metrics.
    Returns:
        The trained model, in evaluation mode and in the base's dtype, and its tokenizer.
    Raises:
        StageError: A stage trains what `baseline` does not have.
        TrainingError: A stage stopped itself; the baseline stays resumable.
    """
    work = _BaselineRun(recipe, Path(folder), baseline, observer or RunObserver())
    return work.go(stages, training_data or work.tool_data)


class _BaselineRun:
    """A baseline at work in its folder."""

    def __init__(
        self, recipe: Recipe, folder: Path, baseline: Baseline, observer: RunObserver
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.baseline = baseline
        self.observer = observer
        self.longest = recipe.max_length
        self.is_full = baseline.components is None
        self.result = folder / ("model" if self.is_full else "adapter")

    def go(self, stages: Sequence[Stage], training_data: TrainingData) -> tuple[nn.Module, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = [self.folder / stage.directory for stage in stages]
        for each in (self.result, *saved):
            recover_directory(each)
        if self.result.is_dir():
            return self._load(self.result)
        num_finished = max((i for i, each in enumerate(saved, 1) if each.is_dir()), default=0)
        model, tokenizer = self._load(saved[num_finished - 1]) if num_finished else self._fresh()
        dtype = next(model.parameters()).dtype
        self.longest = length_limit(model, self.recipe.max_length)
        for stage, target in list(zip(stages, saved, strict=True))[num_finished:]:
            self._train(model, stage, *training_data(stage, tokenizer), dtype=dtype)
            _lower(model, dtype)
            if stage is not stages[-1]:
                self._save(model, target, tokenizer)
        self._save(model, self.result, tokenizer)
        for leftover in (self.folder / "checkpoints", *saved):
            shutil.rmtree(leftover, ignore_errors=True)
        return model.eval(), tokenizer

    def tool_data(self, stage: Stage, tokenizer: Any) -> tuple[RenderedDataset, Collator]:
        """The recipe's tool data, the same for every stage."""
        samples, _ = read_training_samples(self.recipe)
        lengths = {"max_length": self.longest, "train_on": self.recipe.train_on}
        return RenderedDataset(samples, tokenizer, **lengths), Collator(tokenizer.pad_token_id)

    def _fresh(self) -> tuple[nn.Module, Any]:
        base, tokenizer = load_base(self.recipe.model, dtype=self.recipe.dtype)
        set_seed(self.recipe.seed)
        if self.is_full:
            return base, tokenizer
        components = self.baseline.components
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.recipe.r,
            lora_alpha=2 * self.recipe.r,
            lora_dropout=self.recipe.lora_dropout,
            target_modules=components if isinstance(components, str) else list(components),
            modules_to_save=list(self.baseline.whole) or None,
        )
        return get_peft_model(base, config), tokenizer

    def _load(self, saved: Path) -> tuple[nn.Module, Any]:
        name = str(saved) if self.is_full else self.recipe.model
        model, tokenizer = load_base(name, dtype=self.recipe.dtype)
        if not self.is_full:
            model = PeftModel.from_pretrained(model, str(saved), is_trainable=True)
        return model.eval(), tokenizer

    def _train(
        self, model: nn.Module, stage: Stage, dataset: Any, collator: Any, *, dtype: torch.dtype
    ) -> None:
        if self.is_full:
            model.requires_grad_(True)
        train_stage(
            model,
            dataset,
            collator,
            recipe=dataclasses.replace(self.recipe, router_loss_weight=0.0),
            stage=stage,
            folder=self.folder / "checkpoints" / stage.directory,
            metrics_file=self.folder / "metrics.jsonl",
            observer=self.observer,
            dtype=dtype,
            routed=not self.is_full,
        )

    def _save(self, model: nn.Module, target: Path, tokenizer: Any) -> None:
        if not self.is_full:
            save_adapter(model, target, self.recipe.model, tokenizer)
            return
        with directory_in_one_step(target) as unfinished:
            model.save_pretrained(str(unfinished))
            tokenizer.save_pretrained(str(unfinished))


def _lower(model: nn.Module, dtype: torch.dtype) -> None:
    """Back to the base's dtype what trained in fp32; LoRA pairs stay fp32, as PEFT loads them."""
    if isinstance(model, PeftModel):
        lower_to_base_dtype(model)
    else:
        # Not model.to: it would round buffers too, as the rotary frequencies that load in fp32.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
