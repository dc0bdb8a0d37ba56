"""The folder of one run: where everything lies, and whether a recipe may go on in it.

recipe.resolved.yaml  env.json  manifest.json  metrics.jsonl  importance.{json,safetensors,png}
plan.json  stage1_rp/  stage2_mi/  stage3_uco/  adapter/  eval/  report.html
and, while components are scored, importance.progress; while a stage trains, checkpoints/<stage>/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from citi.durable import recover_directory, write_text
from citi.importance.progress_file import remove_progress
from citi.manifest import Manifest, digest_files, digest_of
from citi.recipe import DEFAULTS, Recipe, RecipeError, load_recipe, recipe_keys
from citi.stages import STAGES, Stage

# Phases whose results depend on neither recipe nor data.
_INDEPENDENT = {"env"}


class RunError(ValueError):
    """A run cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run. Nothing is read or written before it is asked for."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunDirectory:
        return cls(Path(recipe.output))

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.resolved.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "env.json"

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def importance_prefix(self) -> Path:
        return self.path / "importance"

    @property
    def importance_progress(self) -> Path:
        """Of a scoring that is not finished; several processes keep theirs beside it."""
        return self.path / "importance.progress"

    @property
    def importance_picture(self) -> Path:
        return self.path / "importance.png"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.path / "eval"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    def stage(self, stage: Stage) -> Path:
        """The adapter as it stood after `stage`."""
        return self.path / stage.directory

    def checkpoints(self, stage: Stage) -> Path:
        """Trainer checkpoints of a stage that is not finished."""
        return self.path / "checkpoints" / stage.directory

    def digests_of(self, phase: str) -> dict[str, str]:
        """Name below the run → sha256, of every file that a finished phase wrote.

        metrics.jsonl, which every stage goes on with, counts to the adapter's; pictures and the
        report can be made anew and do not count.
        """
        single = {
            "env": [self.environment_file],
            "importance": [
                self.importance_prefix.with_suffix(s) for s in (".json", ".safetensors")
            ],
            "plan": [self.plan_file],
            "adapter": [self.metrics_file],
            "eval": [self.evaluation / f"{name}.json" for name in ("base", "tuned", "gates")],
        }
        whole = {stage.name: self.stage(stage) for stage in STAGES} | {"adapter": self.adapter}
        files = single.get(phase, [])
        if phase in whole and whole[phase].is_dir():
            files = [*files, *sorted(whole[phase].rglob("*"))]
        named = {file.relative_to(self.path).as_posix(): file for file in files if file.is_file()}
        return digest_files(named)

    def load_recipe(self, *, check_files: bool = True) -> Recipe:
        """The recipe of the run.

        Args:
            check_files: Whether its data files must exist.
        Raises:
            RunError: There is no run in this folder.
            RecipeError: Its recipe is broken, or a data file is gone.
        """
        if not self.recipe_file.is_file():
            raise RunError(
                f"{self.path} is not a run directory (no {self.recipe_file.name}); give the "
                "output folder of a `citi train` or `citi demo`"
            )
        return load_recipe(self.recipe_file, check_files=check_files)

    def load_manifest(self) -> Manifest:
        """Raises: RunError without a manifest; ManifestError for a broken one."""
        manifest = Manifest.load(self.manifest_file)
        if manifest is None:
            raise RunError(f"{self.path} holds no manifest.json; start it with `citi train`")
        return manifest


def open_run(recipe: Recipe, *, write: bool = True) -> Manifest:
    """Begin the run of `recipe`, or go on with it.

    A run that has computed nothing yet, say because a data file was broken, begins afresh.

    Args:
        recipe: Its `output` is the folder.
        write: False on processes that must not write.
    Raises:
        RunError: The folder holds a run of another recipe or of other data; the message names
            the keys and files that changed.
    """
    run = RunDirectory.of(recipe)
    identity = digest_of(recipe.identity())
    digests = digest_files(recipe.data_files)
    manifest = Manifest.load(run.manifest_file)
    if manifest is not None and is_recipe_of(run, recipe, manifest):
        manifest.recipe_sha256 = identity  # an older version's knew fewer keys
    wanted = (identity, digests)
    begins_anew = manifest is None or (manifest.recipe_sha256, manifest.data_sha256) != wanted
    if manifest is None or not manifest.phases.keys() - _INDEPENDENT:
        manifest = Manifest(run.manifest_file, recipe_sha256=identity, data_sha256=digests)
    elif changes := _changes(run, recipe, identity, manifest, digests):
        raise RunError(
            f"{run.path} holds a run that was started with something else:\n  "
            + "\n  ".join(changes)
            + "\nGive another output, put the old values back, or remove the folder"
        )
    if write:
        if begins_anew:
            remove_progress(run.importance_progress)
        manifest.save()
        write_text(run.recipe_file, recipe.dump())
        for folder in (run.adapter, *(run.stage(stage) for stage in STAGES)):
            recover_directory(folder)
    return manifest


def is_recipe_of(run: RunDirectory, recipe: Recipe, manifest: Manifest) -> bool:
    """Whether the run's manifest is of this recipe.

    A run of an older version, whose recipe file lacks keys, is of a recipe that has their defaults.
    """
    identity = recipe.identity()
    if digest_of(identity) == manifest.recipe_sha256:
        return True
    try:
        known = recipe_keys(run.recipe_file)
    except RecipeError:
        return False
    if any(identity[key] != DEFAULTS[key] for key in identity.keys() - known):
        return False
    older = {key: value for key, value in identity.items() if key in known}
    return digest_of(older) == manifest.recipe_sha256


def _changes(
    run: RunDirectory, recipe: Recipe, identity: str, manifest: Manifest, digests: dict[str, str]
) -> list[str]:
    changes = []
    if identity != manifest.recipe_sha256:
        try:
            changes = load_recipe(run.recipe_file, check_files=False).differences(recipe)
        except RecipeError as error:
            changes = [f"{run.recipe_file.name} cannot be read any more: {error}"]
        changes = changes or [f"{run.recipe_file.name} was edited after the run began"]
    changes += [
        f"{name}: the content of {recipe.data_files[name]} changed"
        for name, digest in digests.items()
        if manifest.data_sha256.get(name, digest) != digest
    ]
    return changes
