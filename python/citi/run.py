"""A whole run: importance → plan → RP → MI → UCO → adapter → evaluation → report.

Every phase writes its files, then stands in manifest.json. `train` with the same recipe again skips
what stands there and goes on: a stage that was killed resumes from its last complete checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

from citi.data import Collator, RenderedDataset, Sample, mix, read_samples
from citi.durable import write_json
from citi.environment_record import environment_record
from citi.evaluation.generate import prompt_room
from citi.fingerprint import differing_fields, model_fingerprint
from citi.importance.ability_scores import AbilityScores
from citi.importance.progress_file import remove_progress
from citi.importance.score_components import score_components
from citi.manifest import Manifest
from citi.observer import RunObserver
from citi.plan import make_plan
from citi.positions import length_limit
from citi.processes import process_group, refuse_sharding, this_process
from citi.recipe import Recipe
from citi.run_directory import RunDirectory, open_run
from citi.run_evaluation import evaluate_pair, evaluate_run, evaluation_sets
from citi.run_model import RunModel, load_run
from citi.stage_training import TrainingData, recipe_stages, train_stage
from citi.stages import Stage, lower_to_base_dtype, skip_reason

__all__ = ["evaluate_run", "load_run", "train"]

Facts = dict[str, Any]


def train(
    recipe: Recipe,
    *,
    observer: RunObserver | None = None,
    training_data: TrainingData | None = None,
    scores: AbilityScores | None = None,
    with_report: bool = True,
) -> RunDirectory:
    """Run a recipe, or go on with it where it stopped.

    Under `accelerate launch` every process calls this; the first one writes and is watched.

    Args:
        recipe: `load_recipe` gives one; its `output` is the run directory.
        observer: Told of phases, progress and metrics.
        training_data: What each stage trains on, for batches of another kind than the recipe's;
            the caller gives the same to a run that is gone on with. None: the recipe's mix.
        scores: Of the components of this model, where they are at hand; None: the run scores them
            on the recipe's data.
        with_report: Whether the run ends with pictures and a report; `citi report` makes them
            later too.
    Returns:
        The finished run directory.
    Raises:
        RunError: The folder holds another recipe's run.
        DataError: A data file cannot be used.
        TrainingError: A stage stopped itself; the run stays resumable.
        ValueError: `scores` are of another model; or the launch would spread the parameters over
            processes, as FSDP and DeepSpeed do.
        KeyboardInterrupt: Ctrl-C; the observer's last line says how to resume.
    """
    refuse_sharding()
    processes = this_process()
    watched = observer if observer is not None and processes.is_main_process else RunObserver()
    run = RunDirectory.of(recipe)
    try:
        manifest = open_run(recipe, write=processes.is_main_process)
        processes.wait_for_everyone()
        session = _Session(recipe, run, manifest, watched, training_data, scores, with_report)
        session.go()
    except KeyboardInterrupt:
        watched.line(
            "interrupted; finished phases and the last checkpoint are kept. "
            f"To resume: citi train {run.recipe_file}"
        )
        raise
    return run


def read_training_samples(recipe: Recipe) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """The recipe's tool samples, and its general samples by name. Raises: DataError."""
    limit = {"max_samples": recipe.tool_samples, "seed": recipe.seed}
    tool = [s for path in recipe.tool.values() for s in read_samples(path, task_type=1, **limit)]
    general = {name: read_samples(path, task_type=0) for name, path in recipe.general.items()}
    return tool, general


