"""Reads calls in plain text: API-Bank's requests, ToolAlpaca's actions, BFCL's Python lists."""

from __future__ import annotations

import json
import re
from itertools import islice

from citi.evaluation.call_syntax import CallReader, ToolCall, UnreadableError
from citi.evaluation.json_calls import Found, calls_of_json, json_calls, json_object

_MAX_LISTS = 20
_API_REQUEST = re.compile(r"API[- _]?Requests?\s*:", re.IGNORECASE)
_API_REQUEST_LINE = re.compile(rf"^[ \t]*{_API_REQUEST.pattern}", re.IGNORECASE | re.MULTILINE)
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_ACTION_INPUT = re.compile(r"^\s*Action[ _]Input:(.*)", re.DOTALL)
_ANY_INPUT = re.compile(r"^\s*Action[ _]Input:", re.MULTILINE)
_AFTER_ACTION = re.compile(r"^\s*(?:Observation|Thought|Response|Final Answer):", re.MULTILINE)
_OPTIONAL = re.compile(r"^\[Optional\]\s*")
_LIST_START = re.compile(r"(?<![\w)\]])\[\s*\w[\w.-]{0,150}\(")
# ToolACE's names have blanks; within prose such a bracket is a link or a remark.
_OPENING_LIST = re.compile(r"\s*\[\s*\w[\w./ -]{0,150}\(")
_BARE_CALLS = re.compile(r"[A-Za-z_][\w.]{0,150}\(")


def calls_alone(text: str) -> Found:
    """An answer that is one call list or JSON value from end to end, whatever its strings hold."""
    text = text.strip()
    mark = _API_REQUEST.match(text)
    if mark is not None or _OPENING_LIST.match(text):
        reader = CallReader(text, mark.end() if mark else 0)
        calls = _call_list(reader)
        return (calls, True) if reader.clean and reader.position == len(text) else ([], False)
    if not text.startswith(("[", "{")):
        return [], False
    try:
        return calls_of_json(json.loads(text))
    except (ValueError, RecursionError):
        return [], False


def api_requests(text: str) -> Found:
    """One call list after each `API-Request:`; calls without brackets are not well-formed."""
    calls: list[ToolCall] = []
    clean, position = True, 0
    while (mark := _API_REQUEST.search(text, position)) is not None:
        reader = CallReader(_upto(_API_REQUEST_LINE, text, mark.end()))
        found = _call_list(reader)
        position = mark.end() + reader.position
        if not found or not reader.clean:
            reader = CallReader(_upto(_API_REQUEST, text, mark.end()))
            found, clean = _call_list(reader), False
            found = found or json_calls(reader.text)[0] or _bare_calls(reader.text.strip())[0]
            position = mark.end() + len(reader.text)
        calls.extend(found)
    return calls, clean


def actions(text: str) -> Found:
    """`Action:` / `Action Input:` line pairs; a missing input is not well-formed."""
    marks = list(_ACTION.finditer(text))
    if not marks or not _ANY_INPUT.search(text):
        return [], False
    calls: list[ToolCall] = []
    clean = True
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        written = _ACTION_INPUT.match(_AFTER_ACTION.split(text[mark.end() : end])[0])
        arguments, good = json_object(written[1] if written else "")
        name = action_name(mark[1]).strip("`\"' ")
        calls.extend([ToolCall(name, arguments)] if name else [])
        clean &= good and bool(name)
    return calls, clean


def action_name(written: str) -> str:
    """The name in an `Action:` line, without ToolAlpaca's mark of a step that may be left out."""
    return _OPTIONAL.sub("", written).strip()


def python_calls(text: str) -> Found:
    """`[f(a=1), ...]` anywhere, or an answer that is nothing but calls without brackets.

    Names of several words are read where the list is the whole answer, cut off or not.
    """
    if _OPENING_LIST.match(text):
        reader = CallReader(text)
        calls = reader.call_list()
        alone = not text[reader.position :].strip()
        if alone and (reader.clean or any(call.arguments for call in calls)):
            return calls, reader.clean
    for start in islice(_LIST_START.finditer(text), _MAX_LISTS):
        reader = CallReader(text, start.start())
        calls = reader.call_list()
        opens_text = not text[: start.start()].strip()
        if reader.clean or (opens_text and any(call.arguments for call in calls)):
            return calls, reader.clean
    found, whole = _bare_calls(text.strip() + "]")
    return (found, False) if whole else ([], False)


def _call_list(reader: CallReader) -> list[ToolCall]:
    try:
        return reader.call_list()
    except UnreadableError:
        return []


def _bare_calls(text: str) -> Found:
    """Calls without the opening bracket, where the text starts with one."""
    if _BARE_CALLS.match(text) is None:
        return [], False
    reader = CallReader("[" + text)
    return reader.call_list(), reader.clean and reader.position == len(reader.text)


def _upto(mark: re.Pattern[str], text: str, start: int) -> str:
    """The text from `start` to the next mark, or to the end."""
    found = mark.search(text, start)
    return text[start : found.start() if found else len(text)]
