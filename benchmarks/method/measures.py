"""Every sample's figures on every evaluation set, set by set, so that a killed measuring goes on.

Columns of a set, one value a sample:

    tool, samples that want calls   format, name, arguments, exact (0 to 1), wanted_calls (count);
                                    where no tool fits, 0 calls are wanted
    tool, the other samples         rouge_l (0 to 1)
    general                         nll (nats, over the answer), tokens (of the answer)
    general, the judged ones        right (0 or 1): the first judged_samples that meta can judge
    general, on request             passes (0 or 1): generated code passed the sample's tests
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.method.code_tests import has_tests, passes_tests
from benchmarks.method.data_sets import EVALUATION, DataFolder, EvaluationSet
from benchmarks.method.row_result import WANTED_CALLS
from benchmarks.method.scale import Scale
from citi.data import Sample, read_samples
from citi.durable import write_json
from citi.evaluation import answer_nll, generate_answers, gold_calls_of, score_tool_calls
from citi.evaluation.exact_match import is_right
from citi.evaluation.rouge import rouge_l
from citi.evaluation.tool_calls import SCORES
from citi.observer import RunObserver
from citi.saved_json import read_object

FORMAT, VERSION = "citi.method_measures", 2
_TYPES = {"columns": dict, "seconds": float}
DIGITS = 5

Columns = dict[str, list[float]]


@dataclass(frozen=True)
class Measuring:
    """A model and how it is measured.

    Attributes:
        model, tokenizer: What is measured.
        scale: Lengths and counts.
        run_code: Whether generated code is run, in a sandboxed process.
        answers: Folder that gets what the model answered, one file a set, for those who want to
            read it, or to score it otherwise; None: not kept.
        observer: Told of progress.
    """

    model: nn.Module
    tokenizer: Any
    scale: Scale
    run_code: bool = False
    answers: Path | None = None
    observer: RunObserver = dataclasses.field(default_factory=RunObserver)

    def tool(self, samples: Sequence[Sample], note: str) -> Columns:
        """Answers a tool set and scores it."""
        columns: Columns = {name: [] for name in (*SCORES, WANTED_CALLS, "rouge_l")}
        answers = self._answers(samples, note)
        for sample, answer in zip(samples, answers, strict=True):
            gold = gold_calls_of(sample)
            if gold is not None:
                for name, value in score_tool_calls(answer, gold).items():
                    columns[name].append(round(value, DIGITS))
                columns[WANTED_CALLS].append(len(gold))
            elif sample.answer_index is not None:
                wanted = sample.messages[sample.answer_index].content
                columns["rouge_l"].append(round(rouge_l(wanted, answer), DIGITS))
        return {name: values for name, values in columns.items() if values}

    def general(self, samples: Sequence[Sample], note: str) -> Columns:
        """Measures the reference answers of a general set, and judges answers where meta allows."""
        likelihood = self.likelihood(samples, note)
        columns: Columns = {
            "nll": [round(value, DIGITS) for value in likelihood.nll],
            "tokens": list(likelihood.num_tokens),
        }
        judges: dict[str, tuple[Callable, Callable]] = {
            "right": (lambda sample: is_right("", sample) is not None, is_right)
        }
        if self.run_code:
            judges["passes"] = (has_tests, passes_tests)
        for name, (can_be_judged, judge) in judges.items():
            judged = [sample for sample in samples if can_be_judged(sample)]
            judged = judged[: self.scale.judged_samples]
            if judged:
                answers = self._answers(judged, note)
                pairs = zip(answers, judged, strict=True)
                columns[name] = [int(judge(answer, sample)) for answer, sample in pairs]
        return columns

    def likelihood(self, samples: Sequence[Sample], note: str) -> Any:
        return answer_nll(
            self.model,
            self.tokenizer,
            samples,
            batch_size=self.scale.eval_batch_size,
            max_length=self.scale.eval_max_length,
            progress=self._noted(note),
        )

    def _answers(self, samples: Sequence[Sample], note: str) -> list[str]:
        answers = generate_answers(
            self.model,
            self.tokenizer,
            samples,
            max_new_tokens=self.scale.max_new_tokens,
            batch_size=self.scale.eval_batch_size,
            max_length=self.scale.eval_max_length,
            progress=self._noted(note),
        )
        if self.answers is not None:
            by_id = {sample.id: answer for sample, answer in zip(samples, answers, strict=True)}
            write_json(self.answers / f"{note}.json", by_id)
        return answers

    def _noted(self, note: str) -> Callable[[int, int | None, str], None]:
        return lambda done, total, what: self.observer.progress(done, total, f"{note}: {what}")


def measure_sets(
    measuring: Measuring, data: DataFolder, folder: Path
) -> tuple[dict[str, Columns], float]:
    """Measure all evaluation sets; a set whose file lies in `folder` is read, not measured.

    Args:
        measuring: The model and how.
        data: Prepared files.
        folder: Gets one file a set.
    Returns:
        Set → columns, and the seconds that it took over all calls.
    """
    found, seconds = {}, 0.0
    for each in EVALUATION:
        file = folder / f"{each.name}.json"
        if not file.is_file():
            _measure_set(measuring, each, data.evaluation()[each.name], file)
        saved = read_object(file, file_format=FORMAT, version=VERSION, types=_TYPES)
        found[each.name] = saved["columns"]
        seconds += saved["seconds"]
    return found, round(seconds, 3)


def validation_nll(measuring: Measuring, files: Mapping[str, Path]) -> float:
    """Mean over the sets of the answer NLL in nats a token; what learning rates are chosen by."""
    values = [
        measuring.likelihood(read_samples(file), f"validation {name}").mean
        for name, file in files.items()
    ]
    return sum(values) / len(values)


def _measure_set(measuring: Measuring, each: EvaluationSet, source: Path, file: Path) -> None:
    began = time.monotonic()
    samples = read_samples(source, task_type=int(each.task == "tool"))
    columns = getattr(measuring, each.task)(samples, each.name)
    seconds = round(time.monotonic() - began, 3)
    content = {"format": FORMAT, "version": VERSION, "columns": columns, "seconds": seconds}
    write_json(file, content)