class _Session:
    """One process at work on a run, phase by phase."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunDirectory,
        manifest: Manifest,
        observer: RunObserver,
        training_data: TrainingData | None,
        scores: AbilityScores | None,
        with_report: bool,
    ) -> None:
        self.recipe = recipe
        self.run = run
        self.manifest = manifest
        self.observer = observer
        self.stages = recipe_stages(recipe)
        self.model = RunModel(recipe, run)
        self.processes = this_process()
        self.is_writer = self.processes.is_main_process
        # Read now: a broken file must not come to light after the training.
        self.evaluation_sets = evaluation_sets(recipe)
        self._training_data = training_data or self._mixed_data
        self._given_scores = scores
        self._with_report = with_report
        self._dataset: RenderedDataset | None = None
        self._is_alone = False

    def go(self) -> None:
        self._phase("env", "environment", self._write_environment)
        self._phase("importance", "importance of components", self._score)
        self._phase("plan", "plan", self._plan)
        for stage in self.stages:
            self._stage(stage)
        self._phase("adapter", "adapter", self._save_adapter)
        if self.is_writer:  # the others are done, and nobody waits for them at a barrier
            self._is_alone = True
            self._evaluate()
            if self._with_report:
                self._report()

    def _phase(
        self, name: str, title: str, work: Callable[[], Facts | None], *, ends_run: bool = False
    ) -> None:
        """Do `work` unless it stands in the manifest, and put it there."""
        if name in self.manifest.phases:
            reason = self.manifest.phases[name].get("skipped", "done earlier")
            self.observer.phase_skipped(name, title, reason)
            return
        self.observer.phase_started(name, title)
        began = time.monotonic()
        facts = work() or {}
        seconds = round(time.monotonic() - began, 3)
        self._record(name, facts | {"seconds": seconds}, ends_run=ends_run)
        self.observer.phase_finished(name, seconds)

    def _record(self, name: str, facts: Facts, *, ends_run: bool = False) -> None:
        """Into the manifest, after every process is done and before any goes on."""
        self._wait()
        if self.is_writer:
            if "skipped" not in facts:
                facts = facts | {"files": self.run.digests_of(name)}
            self.manifest.record(name, facts, ends_run=ends_run)
        else:
            self.manifest.phases[name] = facts
        self._wait()

    def _wait(self) -> None:
        if not self._is_alone:
            self.processes.wait_for_everyone()

    def _write_environment(self) -> None:
        if self.is_writer:
            write_json(self.run.environment_file, environment_record())

    def _score(self) -> Facts:
        if self.recipe.generates_answers:
            # Raises now, not after the training, where the model has too few positions.
            prompt_room(
                self.model.base,
                max_length=self.recipe.max_length,
                max_new_tokens=self.recipe.max_new_tokens,
            )
        scores = self._made_scores() if self._given_scores is None else self._checked_scores()
        if self.is_writer:
            scores.save(self.run.importance_prefix)
            if self._with_report:
                self._plot(scores)
            remove_progress(self.run.importance_progress)
        return {"num_components": len(scores.tool_importance)}

    def _plot(self, scores: AbilityScores) -> None:
        try:
            scores.plot(self.run.importance_picture)
        except ImportError as error:
            self.observer.line(f"no {self.run.importance_picture.name}: {error}")

    def _checked_scores(self) -> AbilityScores:
        scores = self._given_scores
        differing = differing_fields(scores.fingerprint, model_fingerprint(self.model.base))
        if differing:
            raise ValueError(
                f"scores: wanted scores of {self.recipe.model}, got those of a model that differs "
                f"in {', '.join(differing)}"
            )
        return scores

    def _made_scores(self) -> AbilityScores:
        tool, general = read_training_samples(self.recipe)
        return score_components(
            self.model.base,
            self.model.tokenizer,
            tool=tool,
            general=general,
            max_samples=self.recipe.importance_samples,
            estimator=self.recipe.estimator,
            max_length=self.recipe.max_length,
            seed=self.recipe.seed,
            progress=self.observer.progress,
            progress_file=self.run.importance_progress,
            group=process_group(),
        )

    def _plan(self) -> Facts:
        scores = AbilityScores.load(self.run.importance_prefix)
        plan = make_plan(
            scores, important=self.recipe.important, unimportant=self.recipe.unimportant
        )
        if self.is_writer:
            plan.save(self.run.plan_file)
        overlap = f" ({len(plan.overlap)} in both sets: MOLoRA wins)" if plan.overlap else ""
        self.observer.line(
            f"MOLoRA on {len(plan.important)} of {plan.num_components} components, "
            f"{len(plan.unimportant)} unfrozen in stage 3{overlap}"
        )
        return {"num_important": len(plan.important), "num_unimportant": len(plan.unimportant)}

    def _stage(self, stage: Stage) -> None:
        if stage.name not in self.manifest.phases:
            reason = skip_reason(self._tuned(), stage)
            if reason is not None:
                self._record(stage.name, {"skipped": reason})
        self._phase(stage.name, stage.title, lambda: self._train(stage))
        if self.is_writer:
            shutil.rmtree(self.run.checkpoints(stage), ignore_errors=True)

    def _train(self, stage: Stage) -> Facts:
        model = self._tuned()
        dataset, collator = self._training_data(stage, self.model.tokenizer)
        facts = train_stage(
            model,
            dataset,
            collator,
            recipe=self.recipe,
            stage=stage,
            folder=self.run.checkpoints(stage),
            metrics_file=self.run.metrics_file,
            observer=self.observer,
            dtype=self.model.dtype,
        )
        lower_to_base_dtype(model)
        if self.is_writer:
            self.model.save(self.run.stage(stage))
        return facts

    def _save_adapter(self) -> None:
        if self.is_writer:
            self._tuned()
            self.model.save(self.run.adapter, with_tokenizer=True)

    def _evaluate(self) -> None:
        name, title = "eval", "base against tuned"
        tool, general = self.evaluation_sets

        def work() -> None:
            evaluate_pair(
                self._tuned(),
                self.model.tokenizer,
                run=self.run,
                recipe=self.recipe,
                tool=tool,
                general=general,
                observer=self.observer,
            )

        if not tool and not general and name not in self.manifest.phases:
            reason = "the recipe has no eval_tool and no eval_general"
            self._record(name, {"skipped": reason}, ends_run=True)
        self._phase(name, title, work, ends_run=True)

    def _report(self) -> None:
        """A run without matplotlib is whole all the same: a line says what is missing."""
        from citi.report import build_report

        if "report" in self.manifest.phases:
            self.observer.phase_skipped("report", "report", "done earlier")
            return
        self.observer.phase_started("report", "report")
        began = time.monotonic()
        try:
            build_report(self.run.path)
        except ImportError as error:
            self.observer.line(f"no report: {error}; afterwards: citi report {self.run.path}")
            return
        seconds = round(time.monotonic() - began, 3)
        self.manifest.record("report", {"seconds": seconds})
        self.observer.phase_finished("report", seconds)

    def _tuned(self) -> Any:
        """The model as the last finished stage left it."""
        finished = [s for s in self.stages if "steps" in self.manifest.phases.get(s.name, {})]
        if not self.model.is_loaded:
            self.observer.line(f"loading {self.recipe.model}")
        return self.model.tuned(self.run.stage(finished[-1]) if finished else None)

    def _mixed_data(self, stage: Stage, tokenizer: Any) -> tuple[RenderedDataset, Collator]:
        """The recipe's mix, the same for every stage."""
        return self._load_dataset(), Collator(tokenizer.pad_token_id)

    def _load_dataset(self) -> RenderedDataset:
        if self._dataset is None:
            tool, general = read_training_samples(self.recipe)
            longest = length_limit(self.model.base, self.recipe.max_length)
            self._dataset = RenderedDataset(
                mix(tool, general, per_general=self.recipe.general_samples, seed=self.recipe.seed),
                self.model.tokenizer,
                max_length=longest,
                train_on=self.recipe.train_on,
                progress=self.observer.progress,
            )
            found = self._dataset.statistics
            self.observer.line(
                f"{found.num_rendered} samples to train on, {found.num_tool} of them tool calls; "
                f"{found.num_truncated} cut to {longest} tokens"
                + "".join(f"; {n} left out: {reason}" for reason, n in found.dropped.items())
            )
        return self._dataset
