"""One row's model: trained on its stream of micro-batches, killed and gone on with at any step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.method.data_sets import DataFolder
from benchmarks.method.row_config import RowConfig
from benchmarks.method.scale import Scale
from benchmarks.method.token_batches import (
    BatchCollator,
    TokenBatches,
    cut_batches,
    stage_steps,
)
from citi.base_model import load_base
from citi.baseline import Baseline, full_stage, lora_stage, train_baseline, whole_stage
from citi.data import RenderedDataset, mix
from citi.durable import write_json
from citi.importance.ability_scores import AbilityScores
from citi.importance.score_components import score_components
from citi.observer import RunObserver
from citi.plan import Plan, make_plan
from citi.recipe import Recipe
from citi.run import load_run, read_training_samples, train
from citi.stages import Stage


@dataclass(frozen=True)
class Assignment:
    """What a row is trained by, once its config, scale, data and seed are known.

    Attributes:
        row: Its config.
        scale: Sizes.
        data: Prepared files.
        model: Name or directory of the base.
        folder: Everything of this training lies there.
        seed: Of weights, orders and importance samples.
        rates: learning_rate, uco_learning_rate, or both.
        steps: Optimizer steps over all stages.
        scores: Component scores, which rows of one seed share, lie there.
    """

    row: RowConfig
    scale: Scale
    data: DataFolder
    model: str
    folder: Path
    seed: int
    rates: Mapping[str, float]
    steps: int
    scores: Path

    def recipe(self) -> Recipe:
        """The row as a recipe, whose overrides and rates win over the scale's settings."""
        scale, shares = self.scale, self.row.stages
        settings = {
            "model": self.model,
            "tool": {name: str(path) for name, path in self.data.training("tool").items()},
            "general": {name: str(path) for name, path in self.data.training("general").items()},
            "output": str(self.folder / "run"),
            "dtype": scale.dtype,
            "importance_samples": scale.importance_samples,
            "r": scale.r,
            "lora_alpha": scale.lora_alpha,
            "general_samples": None,
            "max_length": scale.max_length,
            "batch_size": 1,  # an item of TokenBatches is a whole micro-batch
            "gradient_accumulation": scale.accumulation,
            "save_steps": scale.save_steps,
            "seed": self.seed,
            **{f"epochs_{name}": float(name in shares) for name in ("rp", "mi", "uco")},
        }
        return Recipe(**(settings | self.row.overrides | dict(self.rates)))


@dataclass(frozen=True)
class TrainedRow:
    """A trained model and what it took.

    Attributes:
        model, tokenizer: Ready for measuring.
        steps: Optimizer steps that were taken, by stage.
        num_tokens, num_answer_tokens: Of all micro-batches of these steps.
        seconds: Training time over all calls; what a kill cut off is missing.
    """

    model: nn.Module
    tokenizer: Any
    steps: dict[str, int]
    num_tokens: int
    num_answer_tokens: int
    seconds: float


