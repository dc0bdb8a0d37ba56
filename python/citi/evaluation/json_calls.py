"""Reads calls that are JSON: `{"name", "arguments"}`, lists of them, OpenAI's `tool_calls`."""

from __future__ import annotations

import json
import re
from typing import Any

from citi.evaluation.call_syntax import CallReader, ToolCall

_JSON_START = re.compile(r"\[\s*\{\s*\"|\{\s*\"")
_JSON_CALL = re.compile(
    r"\{\s*\"name\"\s*:\s*\"([^\"\n]+)\"\s*,\s*\"(?:arguments|parameters)\"", re.DOTALL
)

# The calls of a text, and whether none of them had to be guessed.
Found = tuple[list[ToolCall], bool]


def json_calls(text: str) -> Found:
    """JSON values that describe calls, anywhere in the text."""
    calls: list[ToolCall] = []
    clean, position = True, 0
    decoder = json.JSONDecoder()
    while (start := _JSON_START.search(text, position)) is not None:
        try:
            value, position = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            position = start.start() + 1
            continue
        found, good = calls_of_json(value)
        calls.extend(found)
        clean &= good or not found
    if calls:
        return calls, clean
    damaged = _JSON_CALL.search(text)
    if damaged is None:
        return [], False
    value = CallReader(text, damaged.start()).value()
    found = calls_of_json(value)[0] if isinstance(value, dict) else []
    return found or [ToolCall(damaged[1].strip())], False


def calls_of_json(value: Any, *, tagged: bool = False) -> Found:
    """The calls that a JSON value describes, and whether all of it does.

    `tagged`: the surroundings already say that this is a call, so arguments may be absent.
    """
    if isinstance(value, list):
        parts = [calls_of_json(item, tagged=tagged) for item in value]
        calls = [call for part in parts for call in part[0]]
        return calls, bool(calls) and all(good for _, good in parts)
    if not isinstance(value, dict):
        return [], False
    for wrapper in ("tool_calls", "function_call", "function"):
        if isinstance(value.get(wrapper), (dict, list)):
            return calls_of_json(value[wrapper], tagged=tagged)
    keys = [key for key in ("arguments", "parameters") if key in value]
    name = value.get("name")
    if not isinstance(name, str) or not name.strip() or not (keys or tagged):
        return [], False
    arguments = value[keys[0]] if keys else None
    if isinstance(arguments, str):
        arguments, good = json_object(arguments)
        return [ToolCall(name.strip(), arguments)], good
    good = isinstance(arguments, dict)
    return [ToolCall(name.strip(), dict(arguments) if good else {})], good


def json_object(text: str) -> tuple[dict[str, Any], bool]:
    """The object that `text` spells, strictly or tolerantly, and whether it is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        reader = CallReader(text.strip())
        value = reader.value()
        return (value, reader.clean) if isinstance(value, dict) else ({}, False)
    return (value, True) if isinstance(value, dict) else ({}, False)
