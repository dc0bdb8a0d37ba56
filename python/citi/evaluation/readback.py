"""Whether the scoring can read the form in which a chat template writes calls.

A model learns the template's form. Where that form cannot be read back, its right answers score
like wrong ones, which the figures alone do not tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from citi.data.render import IGNORED, Renderer
from citi.data.sample import DataError, Sample
from citi.evaluation.generate import decode_answer, end_token_ids
from citi.evaluation.tool_calls import score_tool_calls

_UNCUT = 1_000_000


def num_unreadable(model: nn.Module, tokenizer: Any, samples: Sequence[Sample]) -> int:
    """How many reference answers with structured calls do not score full against themselves.

    Each is rendered as in training and decoded as a generated answer is. A conversation that the
    template refuses, or in which it gives no way to find the answer, is not counted.

    Args:
        model: says which tokens end an answer.
        tokenizer: with a chat template.
        samples: those without structured calls in their last turn are passed over.
    """
    calling = [sample for sample in samples if _calls_of(sample)]
    if not calling:
        return 0
    renderer = Renderer(tokenizer, max_length=_UNCUT)
    ends = set(end_token_ids(model, tokenizer))
    count = 0
    for sample in calling:
        try:
            labels = renderer.render(sample).labels
        except DataError:
            continue
        answer = [label for label in labels if label != IGNORED]
        score = score_tool_calls(decode_answer(tokenizer, answer, ends), _calls_of(sample))
        count += min(score["format"], score["exact"]) < 1.0
    return count


def _calls_of(sample: Sample) -> tuple[dict, ...]:
    index = sample.answer_index
    return () if index is None else sample.messages[index].tool_calls or ()
