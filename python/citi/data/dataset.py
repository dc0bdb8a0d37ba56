"""Rendered samples as a torch data set, and one sample as people read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from citi.data.render import IGNORED, Rendered, Renderer
from citi.data.sample import TOOL, DataError, Sample

Progress = Callable[[int, int | None, str], None]
_PROGRESS_EVERY = 64


@dataclass(frozen=True)
class RenderStatistics:
    """What rendering did to a list of samples.

    Args:
        num_samples: samples given.
        num_rendered: samples kept; the others are under `dropped`.
        num_tool: kept samples of task type 1.
        num_truncated: kept samples that lost tokens to max_length.
        num_tokens: tokens of all kept samples.
        num_answer_tokens: trained tokens of all kept samples.
        median_tokens, p95_tokens, max_tokens: length of a kept sample.
        dropped: reason -> number of samples.
        examples: reason -> the first sample's place.
    """

    num_samples: int
    num_rendered: int
    num_tool: int
    num_truncated: int
    num_tokens: int
    num_answer_tokens: int
    median_tokens: int
    p95_tokens: int
    max_tokens: int
    dropped: dict[str, int]
    examples: dict[str, str]

    def to_json(self) -> dict:
        """The statistics as plain dicts."""
        return asdict(self)


class RenderedDataset(Dataset):
    """Samples rendered once; items are dicts of input_ids, labels (lists) and task_type (int).

    A sample without a trainable token (no assistant turn, refused by the template, nothing left
    within max_length) is left out and counted in `statistics`.

    Args:
        samples: what `read_samples` or `mix` gives.
        tokenizer, max_length, train_on: see `Renderer`.
        progress: called as progress(done, total, note).
    Raises: DataError when no sample is left; it gives the reasons.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        train_on: str = "last",
        progress: Progress | None = None,
    ) -> None:
        renderer = Renderer(tokenizer, max_length=max_length, train_on=train_on)
        self._items: list[Rendered] = []
        dropped, examples = Counter(), {}
        for done, sample in enumerate(samples, start=1):
            rendered, reason = _try(renderer, sample)
            if reason is None:
                self._items.append(rendered)
            else:
                dropped[reason] += 1
                examples.setdefault(reason, sample.source or sample.id)
            if progress and (done % _PROGRESS_EVERY == 0 or done == len(samples)):
                progress(done, len(samples), "tokens")
        if not self._items:
            reasons = "; ".join(f"{reason} (first: {examples[reason]})" for reason in dropped)
            raise DataError(f"none of the {len(samples)} samples can be trained on: {reasons}")
        self.statistics = _statistics(self._items, len(samples), dict(dropped), examples)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict:
        item = self._items[index]
        return {
            "input_ids": item.input_ids,
            "labels": item.labels,
            "task_type": item.task_type,
        }


class Segment(NamedTuple):
    """A run of text that is trained on, or not."""

    text: str
    trained: bool


def describe_rendered(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, *, max_length: int, train_on: str = "last"
) -> list[Segment]:
    """The text that the model sees of `sample`, special tokens included, cut where the mask turns.

    Raises: as `Renderer.render`.
    """
    rendered = Renderer(tokenizer, max_length=max_length, train_on=train_on).render(sample)
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
        trained = label != IGNORED
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return [
        Segment(tokenizer.decode(run, clean_up_tokenization_spaces=False), trained)
        for trained, run in runs
    ]


def _try(renderer: Renderer, sample: Sample) -> tuple[Rendered | None, str | None]:
    """(rendered, None), or (None, why the sample is left out)."""
    if sample.answer_index is None:
        return None, "no assistant turn"
    try:
        rendered = renderer.render(sample)
    except DataError as error:
        return None, str(error).removeprefix(f"{sample.source or sample.id}: ")
    if rendered.num_answer_tokens == 0:
        return None, "no answer token left to train on"
    return rendered, None


def _statistics(
    items: list[Rendered], num_samples: int, dropped: dict[str, int], examples: dict[str, str]
) -> RenderStatistics:
    lengths = sorted(len(item.input_ids) for item in items)
    return RenderStatistics(
        num_samples=num_samples,
        num_rendered=len(items),
        num_tool=sum(item.task_type == TOOL for item in items),
        num_truncated=sum(item.truncated for item in items),
        num_tokens=sum(lengths),
        num_answer_tokens=sum(item.num_answer_tokens for item in items),
        median_tokens=lengths[len(lengths) // 2],
        p95_tokens=lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
        max_tokens=lengths[-1],
        dropped=dropped,
        examples=examples,
    )
