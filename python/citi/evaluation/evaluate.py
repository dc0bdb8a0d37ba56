"""One call measures a model: tool calls, responses, and what it kept of its general ability."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from citi.data.render import Renderer
from citi.data.sample import DataError, Sample
from citi.evaluation.exact_match import is_right
from citi.evaluation.generate import generate_answers, prompt_room
from citi.evaluation.inference import Progress
from citi.evaluation.likelihood import answer_nll
from citi.evaluation.readback import num_unreadable
from citi.evaluation.rouge import NO_ROUGE, rouge_l
from citi.evaluation.tool_calls import SCORES, gold_calls_of, score_tool_calls
from citi.positions import length_limit

SCHEMA = 1
_UNCUT = 2**31  # tokens


@dataclass(frozen=True)
class EvalSettings:
    """How a model is measured.

    Args:
        max_new_tokens: the longest generated answer.
        batch_size: samples at once.
        max_length: the longest sample, in tokens.
        exact_match: whether general answers are generated and judged too; else their NLL only.
        max_tool_samples: of each tool set; None takes all.
        max_general_samples: of each general set, for the NLL; None takes all.
        max_exact_match: of these, how many are generated and judged; None takes all.
        seed: chooses the samples where a set is larger.

    Raises:
        ValueError: a count is less than one.
    """

    max_new_tokens: int = 256
    batch_size: int = 8
    max_length: int = 4096
    exact_match: bool = True
    max_tool_samples: int | None = None
    max_general_samples: int | None = None
    max_exact_match: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("exact_match", "seed") and value is not None and value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` measured. Figures that could not be measured are None.

    Attributes:
        tool: per set `format`, `name`, `arguments`, `exact` (means over its `num_calls` rows with
            wanted calls, 0 to 1), `irrelevance` (share of its `num_irrelevant` rows, whose right
            answer calls nothing, that were answered so; BFCL's name), `rouge_l` (mean F over its
            `num_responses` other rows), `n`.
        general: per set `nll` (nats a token over its `num_tokens` answer tokens), `exact_match`
            (share of its `num_judged` answers), `n`.
        settings: of the measurement.
        notes: what was left out, and why.
        answers: per tool set, each generated answer with its sample's id and scores.
    """

    tool: dict[str, dict[str, Any]]
    general: dict[str, dict[str, Any]]
    settings: EvalSettings = EvalSettings()
    notes: tuple[str, ...] = ()
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object without NaN; `from_json` reads it back equal."""
        return {"schema": SCHEMA, **asdict(self), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EvalResult:
        """Reads what `to_json` gave.

        Raises:
            ValueError: another schema, or missing or unknown keys, by their names.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(
                f"evaluation result: wanted schema {SCHEMA}, got {got!r}; evaluate again"
            )
        body = {key: value for key, value in data.items() if key != "schema"}
        _check_keys("evaluation result", body, {entry.name for entry in fields(cls)})
        _check_keys("settings", body["settings"], {entry.name for entry in fields(EvalSettings)})
        settings = EvalSettings(**body["settings"])
        return cls(**{**body, "settings": settings, "notes": tuple(body["notes"])})


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    tool: Mapping[str, Sequence[Sample]] | None = None,
    general: Mapping[str, Sequence[Sample]] | None = None,
    settings: EvalSettings | None = None,
    progress: Progress | None = None,
) -> EvalResult:
    """Measures tool calls, responses and general ability of one model.

    Tool sets are answered; rows with wanted calls (`gold_calls_of`), and rows that no tool fits,
    are scored by `score_tool_calls`, the others are responses, scored by ROUGE-L. General sets are
    measured by the NLL of their reference answers, and where meta says what is right, by exact
    match. Generated code is never run.

    Args:
        model: a Hugging Face causal LM or a PeftModel around one.
        tokenizer: its tokenizer.
        tool: name → samples.
        general: name → samples.
        settings: defaults where None.
        progress: called with (done, all, note) within each set.

    Returns:
        the figures; sets without samples stand in them with `n` 0.
    """
    settings = settings or EvalSettings()
    measure = _Measure(model, tokenizer, settings, progress)
    tool_figures = {name: measure.tool(name, samples) for name, samples in (tool or {}).items()}
    general_figures = {
        name: measure.general(name, samples) for name, samples in (general or {}).items()
    }
    notes = tuple(dict.fromkeys(measure.notes))
    return EvalResult(tool_figures, general_figures, settings, notes, measure.answers)


