"""What a reasoning model thinks before its answer is not the answer."""

from __future__ import annotations

_OPEN, _CLOSE = "<think>", "</think>"
_CALL, _END_OF_CALL = "<tool_call>", "</tool_call>"


def without_thoughts(text: str) -> str:
    """What follows the last `</think>`; the text itself where there is none.

    A `</think>` inside of `<tool_call>` is an argument's text. Of a text that opens a thought and
    never closes it (the answer's length was spent on it), nothing is left.
    """
    end = text.rfind(_CLOSE)
    while end >= 0 and _is_inside_a_call(text, end):
        end = text.rfind(_CLOSE, 0, end)
    if end >= 0:
        return text[end + len(_CLOSE) :]
    return "" if text.lstrip().startswith(_OPEN) else text


def _is_inside_a_call(text: str, position: int) -> bool:
    """Whether the next tag of a call closes one."""
    closing, opening = text.find(_END_OF_CALL, position), text.find(_CALL, position)
    return closing >= 0 and not 0 <= opening < closing
