"""Where the answers stand in a rendered conversation.

What a template renders before an answer, generation prompt included, is a beginning of what it
renders with the answer; the rest is the answer and its end-of-turn token. Templates that write
something else where the answer begins (an opened or closed block of thoughts) are searched for the
answer's text behind the turns before it. A position that cannot be proved is never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

from citi.data.chat_template import ChatTemplate, Turn
from citi.data.sample import Message

_PROBE = "probe-reply"


class NoSpanError(Exception):
    """The template renders the conversation so that an answer cannot be told from its context."""


def answer_start(
    template: ChatTemplate, turns: Sequence[Turn], text: str, *, tools: list[dict] | None
) -> int:
    """Where the last of `turns`, an answer, begins in `text`, which renders them all.

    Raises: NoSpanError when the turns before it are rendered otherwise in `text`.
    """
    message, given = turns[-1].message, turns[-1].given
    if message.tool_calls and not (message.content.strip() or given):
        return _call_start(template, turns, text, tools=tools)
    for generation_prompt in (True, False):
        before = template.text(
            list(turns[:-1]), tools=tools, add_generation_prompt=generation_prompt
        )
        sought = given if given or generation_prompt else message.content.strip()
        if not (sought or generation_prompt):
            # An answer still to come: its beginning shows in nothing but the generation prompt.
            continue
        start = text.find(sought, len(before))
        if text.startswith(before) and start >= 0:
            return start + len(given)
    raise NoSpanError


def _call_start(
    template: ChatTemplate, turns: Sequence[Turn], text: str, *, tools: list[dict] | None
) -> int:
    """Where an answer begins that is tool calls alone: there is no text of it to search for.

    Behind the generation prompt; where that opens a block of thoughts that the answer does not
    have, where a text begins that stands in the answer's place.
    """
    before = list(turns[:-1])
    prompt = template.text(before, tools=tools, add_generation_prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    probe = template.text([*before, Turn(Message("assistant", _PROBE))], tools=tools)
    head = probe[: max(probe.rfind(_PROBE), 0)]
    if not head or not text.startswith(head):
        raise NoSpanError
    return len(head)


def answer_spans(
    template: ChatTemplate,
    turns: Sequence[Turn],
    text: str,
    *,
    tools: list[dict] | None,
    train_on: str,
    end_tokens: tuple[str, ...],
) -> list[tuple[int, int]]:
    """(start, end) in `text` of the trained answers of `turns`, the last of which is an answer.

    Args:
        template: renders the turns.
        turns: the conversation.
        text: `turns` rendered.
        tools: the tools it was rendered with.
        train_on: "last" or "all".
        end_tokens: special tokens; the one behind an answer belongs to it, white space behind
            that does not.
    Raises: NoSpanError.
    """
    answers = [i for i, turn in enumerate(turns) if turn.message.role == "assistant"]
    if train_on == "last":
        start = answer_start(template, turns, text, tools=tools)
        return [(start, _without_trailing_space(text, end_tokens))]
    spans = []
    for i in answers:
        upto = turns[: i + 1]
        part = text if len(upto) == len(turns) else template.text(list(upto), tools=tools)
        if text.startswith(part):
            start = answer_start(template, upto, part, tools=tools) - len(turns[i].given)
            spans.append((start, _without_trailing_space(part, end_tokens)))
        else:
            spans.append(_search(template, upto, text, tools=tools, end_tokens=end_tokens))
    return spans


def _without_trailing_space(text: str, end_tokens: tuple[str, ...]) -> int:
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(end_tokens) else len(text)


def _search(
    template: ChatTemplate,
    turns: Sequence[Turn],
    text: str,
    *,
    tools: list[dict] | None,
    end_tokens: tuple[str, ...],
) -> tuple[int, int]:
    """The span of an earlier answer that is rendered otherwise once turns follow it."""
    content, calls = turns[-1].message.content.strip(), turns[-1].message.tool_calls
    start = answer_start(template, turns, text, tools=tools) - len(turns[-1].given)
    if calls:
        return start, _end_of_calls(content, calls, text, start, end_tokens=end_tokens)
    found = text.find(content, start)
    if found < 0 or not content:
        raise NoSpanError
    behind = text[found + len(content) :]
    stripped = behind.lstrip()
    ends = [token for token in end_tokens if stripped.startswith(token)]
    if not ends:
        raise NoSpanError
    return start, len(text) - len(stripped) + max(len(token) for token in ends)


def _end_of_calls(
    content: str, calls: Sequence[dict], text: str, start: int, *, end_tokens: tuple[str, ...]
) -> int:
    """The end of an earlier answer with calls: its first end token, behind all that it says.

    Raises: NoSpanError where the text before that token lacks a part of the answer.
    """
    ends = [(text.find(token, start), len(token)) for token in end_tokens]
    found = [(place, -length) for place, length in ends if place >= 0]
    if not found:
        raise NoSpanError
    place, negative_length = min(found)
    said = text[start:place]
    if content not in said or not all(call["name"] in said for call in calls):
        raise NoSpanError
    return place - negative_length
