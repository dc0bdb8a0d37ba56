"""Samples into token ids with a loss mask, and into prompts for generation.

The mask is found on the text (loss_mask.py). Where a template does not allow that, its own
`{% generation %}` marks are taken, and a template without them is refused rather than masked
wrongly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from citi.data.chat_template import ChatTemplate, Turn, as_dicts
from citi.data.loss_mask import NoSpanError, answer_spans, answer_start
from citi.data.sample import DataError, Sample

IGNORED = -100
TRAIN_ON = ("last", "all")


@dataclass(frozen=True)
class Rendered:
    """One sample as the model sees it.

    Args:
        input_ids: tokens, at most max_length.
        labels: the same, -100 outside the trained answers; position 0 is always -100.
        task_type: 1 = tool, 0 = general.
        truncated: whether tokens were cut.
    """

    input_ids: list[int]
    labels: list[int]
    task_type: int
    truncated: bool

    @property
    def num_answer_tokens(self) -> int:
        """Number of trained tokens; 0 means that the sample teaches nothing."""
        return sum(label != IGNORED for label in self.labels)


def render(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, *, max_length: int, train_on: str = "last"
) -> Rendered:
    """`Renderer(tokenizer, ...).render(sample)`; for many samples, keep the Renderer."""
    return Renderer(tokenizer, max_length=max_length, train_on=train_on).render(sample)


def render_prompt(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[int]:
    """`Renderer(tokenizer, ...).render_prompt(sample)`; for many samples, keep the Renderer."""
    return Renderer(tokenizer, max_length=max_length).render_prompt(sample)


class Renderer:
    """Renders samples with one tokenizer.

    Args:
        tokenizer: with a chat template.
        max_length: tokens kept of a sample (or of a prompt). A longer sample loses the oldest
            tokens before the last answer, a leading BOS excepted. An answer that would leave less
            than a quarter of max_length to the context loses its own end.
        train_on: "last" assistant turn or "all" of them. Turns behind the last assistant turn are
            left out.
    Raises: ValueError for a wrong setting, DataError without a usable chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        train_on: str = "last",
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
        if train_on not in TRAIN_ON:
            raise ValueError(f"train_on must be one of {TRAIN_ON}, got {train_on!r}")
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._max_length = max_length
        self._train_on = train_on
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self._end_tokens = tuple(special | set(tokenizer.all_special_tokens))

    def render(self, sample: Sample) -> Rendered:
        """Token ids and labels of `sample`; all labels are -100 when it has no assistant turn.

        Raises: DataError, with the sample's place, when the template refuses the conversation or
            gives no way to find the answer in it.
        """
        try:
            tokens, labels = self._tokens(sample)
        except DataError as error:
            raise DataError(f"{sample.source or sample.id}: {error}") from error
        kept_tokens, kept_labels = self._cut(tokens, labels)
        return Rendered(
            input_ids=kept_tokens,
            labels=[IGNORED, *kept_labels[1:]],
            task_type=sample.task_type,
            truncated=len(kept_tokens) < len(tokens),
        )

    def render_prompt(self, sample: Sample) -> list[int]:
        """Token ids up to the last answer, generation prompt included; the oldest are cut first.

        A sample without an assistant turn is a prompt as a whole.
        Raises: DataError, with the sample's place, when the template refuses the conversation.
        """
        try:
            tokens = self._encode(self._prompt_text(sample))
        except DataError as error:
            raise DataError(f"{sample.source or sample.id}: {error}") from error
        return self._cut(tokens, [IGNORED] * len(tokens))[0]

    def _prompt_text(self, sample: Sample) -> str:
        turns, tools = self._template.turns(sample)
        if sample.answer_index is None:
            return self._template.text(turns, tools=tools, add_generation_prompt=True)
        turns = _upto_answer(turns)
        try:
            text = self._template.text(turns, tools=tools)
            return text[: answer_start(self._template, turns, text, tools=tools)]
        except (DataError, NoSpanError):  # a refused answer leaves the prompt as it is
            return self._template.text(turns[:-1], tools=tools, add_generation_prompt=True)

    def _tokens(self, sample: Sample) -> tuple[list[int], list[int]]:
        """All tokens of the sample with their labels, uncut."""
        turns, tools = self._template.turns(sample)
        if sample.answer_index is None:
            tokens = self._encode(self._template.text(turns, tools=tools))
            return tokens, [IGNORED] * len(tokens)
        turns = _upto_answer(turns)
        text = self._template.text(turns, tools=tools)
        try:
            spans = answer_spans(
                self._template,
                turns,
                text,
                tools=tools,
                train_on=self._train_on,
                end_tokens=self._end_tokens,
            )
        except NoSpanError:
            return self._marked_tokens(turns, tools=tools)
        end = spans[-1][1]
        tokens, labels = self._encode_spans(text[:end], spans)
        if not text[:end].endswith(self._end_tokens) and self._tokenizer.eos_token_id is not None:
            tokens = [*tokens, self._tokenizer.eos_token_id]
            labels = [*labels, self._tokenizer.eos_token_id]
        return tokens, labels

    def _encode(self, text: str) -> list[int]:
        # The template writes BOS itself.
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_spans(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Tokens and labels; text is tokenised as one piece wherever spans begin between tokens."""
        edges = sorted({0, len(text), *(edge for span in spans for edge in span)})
        whole = self._encode(text)
        heads = [whole if edge == len(text) else self._encode(text[:edge]) for edge in edges]
        if all(whole[: len(head)] == head for head in heads):
            pieces = [whole[len(a) : len(b)] for a, b in pairwise(heads)]
        else:
            # A token would straddle an edge; generation starts from the prompt's own tokens.
            pieces = [self._encode(text[a:b]) for a, b in pairwise(edges)]
        tokens, labels = [], []
        for (a, b), piece in zip(pairwise(edges), pieces, strict=True):
            trained = any(start <= a and b <= end for start, end in spans)
            tokens += piece
            labels += piece if trained else [IGNORED] * len(piece)
        return tokens, labels

    def _marked_tokens(
        self, turns: list[Turn], *, tools: list[dict] | None
    ) -> tuple[list[int], list[int]]:
        """Tokens and labels by the template's own `{% generation %}` marks."""
        template = self._template.template(tools)
        if not re.search(r"\{%-?\s*generation\b", template):
            raise DataError(
                "the chat template renders the conversation so that its answers cannot be told "
                "from the rest; mark them with {% generation %} in tokenizer.chat_template, or "
                "choose a template that renders earlier turns unchanged"
                + (", or train_on=last" if self._train_on == "all" else "")
            )
        marked = self._tokenizer.apply_chat_template(
            as_dicts([turn.message for turn in turns]),
            tools=tools,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, mask = list(marked["input_ids"]), list(marked["assistant_masks"])
        if self._train_on == "last":
            last = next((i for i in reversed(range(len(mask))) if mask[i]), -1)
            first = next((i for i in range(last, -1, -1) if not mask[i]), -1)
            mask = [int(first < i <= last) for i in range(len(mask))]
        return tokens, [t if m else IGNORED for t, m in zip(tokens, mask, strict=True)]

    def _cut(self, tokens: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """At most max_length tokens: see the class."""
        surplus = len(tokens) - self._max_length
        if surplus <= 0:
            return tokens, labels
        trained = [i for i, label in enumerate(labels) if label != IGNORED]
        answer = len(tokens)
        if trained:
            answer = next(i for i in reversed(trained) if i == 0 or labels[i - 1] == IGNORED)
        context = min(answer, max(self._max_length - (len(tokens) - answer), self._max_length // 4))
        bos = int(context > 1 and tokens[0] == self._tokenizer.bos_token_id)
        kept = [*range(bos), *range(answer - context + bos, len(tokens))][: self._max_length]
        return [tokens[i] for i in kept], [labels[i] for i in kept]


def _upto_answer(turns: list[Turn]) -> list[Turn]:
    last = max(i for i, turn in enumerate(turns) if turn.message.role == "assistant")
    return turns[: last + 1]
