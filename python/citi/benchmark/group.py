"""A group of rows that are timed in turn, and what is measured of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Pass(NamedTuple):
    """One thing that is timed: `forward` makes something, `backward`, if any, takes it."""

    forward: Callable[[], Any]
    backward: Callable[[Any], object] | None = None


NOT_ASKED = "not asked for"


@dataclass(frozen=True)
class Settings:
    """How a suite is run.

    Attributes:
        device: "cpu" or "cuda".
        dtypes: names in `DTYPES`.
        is_quick: fewer and smaller shapes.
        seconds: of measurement for each group, beyond the warm-up.
        clock: "wall", or "cpu" for this process's CPU time alone, on a machine shared with others.
        compiles: whether the peers under torch.compile run, which compile for minutes.
        patience: seconds; a row that takes longer is timed once, beside the baseline once.
        without: rows that are not asked for; a baseline is timed all the same.
    """

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    is_quick: bool = False
    seconds: float = 5.0
    clock: str = "wall"
    compiles: bool = False
    patience: float = math.inf
    without: tuple[str, ...] = ()

    def wants(self, row: str, baseline: str) -> bool:
        """Whether a row of a group with this baseline is asked for."""
        return row == baseline or row not in self.without


@dataclass(frozen=True)
class Group:
    """Rows that answer one question.

    Attributes:
        suite: name of the suite that it belongs to.
        settings: shape, dtype and what else tells it from other groups; numbers and texts.
        baseline: row that the others are divided by.
        make: makes the rows; takes the memory that they need, until it is dropped.
        check: compares the rows of ours with their definition; the share of the allowance used.
        stands_for: row -> what it is, in a few words.
        limits: row -> (gate, goal) of its time over the baseline's, if the project set one.
        skipped: row -> why it cannot run here.
        tokens: that one pass of any row takes.
        flops, bytes: of the baseline's pass, arithmetic and least traffic; 0: not counted.
        is_cold: whether the caches are emptied before every pass.
    """

    suite: str
    settings: Mapping[str, Any]
    baseline: str
    make: Callable[[], dict[str, Pass]]
    check: Callable[[], float]
    stands_for: Mapping[str, str]
    tokens: int
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    is_cold: bool = True

    @property
    def title(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())


Suite = Callable[[Settings], Iterator[Group]]


@dataclass(frozen=True)
class Row:
    """What was measured of one row: medians over the rounds.

    Attributes:
        seconds: by "forward", "backward" and "both", of one pass.
        ratio: the same over the baseline of the same round.
        saved_bytes: kept by the forward for the backward, parameters apart.
        peak_bytes: most bytes of tensors alive at once, over those before the pass.
        limit: (gate, goal) of its time over the baseline's, if the project set one.
        rounds: 1 for a row that was too slow for more; None: in all rounds of the group.
    """

    name: str
    stands_for: str
    seconds: dict[str, float]
    ratio: dict[str, float]
    saved_bytes: int
    peak_bytes: int
    limit: tuple[float, float] | None = None
    rounds: int | None = None


@dataclass(frozen=True)
class Result:
    """One measured group, as it stands in a record."""

    suite: str
    settings: dict[str, Any]
    title: str
    baseline: str
    tokens: int
    flops: float
    bytes: float
    rounds: int
    accuracy_used: float
    rows: tuple[Row, ...]
    skipped: dict[str, str]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        rows = tuple(
            Row(**row | {"limit": None if row["limit"] is None else tuple(row["limit"])})
            for row in content["rows"]
        )
        return cls(**content | {"rows": rows})
