"""Whether a run directory is whole: its files are those that the run wrote, and fit each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from citi.adapters import MoLoraConfig
from citi.adapters.adapter_file import (
    WEIGHTS_FILE,
    file_sha256,
    read_adapter_config,
    read_adapter_shapes,
)
from citi.evaluation.inference import device_of, inference
from citi.importance.ability_scores import AbilityScores
from citi.manifest import Manifest, digest_files
from citi.plan import Plan, make_plan
from citi.recipe import Recipe
from citi.report import read_results
from citi.run_directory import RunDirectory, is_recipe_of
from citi.run_model import load_run
from citi.stages import STAGES, Stage

_PHASES = ("env", "importance", "plan", *(stage.name for stage in STAGES), "adapter", "eval")


@dataclass(frozen=True)
class Finding:
    """What a look at one part of a run showed.

    Attributes:
        part: of the run.
        problem: what is wrong with it; "" where nothing is.
        note: what could not be looked at, or is worth knowing.
    """

    part: str
    problem: str = ""
    note: str = ""


def verify_run(path: str | Path, *, with_model: bool = True) -> list[Finding]:
    """Look at every part of a run: what `citi verify` does. Nothing is written.

    Args:
        path: the run directory.
        with_model: also load base model and adapter, whether they fit, and whether the adapter
            changes what the model says.
    Returns:
        A finding for each part, problems or not, in the order of the run.
    Raises:
        RunError, ManifestError: no run in this folder.
    """
    run = RunDirectory(Path(path))
    recipe = run.load_recipe(check_files=False)
    return _Look(run, recipe, run.load_manifest()).at_all(with_model=with_model)


class _Look:
    """Each method looks at one part: it raises what is wrong, and returns a note, or None."""

    def __init__(self, run: RunDirectory, recipe: Recipe, manifest: Manifest) -> None:
        self.run, self.recipe, self.manifest = run, recipe, manifest
        done = manifest.phases
        self.trained = [stage for stage in STAGES if "steps" in done.get(stage.name, {})]

    def at_all(self, *, with_model: bool) -> list[Finding]:
        has = self.manifest.phases.keys()
        parts: list[tuple[str, Callable[[], str | None]]] = [
            ("recipe", self.at_recipe),
            ("data", self.at_data),
            ("phases", self.at_phases),
        ]
        if "importance" in has:
            parts.append(("importance", self.at_importance))
        if "plan" in has:
            parts.append(("plan", self.at_plan))
        parts += [(stage.directory, lambda s=stage: self.at_stage(s)) for stage in self.trained]
        if "adapter" in has:
            parts.append(("adapter", self.at_adapter))
        if "eval" in has:
            parts.append(("eval", self.at_evaluation))
        if with_model and "adapter" in has:
            parts.append(("model", self.at_model))
        return [_finding(part, look) for part, look in parts]

    def _compare_files(self, phase: str) -> None:
        """With what the phase left; versions before 0.6 kept no digests."""
        wrote = self.manifest.phases[phase].get("files", {})
        here = self.run.digests_of(phase)
        missing = sorted(wrote.keys() - here)
        changed = sorted(name for name in wrote.keys() & here if wrote[name] != here[name])
        for names, what in ((missing, "missing"), (changed, "changed since the run wrote it")):
            if names:
                raise ValueError(f"{what}: {', '.join(names)}")

    def at_recipe(self) -> None:
        if not is_recipe_of(self.run, self.recipe, self.manifest):
            raise ValueError(f"{self.run.recipe_file.name} was edited after the run began")

    def at_data(self) -> str | None:
        files = self.recipe.data_files
        here = {name: file for name, file in files.items() if file.is_file()}
        wanted = self.manifest.data_sha256
        changed = [name for name, got in digest_files(here).items() if wanted.get(name) != got]
        if changed:
            raise ValueError(f"changed since the run began: {', '.join(changed)}")
        gone = [name for name in files if name not in here]
        return f"not here, and not looked at: {', '.join(gone)}" if gone else None

    def at_phases(self) -> None:
        missing = [name for name in _PHASES if name not in self.manifest.phases]
        if missing:
            raise ValueError(
                f"not finished: {', '.join(missing)}; go on: citi train {self.run.recipe_file}"
            )
        if not self.run.environment_file.is_file():
            raise ValueError(f"{self.run.environment_file.name} is missing")
        self._compare_files("env")

    def at_importance(self) -> None:
        AbilityScores.load(self.run.importance_prefix)
        self._compare_files("importance")

    def at_plan(self) -> None:
        plan, scores = Plan.load(self.run.plan_file), AbilityScores.load(self.run.importance_prefix)
        shares = {"important": self.recipe.important, "unimportant": self.recipe.unimportant}
        if make_plan(scores, **shares) != plan:
            raise ValueError(f"{self.run.plan_file.name} is not what the scores and shares give")
        self._compare_files("plan")

    def at_stage(self, stage: Stage) -> str | None:
        note = _look_at_adapter(self.run.stage(stage))
        self._compare_files(stage.name)
        return note

    def at_adapter(self) -> str | None:
        note = _look_at_adapter(self.run.adapter)
        last = self.run.stage(self.trained[-1]) if self.trained else None
        if last is not None and (last / WEIGHTS_FILE).is_file():
            ours, theirs = (file_sha256(each / WEIGHTS_FILE) for each in (self.run.adapter, last))
            if ours != theirs:
                raise ValueError(f"{WEIGHTS_FILE} is not that of the last stage, {last.name}")
        self._compare_files("adapter")
        return note

    def at_evaluation(self) -> str | None:
        if reason := self.manifest.phases["eval"].get("skipped"):
            return f"skipped: {reason}"
        found = read_results(self.run.evaluation)
        missing = [f"{name}.json" for name in ("base", "tuned") if name not in found]
        if missing:
            raise ValueError(f"missing: {', '.join(missing)}; citi eval {self.run.path}")
        self._compare_files("eval")
        return None

    def at_model(self) -> None:
        model, tokenizer = load_run(self.run.path)
        tokens = torch.tensor([tokenizer("Which tools do you have?")["input_ids"]])
        tokens = tokens.to(device_of(model))
        with inference(model):
            tuned = model(input_ids=tokens).logits
            with model.disable_adapter():
                base = model(input_ids=tokens).logits
        if not tuned.isfinite().all():
            raise ValueError("the tuned model's logits are not finite")
        if torch.equal(tuned, base):
            raise ValueError("the adapter changes nothing: the tuned model says what its base says")


def _finding(part: str, look: Callable[[], str | None]) -> Finding:
    try:
        return Finding(part, note=look() or "")
    except (ValueError, OSError) as error:
        return Finding(part, problem=str(error))


def _look_at_adapter(folder: Path) -> str | None:
    settings = read_adapter_config(folder, {each.name for each in fields(MoLoraConfig)})
    digest = settings.get("weights_sha256")
    read_adapter_shapes(folder, digest)
    return None if digest else f"no hash of {WEIGHTS_FILE} in its configuration to compare with"
