"""Base against tuned, on a run's own held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from citi.data import Sample, read_samples
from citi.durable import write_json
from citi.evaluation import EvalResult, EvalSettings, evaluate
from citi.gates import collect_gates
from citi.observer import RunObserver
from citi.recipe import Recipe
from citi.run_directory import RunDirectory, RunError
from citi.run_model import load_run

SampleSets = Mapping[str, Sequence[Sample]]
_GATE_SAMPLES = 8  # of each file: thousands of tokens, enough for a histogram


def evaluate_run(path: str | Path, *, observer: RunObserver | None = None) -> dict[str, EvalResult]:
    """Measure a finished run again, from its files: what `citi eval` does.

    Args:
        path: The run directory; eval/base.json, eval/tuned.json and eval/gates.json are replaced.
        observer: Told of progress.
    Returns:
        "base" and "tuned".
    Raises:
        RunError: No finished run, or a recipe without evaluation data.
        DataError: An evaluation file cannot be used.
    """
    run = RunDirectory(Path(path))
    recipe = run.load_recipe()
    tool, general = evaluation_sets(recipe)
    if not tool and not general:
        raise RunError(
            f"{run.path}: the recipe names no evaluation data; start the run with eval_tool and "
            "eval_general"
        )
    model, tokenizer = load_run(path)
    results = evaluate_pair(
        model, tokenizer, run=run, recipe=recipe, tool=tool, general=general, observer=observer
    )
    manifest = run.load_manifest()
    # The run itself finished when it did.
    manifest.phases["eval"] = manifest.phases.get("eval", {}) | {"files": run.digests_of("eval")}
    manifest.save()
    return results


def evaluation_sets(recipe: Recipe) -> tuple[SampleSets, SampleSets]:
    """The recipe's held-out tool sets and general sets, by name."""
    return (
        {name: read_samples(file, task_type=1) for name, file in recipe.eval_tool.items()},
        {name: read_samples(file, task_type=0) for name, file in recipe.eval_general.items()},
    )


def evaluate_pair(
    model: PeftModel,
    tokenizer: Any,
    *,
    run: RunDirectory,
    recipe: Recipe,
    tool: SampleSets,
    general: SampleSets,
    observer: RunObserver | None = None,
) -> dict[str, EvalResult]:
    """Measure `model` with its adapter off and on, look at its gates, and write all three files."""
    observer = observer or RunObserver()
    sets = {"run": run, "recipe": recipe, "tool": tool, "general": general, "observer": observer}
    with model.disable_adapter():
        base = measure("base", model, tokenizer, **sets)
    results = {"base": base, "tuned": measure("tuned", model, tokenizer, **sets)}
    samples = [
        sample for each in (*tool.values(), *general.values()) for sample in each[:_GATE_SAMPLES]
    ]
    gates = collect_gates(
        model, tokenizer, samples, max_length=recipe.max_length, progress=observer.progress
    )
    write_json(run.evaluation / "gates.json", gates.to_json())
    return results


def measure(
    name: str,
    model: PeftModel,
    tokenizer: Any,
    *,
    run: RunDirectory,
    recipe: Recipe,
    tool: SampleSets,
    general: SampleSets,
    observer: RunObserver,
) -> EvalResult:
    """Measure `model` as it stands, by the recipe's settings, into eval/<name>.json."""
    settings = EvalSettings(
        max_new_tokens=recipe.max_new_tokens,
        batch_size=recipe.eval_batch_size,
        max_length=recipe.max_length,
        max_tool_samples=recipe.eval_samples,
        max_general_samples=recipe.eval_samples,
        exact_match=recipe.judged_samples != 0,
        max_exact_match=recipe.judged_samples or None,
        seed=recipe.seed,
    )

    def progress(done: int, total: int | None, note: str) -> None:
        observer.progress(done, total, f"{name} {note}")

    result = evaluate(
        model, tokenizer, tool=tool, general=general, settings=settings, progress=progress
    )
    write_json(run.evaluation / f"{name}.json", result.to_json())
    for note in result.notes:
        observer.line(note)
    return result
