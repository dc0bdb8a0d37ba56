"""One training or evaluation example, whatever format it was written in."""

from __future__ import annotations

from dataclasses import dataclass, field

GENERAL, TOOL = 0, 1
ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """The data cannot be used as it is; the message names the file and line, and the way out."""


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        role: one of ROLES.
        content: the text, possibly empty when there are tool calls.
        tool_calls: structured calls `{"name": str, "arguments": dict}` of an assistant turn.
        name: the function that a tool turn answers for.
    """

    role: str
    content: str
    tool_calls: tuple[dict, ...] | None = None
    name: str | None = None


@dataclass(frozen=True)
class Sample:
    """A conversation with the tools it may use.

    Args:
        id: unique within its file, where the file says so.
        task_type: 1 = tool, 0 = general.
        task: the ability's name: tool, math, code ...
        messages: the turns; the last assistant turn is the reference answer.
        tools: JSON descriptions as the file gives them.
        meta: what scoring needs: gold_calls, answer, answers ...
        source: "file:line".
    """

    id: str
    task_type: int
    task: str
    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    meta: dict = field(default_factory=dict)
    source: str = ""

    @property
    def answer_index(self) -> int | None:
        """Position of the last assistant turn, None without one."""
        indices = [i for i, message in enumerate(self.messages) if message.role == "assistant"]
        return indices[-1] if indices else None