class TrainingStream:
    """The micro-batches of a row, in one order, handed out by stage.

    Rows of the same data, scale and seed get the same micro-batches in the same order, however they
    are cut into stages.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.steps = stage_steps(assignment.row.stages, assignment.steps)
        self._items: RenderedDataset | None = None
        self._batches: list[list[int]] = []

    def __call__(self, stage: Stage, tokenizer: Any) -> tuple[TokenBatches, BatchCollator]:
        """The `training_data` of a stage."""
        self._read(tokenizer)
        steps, accumulation = self.steps[stage.name], self.assignment.scale.accumulation
        part = self._batches[steps.start * accumulation : steps.stop * accumulation]
        return TokenBatches(self._items, part), BatchCollator(tokenizer.pad_token_id)

    def whole(self, tokenizer: Any) -> TokenBatches:
        """All micro-batches."""
        self._read(tokenizer)
        return TokenBatches(self._items, self._batches)

    def _read(self, tokenizer: Any) -> None:
        if self._items is not None:
            return
        assignment = self.assignment
        recipe, kind = assignment.recipe(), assignment.row.data
        tool, general = read_training_samples(recipe)
        chosen = ([] if kind == "general" else tool), ({} if kind == "tool" else general)
        self._items = RenderedDataset(
            mix(*chosen, per_general=None, seed=assignment.seed),
            tokenizer,
            max_length=recipe.max_length,
            train_on=recipe.train_on,
        )
        self._batches = cut_batches(
            [len(item["input_ids"]) for item in map(self._items.__getitem__, self._indices())],
            num_steps=assignment.steps,
            accumulation=assignment.scale.accumulation,
            batch_tokens=assignment.scale.batch_tokens,
            seed=assignment.seed,
        )

    def _indices(self) -> range:
        return range(len(self._items))


def train_row(assignment: Assignment, *, observer: RunObserver | None = None) -> TrainedRow:
    """Train a row, go on with it, or load it where it is finished.

    Args:
        assignment: What to train; method "none" loads the base.
        observer: Told of phases and progress.
    Returns:
        The model in evaluation mode.
    Raises:
        TrainingError: A stage stopped itself; the row stays resumable.
        RuntimeError: Other steps were taken than the budget says.
    """
    observer = observer or RunObserver()
    if assignment.row.method == "none":
        model, tokenizer = load_base(assignment.model, dtype=assignment.scale.dtype)
        return TrainedRow(model, tokenizer, {}, 0, 0, 0.0)
    stream = TrainingStream(assignment)
    make = _train_citi if assignment.row.method == "citi" else _train_baseline
    with _clock(assignment.folder / "seconds.json") as clock:
        model, tokenizer, steps = make(assignment, stream, observer)
    wanted = {name: len(each) for name, each in stream.steps.items()}
    if steps != wanted:
        raise RuntimeError(
            f"{assignment.row.name}: wanted the steps {wanted}, got {steps}; is the plan's share "
            "of unimportant components empty?"
        )
    whole = stream.whole(tokenizer)
    return TrainedRow(
        model.eval(), tokenizer, steps, whole.num_tokens, whole.num_answer_tokens, clock.seconds
    )


def _train_citi(assignment: Assignment, stream: TrainingStream, observer: RunObserver) -> tuple:
    """A run as `citi train` makes it, on the stream's batches."""
    scores = component_scores(assignment, observer=observer)
    run = train(
        assignment.recipe(),
        observer=observer,
        training_data=stream,
        scores=scores,
        with_report=False,
    )
    phases = run.load_manifest().phases
    steps = {name: phases[name]["steps"] for name in stream.steps if "steps" in phases[name]}
    return *load_run(run.path), steps


def _train_baseline(assignment: Assignment, stream: TrainingStream, observer: RunObserver) -> tuple:
    """LoRA or full fine-tuning; its steps are counted in its log."""
    row, recipe = assignment.row, assignment.recipe()
    stages = {
        "full": full_stage(recipe.learning_rate, 1.0),
        "lora": lora_stage(recipe.learning_rate, 1.0),
        "whole": whole_stage(recipe.uco_learning_rate, 1.0),
    }
    baseline = Baseline(components=None if row.method == "full" else "all-linear")
    if row.components == "important":
        plan = _plan(recipe, component_scores(assignment, observer=observer))
        whole = plan.unimportant if "whole" in row.stages else ()
        baseline = Baseline(components=plan.important, whole=whole)
    folder = assignment.folder / "baseline"
    model, tokenizer = train_baseline(
        recipe,
        folder,
        baseline,
        stages=[stages[name] for name in row.stages],
        training_data=stream,
        observer=observer,
    )
    return model, tokenizer, _logged_steps(folder / "metrics.jsonl")


def component_scores(
    assignment: Assignment, *, observer: RunObserver | None = None
) -> AbilityScores:
    """The scores of the row's model, data and seed; what was scored before is read."""
    prefix = assignment.scores / f"seed{assignment.seed}"
    if prefix.with_suffix(".json").is_file():
        return AbilityScores.load(prefix)
    recipe = assignment.recipe()
    tool, general = read_training_samples(recipe)
    model, tokenizer = load_base(recipe.model, dtype=recipe.dtype)
    scores = score_components(
        model,
        tokenizer,
        tool=tool,
        general=general,
        max_samples=recipe.importance_samples,
        estimator=recipe.estimator,
        max_length=recipe.max_length,
        seed=recipe.seed,
        progress=(observer or RunObserver()).progress,
    )
    scores.save(prefix)
    return scores


def _plan(recipe: Recipe, scores: AbilityScores) -> Plan:
    """The plan that CITI would make of the scores."""
    return make_plan(scores, important=recipe.important, unimportant=recipe.unimportant)


def _logged_steps(metrics_file: Path) -> dict[str, int]:
    """Stage → its last step with a loss, in the order of the log."""
    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    return {row["stage"]: row["step"] for row in rows if "loss" in row}


@dataclass
class _Clock:
    seconds: float


@contextlib.contextmanager
def _clock(file: Path) -> Iterator[_Clock]:
    """Adds up the time spent over calls, whether they end well or by an exception."""
    before = json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.is_file() else 0.0
    clock, began = _Clock(before), time.monotonic()
    try:
        yield clock
    finally:
        clock.seconds = round(before + time.monotonic() - began, 3)
        write_json(file, dataclasses.asdict(clock))
