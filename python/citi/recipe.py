"""The recipe: one flat YAML file that says everything about a run.

Every key is a field of `Recipe`; its comment in a fresh file, its default, its type and its limits
stand in one line there. Paths are relative to the recipe's own folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

_REQUIRED = ("model", "tool", "general")
_WITHOUT_EFFECT = ("output", "save_steps", "report_to")
_PATHS = ("tool", "general", "eval_tool", "eval_general")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, what was wanted and what was got."""


def _about(comment: str, *, choices: tuple = (), low=None, high=None, above=None) -> dict:
    """A field's metadata: the comment that `citi init` writes, and the values it may take."""
    return {"comment": comment, "choices": choices, "low": low, "high": high, "above": above}


def _key(default, comment: str, **limits):
    return field(default=default, metadata=_about(comment, **limits))


@dataclass(frozen=True)
class Recipe:
    """Settings of a run; defaults are the paper's (arXiv 2409.13202) where it states them.

    Data keys take a path, a list of paths or a mapping of names to paths, and hold the mapping.
    Paths become absolute, relative ones from the working directory, so that a run can be gone on
    with from anywhere.

    Raises:
        RecipeError: A value has another type or lies outside its limits.
    """

    model: str = _key("", "model name on the hub, or a directory")
    tool: dict[str, str] = field(
        default_factory=dict,
        metadata=_about("tool-call data: a file, a list of files, or name: file"),
    )
    general: dict[str, str] = field(
        default_factory=dict,
        metadata=_about("general data to keep the other abilities, one file each"),
    )
    eval_tool: dict[str, str] = field(
        default_factory=dict,
        metadata=_about("held-out tool data; none: no evaluation of tool calls"),
    )
    eval_general: dict[str, str] = field(
        default_factory=dict, metadata=_about("held-out general data, one file an ability")
    )
    output: str = _key("runs/citi", "the run directory; run again with the same one = resume")
    dtype: str = _key(
        "auto", "precision of the frozen base", choices=("auto", "fp32", "bf16", "fp16")
    )
    estimator: str = _key(
        "token", "how importance is estimated", choices=("token", "batch", "parameter")
    )
    importance_samples: int = _key(256, "samples of each ability it looks at (paper: 3000)", low=1)
    important: float = _key(0.20, "share of components that get MOLoRA", above=0.0, high=1.0)
    unimportant: float = _key(0.10, "share of components unfrozen in stage 3", low=0.0, high=1.0)
    num_experts: int = _key(4, "LoRA experts of a component", low=1)
    r: int = _key(8, "rank of an expert", low=1)
    lora_alpha: float = _key(2.0, "an expert's output is scaled by lora_alpha / r", above=0.0)
    lora_dropout: float = _key(0.0, "dropout on the experts' input", low=0.0, high=0.99)
    top_k: int | None = _key(None, "experts kept per token; null: all of them", low=1)
    router_loss: str = _key("cv2", "form of the router loss", choices=("cv2", "dispersion"))
    router_loss_weight: float = _key(0.01, "its weight in the total loss", low=0.0)
    delta: float = _key(0.95, "how far tool and general samples are pulled apart", low=0.0, high=1)
    base_kl_weight: float = _key(
        0.0, "weight of the KL divergence from the base on general answers; 0: none", low=0.0
    )
    tool_samples: int | None = _key(None, "samples taken of each tool file; null: all", low=1)
    general_samples: int | None = _key(5000, "samples taken of each general file; null: all", low=0)
    max_length: int = _key(4096, "longest sample in tokens", low=8)
    train_on: str = _key("last", "loss on the last answer, or on all", choices=("last", "all"))
    batch_size: int = _key(4, "samples of a micro-batch on one device", low=1)
    gradient_accumulation: int = _key(4, "micro-batches of an optimizer step", low=1)
    gradient_checkpointing: bool = _key(False, "recompute activations: less memory, more time")
    learning_rate: float = _key(2e-4, "of stages 1 and 2", above=0.0)
    uco_learning_rate: float = _key(2e-5, "of stage 3", above=0.0)
    epochs_rp: float = _key(1.0, "stage 1: routers only", low=0.0)
    epochs_mi: float = _key(2.0, "stage 2: routers and experts", low=0.0)
    epochs_uco: float = _key(1.0, "stage 3: unimportant components", low=0.0)
    eval_samples: int | None = _key(200, "samples of each evaluation file; null: all", low=1)
    judged_samples: int | None = _key(
        None, "of these, general answers generated and judged; null: all, 0: NLL only", low=0
    )
    eval_batch_size: int = _key(8, "samples evaluated at once", low=1)
    max_new_tokens: int = _key(256, "longest generated answer in the evaluation", low=1)
    seed: int = _key(0, "seed of everything random", low=0)
    save_steps: int = _key(50, "optimizer steps between checkpoints", low=1)
    report_to: str = _key("none", "none, tensorboard, wandb … as the Trainer takes it")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        for name in _REQUIRED:
            if not getattr(self, name):
                raise RecipeError(f"{name}: wanted {_comment(name)}, got nothing")
        paths = {name: getattr(self, name) for name in (*_PATHS, "output", "model")}
        for name, value in _resolved(paths, Path.cwd()).items():
            object.__setattr__(self, name, value)
        if self.generates_answers and self.max_length < self.max_new_tokens + 2:
            raise RecipeError(
                f"max_length: wanted at least max_new_tokens + 2 ({self.max_new_tokens + 2}), so "
                f"that the evaluation's prompts have room, got {self.max_length}; lower "
                "max_new_tokens"
            )
        if self.top_k is not None and self.top_k > self.num_experts:
            raise RecipeError(
                f"top_k: wanted at most num_experts ({self.num_experts}), got {self.top_k}"
            )

    @property
    def generates_answers(self) -> bool:
        """Whether the evaluation lets the model write answers."""
        return bool(self.eval_tool or (self.eval_general and self.judged_samples != 0))

    @property
    def data_files(self) -> dict[str, Path]:
        """Every data file, as `key.name` → path."""
        return {
            f"{key}.{name}": Path(path)
            for key in _PATHS
            for name, path in getattr(self, key).items()
        }

    def dump(self) -> str:
        """YAML text that `load_recipe` reads back from inside the run directory."""
        values = dataclasses.asdict(self) | {"output": "."}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)

    def identity(self) -> dict[str, object]:
        """What matters to the result: a run goes on only while this stays as it is.

        Data files stand in it by name alone; the manifest compares their content.
        """
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in _WITHOUT_EFFECT}
        return values | {key: sorted(values[key]) for key in _PATHS}

    def differences(self, other: Recipe) -> list[str]:
        """One line `key: ours → theirs` for every key of the identity that differs."""
        ours, theirs = self.identity(), other.identity()
        return [
            f"{key}: {ours[key]!r} → {theirs[key]!r}" for key in ours if ours[key] != theirs[key]
        ]


