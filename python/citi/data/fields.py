"""Single fields of a row, brought into one form: texts, roles, tools, tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from citi.data.sample import Message

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")


class RowError(ValueError):
    """This row cannot become a sample; it is dropped and counted under the message."""


@dataclass(frozen=True)
class Conversation:
    """What a format's converter makes of a row."""

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] = ()
    meta: dict = field(default_factory=dict)


def parse_json(value: object, name: str) -> object:
    """`value` itself, or what it says when it is a JSON string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise RowError(f"{name} is not valid JSON") from None


def text_of(value: object, name: str) -> str:
    """A text: string, None (empty), or a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and "text" in p for p in value):
        return "".join(str(part["text"]) for part in value)
    raise RowError(f"{name} is not text")


def tools_of(value: object) -> tuple[dict, ...]:
    """Tool descriptions from a list, a dict, a JSON string, or a list of JSON strings."""
    value = parse_json(value, "tools") if value else []
    tools = [parse_json(t, "tools") for t in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools is not a list of JSON objects")
    return tuple(tools)


def calls_of(value: object) -> tuple[dict, ...]:
    """Calls as `{"name", "arguments": dict}` from OpenAI's, xLAM's and ShareGPT's forms."""
    value = parse_json(value, "tool_calls")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = parse_json(call, "tool_calls")
        call = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise RowError("a tool call has no name")
        arguments = parse_json(call.get("arguments", call.get("parameters")) or {}, "arguments")
        if not isinstance(arguments, dict):
            raise RowError("the arguments of a tool call are not a JSON object")
        calls.append({"name": call["name"], "arguments": arguments})
    return tuple(calls)


def wanted_calls(value: object) -> list[dict]:
    """Calls to score against, as `calls_of` gives them; BFCL's listings stay as they are.

    Raises: RowError for anything else.
    """
    value = parse_json(value, "gold_calls")
    entries = [parse_json(e, "gold_calls") for e in (value if isinstance(value, list) else [value])]
    return [entry if is_listing(entry) else calls_of([entry])[0] for entry in entries]


def is_listing(entry: object) -> bool:
    """Whether `entry` is a call of BFCL, whose arguments list what they accept."""
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    (arguments,) = entry.values()
    return isinstance(arguments, dict) and all(isinstance(v, list) for v in arguments.values())


def message_of(turn: object) -> Message:
    """One turn, with the keys of OpenAI (`role, content`) or of ShareGPT (`from, value`)."""
    if not isinstance(turn, dict):
        raise RowError("a turn is not a JSON object")
    role = turn.get("role", turn.get("from"))
    if role not in _ROLES:
        raise RowError(f"unknown role {role!r}")
    value = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls") or turn.get("function_call")
    if role in _CALL_ROLES:
        calls, value = value, ""
    if _ROLES[role] == "tool" and isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    return Message(
        role=_ROLES[role],
        content=text_of(value, "content"),
        tool_calls=calls_of(calls) if calls else None,
        name=turn.get("name"),
    )


def messages_of(turns: object, *, system: object = None) -> tuple[Message, ...]:
    """A whole conversation, with the row's own system text put first when there is one."""
    if not isinstance(turns, list):
        raise RowError("the conversation is not a list of turns")
    messages = tuple(message_of(turn) for turn in turns)
    if system and not (messages and messages[0].role == "system"):
        messages = (Message("system", text_of(system, "system")), *messages)
    return messages


def exchange(user: str, answer: str | None, *, system: str = "") -> tuple[Message, ...]:
    """System text (if any), one user turn, one answer (if known)."""
    messages = [Message("system", system)] if system else []
    messages.append(Message("user", user))
    if answer is not None:
        messages.append(Message("assistant", answer))
    return tuple(messages)


def json_lines(tools: Iterable[dict]) -> str:
    """One JSON description a line."""
    return "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
