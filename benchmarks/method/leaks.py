"""Does training or validation data hold what is asked in an evaluation? `python -m …leaks FOLDER`.

A sample leaks when a training or validation file has

- its prompt: all turns before the answer, letter by letter, or
- its question: the text of the user turns, in lower case, letters and digits alone, whatever the
  system text and the tools around it, or
- one of its tools, for a set whose tools are to be unseen, by name, in lower case, letters and
  digits alone.

Validation counts as an evaluation of training, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from citi.data import DataError, Message, Sample, read_samples
from citi.evaluation import gold_calls_of

_SHOWN = 20
_NAME_KEYS = ("name", "apiCode", "api_name")


class LeakError(DataError):
    """Training or validation data holds evaluation data; the message names files and lines."""


@dataclass(frozen=True)
class Leak:
    """One pair of samples.

    Attributes:
        kind: "prompt", "question" or "tool".
        training: file:line of the training or validation sample.
        evaluation: file:line of the evaluation sample.
        text: What both have, shortened.
    """

    kind: str
    training: str
    evaluation: str
    text: str

    def __str__(self) -> str:
        return f"{self.training}: the {self.kind} of {self.evaluation}: {self.text}"


def prompt_of(sample: Sample) -> tuple[Message, ...]:
    """The turns before the answer."""
    return sample.messages[: sample.answer_index]


def prompt_key(sample: Sample) -> str:
    """The prompt, letter by letter, with the tools it offers."""
    turns = [[m.role, m.content, m.tool_calls] for m in prompt_of(sample)]
    return json.dumps([turns, sample.tools], sort_keys=True)


def question_key(sample: Sample) -> str:
    """The user turns, normalised; of a sample without any, all of its prompt."""
    users = [m.content for m in prompt_of(sample) if m.role == "user"]
    return normalised(" ".join(users or [m.content for m in prompt_of(sample)]))


def tool_names(sample: Sample) -> set[str]:
    """Names of the tools that a sample offers or calls."""
    described = [tool.get("function", tool) for tool in sample.tools]
    names = {
        next((tool[key] for key in _NAME_KEYS if isinstance(tool.get(key), str)), None)
        for tool in described
        if isinstance(tool, Mapping)
    }
    for call in gold_calls_of(sample) or ():
        names.add(call["name"] if isinstance(call.get("name"), str) else next(iter(call)))
    return {name for name in names if name}


def normalised(text: str) -> str:
    """Lower case, letters and digits alone."""
    return "".join(character for character in text.lower() if character.isalnum())


@dataclass
class EvaluationKeys:
    """What evaluation samples are known by, with the place of one of them."""

    prompts: dict[str, str] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)

    def add(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            self.prompts.setdefault(prompt_key(sample), sample.source)
            if question := question_key(sample):
                self.questions.setdefault(question, sample.source)
            for name in tool_names(sample):
                self.tools.setdefault(normalised(name), sample.source)

    def knows(self, sample: Sample) -> bool:
        """Whether the prompt or the question of `sample` is among them."""
        return prompt_key(sample) in self.prompts or question_key(sample) in self.questions

    def knows_tool(self, sample: Sample) -> bool:
        """Whether prompt, question or a tool of `sample` is among them."""
        names = {normalised(name) for name in tool_names(sample)}
        return self.knows(sample) or bool(names & self.tools.keys())

    def leaks(self, sample: Sample, *, tools: bool) -> list[Leak]:
        """What `sample` has of them."""
        found = []
        prompt, question = prompt_key(sample), question_key(sample)
        shown = " ".join(m.content for m in prompt_of(sample) if m.role == "user")[:80]
        if prompt in self.prompts:
            found.append(Leak("prompt", sample.source, self.prompts[prompt], shown))
        elif question in self.questions:
            found.append(Leak("question", sample.source, self.questions[question], shown))
        if tools:
            for name in sorted(tool_names(sample)):
                if (key := normalised(name)) in self.tools:
                    found.append(Leak("tool", sample.source, self.tools[key], name))
        return found


def find_leaks(
    training: Sequence[Path],
    validation: Sequence[Path],
    evaluation: Sequence[Path],
    *,
    unseen: Sequence[Path] = (),
) -> list[Leak]:
    """Compare every sample of every file.

    Args:
        training, validation: Files that something is learnt or chosen from.
        evaluation: Files that something is measured on.
        unseen: Evaluation files whose tools must be in neither; they need not be in `evaluation`.
    Returns:
        All leaks, in the order of the files.
    Raises:
        DataError: A file cannot be read.
    """
    known, strange, chosen = EvaluationKeys(), EvaluationKeys(), EvaluationKeys()
    for keys, files in ((known, evaluation), (strange, unseen), (chosen, validation)):
        for file in files:
            keys.add(read_samples(file))
    leaks = []
    for file in (*training, *validation):
        for sample in read_samples(file):
            leaks += known.leaks(sample, tools=False)
            leaks += [each for each in strange.leaks(sample, tools=True) if each not in leaks]
            if file not in validation:
                leaks += chosen.leaks(sample, tools=False)
    return list(dict.fromkeys(leaks))


def check_leaks(folder: Path) -> None:
    """Refuse a prepared data folder in which something leaks.

    Raises:
        LeakError: Names every leak, up to 20, by file and line.
    """
    from benchmarks.method.data_sets import DataFolder

    data = DataFolder(folder)
    leaks = find_leaks(
        list(data.training().values()),
        list(data.validation().values()),
        list(data.evaluation().values()),
        unseen=list(data.evaluation("unseen").values()),
    )
    if leaks:
        more = f"\n… and {len(leaks) - _SHOWN} more" if len(leaks) > _SHOWN else ""
        listed = "\n".join(map(str, leaks[:_SHOWN]))
        raise LeakError(f"{len(leaks)} leak(s) of evaluation data:\n{listed}{more}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="prepared data: the data/ of an output folder")
    try:
        check_leaks(parser.parse_args().folder)
    except DataError as error:
        sys.exit(str(error))
    print("no leak found")


if __name__ == "__main__":
    main()