DEFAULTS = {
    spec.name: {} if spec.default is dataclasses.MISSING else spec.default
    for spec in dataclasses.fields(Recipe)
}


def load_recipe(
    path: str | Path, overrides: Iterable[str] = (), *, check_files: bool = True
) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file; relative paths in it are relative to its folder.
        overrides: `key=value` strings, the value in YAML; relative paths in them are relative to
            the working directory, as everywhere on a command line.
        check_files: Whether the data files must exist.
    Returns:
        The checked recipe, all data paths absolute.
    Raises:
        RecipeError: The file cannot be read, a key is unknown, a value does not fit, or a data
            file does not exist.
    """
    path = Path(path)
    values = _resolved(_read_yaml(path), path.resolve().parent)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise RecipeError(f"override: wanted key=value, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{key}: not valid YAML: {text!r}") from error
        _check_known({key})
        values |= _resolved({key: value}, Path.cwd())
    values.setdefault("output", str(path.resolve().parent / "runs" / path.stem))
    recipe = Recipe(**values)
    for name, file in recipe.data_files.items():
        if check_files and not file.is_file():
            raise RecipeError(f"{name}: no such file: {file}")
    return recipe


def recipe_keys(path: Path) -> set[str]:
    """The keys that a recipe file states. Raises: RecipeError when it cannot be read."""
    return set(_read_yaml(path))


def template(
    model: str,
    tool: Sequence[str] | Mapping[str, str],
    general: Sequence[str] | Mapping[str, str],
    *,
    eval_tool: Sequence[str] | Mapping[str, str] = (),
    eval_general: Sequence[str] | Mapping[str, str] = (),
    output: str = "runs/citi",
) -> str:
    """The text of a fresh recipe for `citi init`: every key with its default and a comment."""
    given = {"model": model, "tool": tool, "general": general, "output": output}
    given |= {"eval_tool": eval_tool or {}, "eval_general": eval_general or {}}
    lines = ["# A CITI recipe: `citi train` runs it, and run again resumes it."]
    for spec in dataclasses.fields(Recipe):
        value = given.get(spec.name, DEFAULTS[spec.name])
        if not isinstance(value, str | Mapping | int | float | None):
            value = list(value)
        if isinstance(value, Mapping):
            value = dict(value)
        comment = spec.metadata["comment"]
        if spec.metadata["choices"]:
            comment += f" ({' | '.join(spec.metadata['choices'])})"
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        text = text.removesuffix("\n").removesuffix("\n...")
        if spec.name.startswith("eval_") and value == {}:
            lines.append(f"# {spec.name}: file  # {comment}")
        else:
            lines.append(f"{spec.name}: {text}  # {comment}")
    return "\n".join(lines) + "\n"


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"the recipe {path}: wanted `key: value` lines, got {_show(values)}")
    _check_known(values)
    return values


def _check_known(keys: Iterable) -> None:
    known = [spec.name for spec in dataclasses.fields(Recipe)]
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}"
            raise RecipeError(f"unknown key {key!r}; {hint}")


def _resolved(values: dict, folder: Path) -> dict:
    """`values` with named and absolute data files, output and (where it is a folder) model."""
    resolved = dict(values)
    for key in _PATHS:
        if values.get(key) is not None:
            named = _named_files(key, values[key])
            resolved[key] = {name: str(_absolute(file, folder)) for name, file in named.items()}
        elif key in values:
            resolved[key] = {}
    if isinstance(values.get("output"), str):
        resolved["output"] = str(_absolute(values["output"], folder))
    if isinstance(values.get("model"), str) and _absolute(values["model"], folder).is_dir():
        resolved["model"] = str(_absolute(values["model"], folder))
    return resolved


def _absolute(path: str, folder: Path) -> Path:
    return Path(folder, Path(path).expanduser()).resolve()


def _named_files(key: str, value: object) -> dict[str, str]:
    """A path, a list of paths or a mapping of names to paths as the mapping."""
    if isinstance(value, Mapping):
        files = dict(value)
    elif isinstance(value, str | list | tuple):
        files = {}
        for file in [value] if isinstance(value, str) else value:
            if not isinstance(file, str):
                raise RecipeError(f"{key}: wanted paths, got {_show(file)}")
            if file in files.values():
                raise RecipeError(f"{key}: {file} is there twice")
            name = Path(file).name.split(".")[0]
            if name in files:
                name = f"{Path(file).parent.name}_{name}"
            if name in files:
                raise RecipeError(f"{key}: two files are called {name}; give names (name: file)")
            files[name] = file
    else:
        raise RecipeError(
            f"{key}: wanted a path, a list of paths or name: path, got {_show(value)}"
        )
    for name, file in files.items():
        if not isinstance(name, str) or not isinstance(file, str):
            raise RecipeError(f"{key}: wanted name: path, got {_show(name)}: {_show(file)}")
    return files


@functools.cache
def _kinds() -> dict[str, tuple[type, bool]]:
    """Field name → (plain type, whether null is allowed)."""
    kinds = {}
    for name, hint in typing.get_type_hints(Recipe).items():
        optional = isinstance(hint, types.UnionType)
        plain = typing.get_args(hint)[0] if optional else hint
        kinds[name] = (typing.get_origin(plain) or plain, optional)
    return kinds


def _comment(name: str) -> str:
    return Recipe.__dataclass_fields__[name].metadata["comment"]


def _checked(spec: dataclasses.Field, value: object) -> object:
    """`value` as the field's type, inside its limits."""
    kind, optional = _kinds()[spec.name]
    if value is None and optional:
        return None
    if kind is dict:
        return _named_files(spec.name, value)
    if kind is float:
        value = _as_float(value)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        null = " or null" if optional else ""
        raise RecipeError(f"{spec.name}: wanted {wanted[kind]}{null}, got {_show(value)}")
    choices, low, high, above = (spec.metadata[k] for k in ("choices", "low", "high", "above"))
    if choices and value not in choices:
        raise RecipeError(f"{spec.name}: wanted one of {', '.join(choices)}, got {_show(value)}")
    if low is not None and not value >= low:
        raise RecipeError(f"{spec.name}: wanted at least {low}, got {value}")
    if high is not None and not value <= high:
        raise RecipeError(f"{spec.name}: wanted at most {high}, got {value}")
    if above is not None and not above < value < math.inf:
        raise RecipeError(f"{spec.name}: wanted a number above {above:g}, got {value}")
    if kind is float and not math.isfinite(value):
        raise RecipeError(f"{spec.name}: wanted a finite number, got {value}")
    return value


def _as_float(value: object) -> object:
    """YAML 1.1 reads 2e-4 as text; a whole number is a number too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _show(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"
