"""Plain LoRA on the tool data alone: what CITI is compared with."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model

from citi.base_model import load_base
from citi.data import Collator, RenderedDataset
from citi.observer import RunObserver
from citi.recipe import Recipe
from citi.run import read_training_samples
from citi.run_directory import RunDirectory
from citi.run_evaluation import evaluation_sets, measure
from citi.run_model import save_adapter
from citi.stage_training import train_stage
from citi.stages import Stage

NAME = "lora"


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

    Alpha is twice the rank; batches, schedule, rendering and seed are the recipe's.

    Args:
        recipe: Names the model and the tool data.
        folder: Gets adapter/, metrics.jsonl, and checkpoints while it trains; an interrupted
            baseline goes on from the last one.
        learning_rate: Peak of the cosine schedule.
        epochs: Passes over the tool data; None takes epochs_mi, CITI's passes over its experts.
        observer: Told of progress and metrics.
    Returns:
        The trained model, in evaluation mode, and its tokenizer.
    """
    folder, observer = Path(folder), observer or RunObserver()
    folder.mkdir(parents=True, exist_ok=True)
    base, tokenizer = load_base(recipe.model, dtype=recipe.dtype)
    if (folder / "adapter").is_dir():
        return PeftModel.from_pretrained(base, str(folder / "adapter")).eval(), tokenizer
    dtype = base.dtype
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=2 * recipe.r,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear",
    )
    set_seed(recipe.seed)
    model = get_peft_model(base, config)
    samples, _ = read_training_samples(recipe)
    passes = recipe.epochs_mi if epochs is None else epochs
    train_stage(
        model,
        RenderedDataset(samples, tokenizer, max_length=recipe.max_length, train_on=recipe.train_on),
        Collator(tokenizer.pad_token_id),
        recipe=recipe,
        stage=Stage(NAME, "plain LoRA on tool data", NAME, frozenset(), learning_rate, passes),
        folder=folder / "checkpoints",
        metrics_file=folder / "metrics.jsonl",
        observer=observer,
        dtype=dtype,
        routed=False,
    )
    save_adapter(model, folder / "adapter", recipe.model, tokenizer)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return model.eval(), tokenizer
