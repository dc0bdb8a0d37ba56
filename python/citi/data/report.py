"""What reading a data file found: counts for the program, sentences for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field

from citi.data.formats import Format, FormatVerdict
from citi.data.sample import GENERAL, TOOL, Sample

_DUPLICATE = "samples whose id an earlier one has (kept)"
_NO_TOOLS = "tool samples with neither tools nor a system text"
_NO_ANSWER = "samples without an assistant turn (not trained on)"


@dataclass(frozen=True)
class DataReport:
    """What was found in one file.

    Args:
        path: the file.
        num_rows: rows in the file.
        num_samples: samples made of them, before `max_samples`.
        formats: the verdicts, most frequent first.
        num_tool: samples of task type 1.
        num_general: samples of task type 0.
        num_duplicate_ids: samples whose id an earlier one has; they are kept.
        num_missing_tools: tool samples with neither tools nor a system text.
        num_without_answer: samples without an assistant turn; training leaves them out.
        dropped: reason -> number of rows.
        warnings: the counts above that are not zero, for people, with the first place of each.
    """

    path: str
    num_rows: int
    num_samples: int
    formats: tuple[FormatVerdict, ...]
    num_tool: int
    num_general: int
    num_duplicate_ids: int
    num_missing_tools: int
    num_without_answer: int
    dropped: dict[str, int]
    warnings: tuple[str, ...]

    def to_json(self) -> dict:
        """The report as plain dicts and lists."""
        return asdict(self)


@dataclass
class Findings:
    """Collects a DataReport while a file is read: the places of everything worth a word."""

    num_rows: int = 0
    formats: Counter = field(default_factory=Counter)
    task_types: Counter = field(default_factory=Counter)
    dropped: defaultdict = field(default_factory=lambda: defaultdict(list))
    noted: defaultdict = field(default_factory=lambda: defaultdict(list))
    ids: set = field(default_factory=set)

    def row(self, found: Format) -> None:
        """A row was read and its format is known."""
        self.num_rows += 1
        self.formats[found.name, found.keys] += 1

    def drop(self, reason: str, place: str) -> None:
        """The row at `place` gives no sample."""
        self.dropped[reason].append(place)

    def sample(self, sample: Sample) -> None:
        """A sample was made."""
        self.task_types[sample.task_type] += 1
        if sample.id in self.ids:
            self.noted[_DUPLICATE].append(sample.source)
        self.ids.add(sample.id)
        described = sample.tools or sample.messages[0].role == "system"
        if sample.task_type == TOOL and not described:
            self.noted[_NO_TOOLS].append(sample.source)
        if sample.answer_index is None:
            self.noted[_NO_ANSWER].append(sample.source)

    def report(self, path: str) -> DataReport:
        """The report of everything collected."""
        said = [*self.noted.items()]
        said += [(f"rows dropped because {why}", at) for why, at in self.dropped.items()]
        return DataReport(
            path=path,
            num_rows=self.num_rows,
            num_samples=self.task_types.total(),
            formats=tuple(FormatVerdict(*key, n) for key, n in self.formats.most_common()),
            num_tool=self.task_types[TOOL],
            num_general=self.task_types[GENERAL],
            num_duplicate_ids=len(self.noted.get(_DUPLICATE, ())),
            num_missing_tools=len(self.noted.get(_NO_TOOLS, ())),
            num_without_answer=len(self.noted.get(_NO_ANSWER, ())),
            dropped={why: len(at) for why, at in self.dropped.items()},
            warnings=tuple(f"{len(at)} {what}, first at {at[0]}" for what, at in said),
        )