@dataclass
class _Measure:
    """One evaluation under way: what every set needs, and what the sets leave behind."""

    model: nn.Module
    tokenizer: Any
    settings: EvalSettings
    progress: Progress | None
    notes: list[str] = field(default_factory=list)
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.renderer = Renderer(self.tokenizer, max_length=_UNCUT)

    def tool(self, name: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """Answers a tool set and scores it."""
        samples = self._some(name, samples, self.settings.max_tool_samples)
        samples, _ = self._rendered(name, samples, self.renderer.render_prompt)
        if unreadable := num_unreadable(self.model, self.tokenizer, samples):
            self.notes.append(
                f"{name}: {unreadable} references of this set cannot be read back in the "
                "template's call form: a right answer to them scores less than 1"
            )
        texts = self._generate(name, samples)
        scored: list[dict[str, float]] = []
        without_call: list[float] = []
        responses: list[tuple[str, str]] = []
        rows: list[dict[str, Any]] = []
        for sample, text in zip(samples, texts, strict=True):
            gold = gold_calls_of(sample)
            row: dict[str, Any] = {"id": sample.id, "answer": text}
            if gold is not None:
                scores = score_tool_calls(text, gold)
                row.update(scores)
                if gold:
                    scored.append(scores)
                else:
                    without_call.append(scores["exact"])
            elif sample.answer_index is not None:
                responses.append((sample.messages[sample.answer_index].content, text))
            rows.append(row)
        self.answers[name] = rows
        return {
            **{score: _mean(row[score] for row in scored) for score in SCORES},
            "irrelevance": _mean(without_call),
            "rouge_l": self._rouge_l(responses),
            "n": len(samples),
            "num_calls": len(scored),
            "num_irrelevant": len(without_call),
            "num_responses": len(responses),
        }

    def general(self, name: str, samples: Sequence[Sample]) -> dict[str, Any]:
        """Measures a general set's reference answers, and judges answers where meta allows."""
        samples = self._some(name, samples, self.settings.max_general_samples)
        samples, rendered = self._rendered(name, samples, self.renderer.render)
        likelihood = answer_nll(
            self.model,
            self.tokenizer,
            samples,
            batch_size=self.settings.batch_size,
            max_length=self.settings.max_length,
            progress=self._named(name),
        )
        nll = likelihood.mean if math.isfinite(likelihood.mean) else None
        longest = length_limit(self.model, self.settings.max_length)
        self._note_cut(name, "samples", [len(r.input_ids) for r in rendered], longest)
        if likelihood.num_skipped:
            self.notes.append(f"{name}: {likelihood.num_skipped} samples without answer tokens")
        if nll is None and any(likelihood.num_tokens):
            self.notes.append(f"{name}: the NLL is not finite")
        judged = [sample for sample in samples if is_right("", sample) is not None]
        judged = judged[: self.settings.max_exact_match] if self.settings.exact_match else []
        texts = self._generate(name, judged)
        right = [bool(is_right(text, sample)) for text, sample in zip(texts, judged, strict=True)]
        return {
            "nll": nll,
            "exact_match": _mean(right),
            "n": len(samples),
            "num_tokens": sum(likelihood.num_tokens),
            "num_judged": len(judged),
        }

    def _some(self, name: str, samples: Sequence[Sample], limit: int | None) -> Sequence[Sample]:
        """`samples`, or as many of them as `limit` allows: the seed's choice, in their order."""
        if not samples:
            self.notes.append(f"{name}: no samples")
        if limit is None or len(samples) <= limit:
            return samples
        chosen = random.Random(self.settings.seed).sample(range(len(samples)), limit)
        return [samples[index] for index in sorted(chosen)]

    def _rendered(
        self, name: str, samples: Sequence[Sample], render: Callable[[Sample], Any]
    ) -> tuple[list[Sample], list[Any]]:
        """The samples that the chat template renders, rendered; the others are noted."""
        kept, made, refused = [], [], Counter()
        for sample in samples:
            try:
                made.append(render(sample))
            except DataError as error:
                refused[str(error).removeprefix(f"{sample.source or sample.id}: ")] += 1
            else:
                kept.append(sample)
        for reason, count in refused.items():
            self.notes.append(f"{name}: {count} of {len(samples)} samples left out: {reason}")
        return kept, made

    def _note_cut(self, name: str, what: str, lengths: Sequence[int], longest: int) -> None:
        num_cut = sum(length > longest for length in lengths)
        if num_cut:
            self.notes.append(
                f"{name}: {num_cut} of {len(lengths)} {what} cut to {longest} tokens, the oldest "
                "first; a larger max_length keeps them whole where the model has the positions"
            )

    def _generate(self, name: str, samples: Sequence[Sample]) -> list[str]:
        if not samples:
            return []
        room = prompt_room(
            self.model,
            max_length=self.settings.max_length,
            max_new_tokens=self.settings.max_new_tokens,
        )
        lengths = [len(self.renderer.render_prompt(sample)) for sample in samples]
        self._note_cut(name, "prompts", lengths, room)
        return generate_answers(
            self.model,
            self.tokenizer,
            samples,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            max_length=self.settings.max_length,
            progress=self._named(name),
        )

    def _named(self, name: str) -> Progress | None:
        """The progress callable with the set's name before its note."""
        report = self.progress
        if report is None:
            return None
        return lambda done, total, note: report(done, total, f"{name}: {note}")

    def _rouge_l(self, pairs: Sequence[tuple[str, str]]) -> float | None:
        """Mean ROUGE-L F of (reference, answer) pairs; None without pairs or rouge-score."""
        if not pairs:
            return None
        try:
            return _mean(rouge_l(wanted, given) for wanted, given in pairs)
        except ImportError:
            self.notes.append(NO_ROUGE)
            return None


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return math.fsum(values) / len(values) if values else None


def _check_keys(where: str, data: Mapping[str, Any], wanted: set[str]) -> None:
    missing, unknown = sorted(wanted - set(data)), sorted(set(data) - wanted)
    if missing or unknown:
        raise ValueError(
            f"{where}: wanted the keys {sorted(wanted)}, got missing {missing} and unknown "
            f"{unknown}; evaluate again with this version"
        )
