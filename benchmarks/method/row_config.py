"""A row of the comparison: its file in rows/, checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from citi.recipe import Recipe

ROWS = (
    "vanilla",
    "ft",
    "lora",
    "ft_dm",
    "lora_dm",
    "dm",
    "uco",
    "rp_mi",
    "without_molora",
    "without_router_loss",
    "without_rp",
    "citi",
)
# other settings of CITI; they run when they are asked for by name
TRIALS = ("citi_kl", "citi_wide", "citi_long")
CONTROL = "dm"
METHODS = ("none", "full", "lora", "citi")
DATA = ("tool", "mix", "general")
STAGES = {"none": (), "full": ("full",), "lora": ("lora", "whole"), "citi": ("rp", "mi", "uco")}
RATES = ("learning_rate", "uco_learning_rate")
_FOLDER = Path(__file__).parent / "rows"


class RowConfigError(ValueError):
    """A file in rows/ cannot be used; the message names the file and the key."""


@dataclass(frozen=True)
class RowConfig:
    """How one row is made.

    Attributes:
        name: Of its file.
        title: What the table calls it.
        description: What it stands for, one sentence.
        method: "none", "full" (fine-tuning of every parameter), "lora" or "citi".
        data: What it trains on: "tool", "general", or the "mix" of both.
        stages: Name of a stage → its share of the steps, relative to the others.
        components: Of method lora: "all-linear", or "important" ones of CITI's plan.
        overrides: Recipe keys that differ from the other rows'.
        rates: Candidates of the search for learning rates; where the best lies at their edge,
            the next rate is to be tried too.
        rates_of: The row whose search is taken, instead of `rates`.
        seeds: How many seeds; 0, 1, 2, …
    """

    name: str
    title: str
    description: str
    method: str
    data: str | None = None
    stages: dict[str, float] = field(default_factory=dict)
    components: str = "all-linear"
    overrides: dict[str, object] = field(default_factory=dict)
    rates: tuple[dict[str, float], ...] = ()
    rates_of: str | None = None
    seeds: int = 1

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise RowConfigError(f"rows/{self.name}.yaml: {problem}")

    @property
    def training(self) -> dict[str, object]:
        """What its training is, besides rates, seed and scale."""
        keys = ("method", "data", "stages", "components", "overrides")
        return {key: getattr(self, key) for key in keys}

    def seed_range(self, most: int | None) -> range:
        """The row's seeds, at most so many of them; None: all."""
        return range(self.seeds if most is None else min(most, self.seeds))

    def _problem(self) -> str | None:
        if self.method not in METHODS:
            return f"method: wanted one of {', '.join(METHODS)}, got {self.method!r}"
        if self.method == "none":
            extra = self.stages or self.data or self.rates or self.rates_of
            return "method none trains nothing: no data, stages or rates" if extra else None
        if self.data not in DATA:
            return f"data: wanted one of {', '.join(DATA)}, got {self.data!r}"
        unknown = set(self.stages) - set(STAGES[self.method])
        if unknown or not self.stages or min(self.stages.values()) <= 0:
            return f"stages: wanted shares above 0 of {STAGES[self.method]}, got {self.stages}"
        if bool(self.rates) == bool(self.rates_of):
            return "wanted either rates or rates_of"
        if any(set(each) - set(RATES) or not each for each in self.rates):
            return f"rates: wanted mappings with keys of {RATES}, got {self.rates}"
        keys = {spec.name for spec in dataclasses.fields(Recipe)}
        if set(self.overrides) - keys:
            return f"overrides: no recipe keys: {sorted(set(self.overrides) - keys)}"
        return None


def load_row(name: str) -> RowConfig:
    """The row of rows/`name`.yaml.

    Raises:
        RowConfigError: No such row, unknown or missing keys, or values that do not fit.
    """
    path = _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise RowConfigError(f"no row {name!r}; the rows are {', '.join(ROWS + TRIALS)}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {spec.name for spec in dataclasses.fields(RowConfig)} - {"name"}
    if not isinstance(content, dict) or set(content) - known:
        raise RowConfigError(f"rows/{path.name}: wanted keys of {sorted(known)}, got {content}")
    content["rates"] = tuple(
        {key: float(value) for key, value in each.items()} for each in content.get("rates", ())
    )
    try:
        return RowConfig(name=name, **content)
    except TypeError as error:
        raise RowConfigError(f"rows/{path.name}: {error}") from error
