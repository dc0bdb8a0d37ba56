"""Finds tool calls in generated text and compares them with the wanted ones.

Formats, tried in this order:
    Hermes      <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
    API-Bank    API-Request: [f(a='1'), g()]
    ToolAlpaca  Action: f / Action Input: {"a": 1}
    JSON        {"name": "f", "arguments": {...}}, a list of them, OpenAI's `tool_calls`
    Python      [f(a=1), g()] (BFCL)

Calls are read, never run: neither `eval` nor any model code is executed here (RELIABILITY case 58
is about evaluations that do). Text before and after the calls is allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from citi.data.sample import Sample
from citi.evaluation.call_matching import (
    WantedCall,
    all_pair_up,
    matched_arguments,
    names_agree,
)
from citi.evaluation.call_syntax import CallReader, ToolCall, UnreadableError

_MAX_LISTS = 20
SCORES = ("format", "name", "arguments", "exact")

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_END_OF_HERMES = re.compile(r"\s*(</tool_call>|(?=<tool_call>)|\Z)")
_API_REQUEST = re.compile(r"API[- _]?Requests?\s*:", re.IGNORECASE)
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_ACTION_INPUT = re.compile(r"^\s*Action[ _]Input:(.*)", re.DOTALL)
_ANY_INPUT = re.compile(r"^\s*Action[ _]Input:", re.MULTILINE)
_AFTER_ACTION = re.compile(r"^\s*(?:Observation|Thought|Response|Final Answer):", re.MULTILINE)
_OPTIONAL = re.compile(r"^\[Optional\]\s*")
_JSON_START = re.compile(r"\[\s*\{\s*\"|\{\s*\"")
_JSON_CALL = re.compile(
    r"\{\s*\"name\"\s*:\s*\"([^\"\n]+)\"\s*,\s*\"(?:arguments|parameters)\"", re.DOTALL
)
_LIST_START = re.compile(r"(?<![\w)\]])\[\s*\w[\w.-]{0,150}\(")
_BARE_CALLS = re.compile(r"[A-Za-z_][\w.]{0,150}\(")


@dataclass(frozen=True)
class ParsedCalls:
    """The calls found in a text.

    Attributes:
        calls: in the order of the text; what could be read of a damaged call is kept.
        well_formed: at least one call was found and none had to be guessed: brackets and tags are
            closed, the calls of API-Bank and BFCL stand in a list, every argument has a key. Slips
            that the published data itself makes (unquoted words, inner quotes) are accepted.
    """

    calls: tuple[ToolCall, ...]
    well_formed: bool


def parse_tool_calls(text: str) -> ParsedCalls:
    """Reads the tool calls of one answer; see the module's list of formats.

    Args:
        text: the decoded answer; may be empty or cut off anywhere.

    Returns:
        the calls; `ParsedCalls((), False)` where there is none.
    """
    for read in (_hermes, _api_requests, _actions, _json_calls, _python_calls):
        found = read(text)
        if found is not None:
            calls, clean = found
            return ParsedCalls(tuple(calls), bool(calls) and clean)
    return ParsedCalls((), False)


def score_tool_calls(text: str, gold: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compares the calls in an answer with the wanted ones.

    Calls are compared as multisets: parallel calls have no order in API-Bank, Seal-Tools and BFCL.
    Each wanted call is paired with one call of the same name, the best matches first.

    Two values are equal after these steps, and no others: surrounding blanks are cut and runs of
    blanks become one; text that spells a number, a boolean or null is that value ('3' = 3 = 3.0,
    'True' = true; '007' stays text); quotes around the whole text are cut; text that spells a list
    or an object is read as one (quote styles vanish); tuples are lists. Case counts elsewhere.
    This is stricter than BFCL's own checker, which also drops case and punctuation.

    Args:
        text: the generated answer.
        gold: wanted calls, each `{"name": ..., "arguments": {...}}` or BFCL's possible answer
            `{name: {argument: [accepted values]}}`, in which `""` says that the argument may be
            left out. Empty: the right answer holds no call.

    Returns:
        `format` 1 if the calls are well-formed; `name` 1 if the names equal the wanted ones;
        `arguments` the share of wanted arguments given with a right value (1 or 0 with the names
        if none is wanted); `exact` 1 if names and arguments are right and nothing else is there.
        With empty `gold`, all four are 1 if no call was found, else 0.

    Raises:
        ValueError: an entry of `gold` has neither form.
    """
    parsed = parse_tool_calls(text)
    wanted = [WantedCall.from_gold(entry) for entry in gold]
    if not wanted:
        return dict.fromkeys(SCORES, float(not parsed.calls))
    names = names_agree(parsed.calls, wanted)
    right, total = matched_arguments(parsed.calls, wanted)
    return {
        "format": float(parsed.well_formed),
        "name": float(names),
        "arguments": right / total if total else float(names),
        "exact": float(all_pair_up(parsed.calls, wanted)),
    }


def gold_calls_of(sample: Sample) -> list[dict[str, Any]] | None:
    """The calls that a sample's last turn should make; None where it is an ordinary answer.

    Looked up in this order: meta.possible_answer (BFCL), meta.golden_answer (ToolAlpaca),
    `tool_calls` of the last turn, meta.gold_calls where they are that turn's, calls written in the
    turn's text, an empty meta.gold_calls (the right answer makes no call).

    Args:
        sample: a `citi.data` sample; its last assistant turn is the reference answer.
    """
    if sample.answer_index is None:
        return None
    meta = sample.meta
    last = sample.messages[sample.answer_index]
    if meta.get("possible_answer"):
        return list(meta["possible_answer"])
    if meta.get("golden_answer"):
        return [_golden_action(step) for step in meta["golden_answer"]]
    if last.tool_calls:
        calls, _ = _calls_of_json(list(last.tool_calls))
        return [_as_dict(call) for call in calls]
    written = parse_tool_calls(last.content).calls
    stated = meta.get("gold_calls")
    if written:
        return list(stated) if stated and len(stated) == len(written) else _as_dicts(written)
    return [] if stated == [] else None


_Found = tuple[Iterable[ToolCall], bool] | None


def _hermes(text: str) -> _Found:
    """Tagged JSON objects; a missing closing tag is not well-formed."""
    if _HERMES.search(text) is None:
        return None
    calls: list[ToolCall] = []
    clean, position = True, 0
    decoder = json.JSONDecoder()
    while (block := _HERMES.search(text, position)) is not None:
        try:  # JSON first: its strings may hold a tag
            value, end = decoder.raw_decode(text, block.start(1))
            closing = _END_OF_HERMES.match(text, end)
        except (ValueError, RecursionError):
            closing = None
        if closing is not None:
            found, good = _calls_of_json(value, tagged=True)
            good &= closing[1] == "</tool_call>"
            position = closing.end()
        else:
            found, good = _calls_of_json(CallReader(block[1]).value(), tagged=True)[0], False
            position = block.end()
        calls.extend(found)
        clean &= good and bool(found)
    return calls, clean


def _api_requests(text: str) -> _Found:
    """One call list after each `API-Request:`; calls without brackets are not well-formed."""
    marks = list(_API_REQUEST.finditer(text))
    if not marks:
        return None
    calls: list[ToolCall] = []
    clean = True
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        reader = CallReader(text[mark.end() : end])
        try:
            calls.extend(reader.call_list())
            clean &= reader.clean
        except UnreadableError:
            clean = False
            found = _json_calls(reader.text) or _bare_calls(reader.text.strip())
            calls.extend(found[0] if found else ())
    return calls, clean


def _actions(text: str) -> _Found:
    """`Action:` / `Action Input:` line pairs; a missing input is not well-formed."""
    marks = list(_ACTION.finditer(text))
    if not marks or not _ANY_INPUT.search(text):
        return None
    calls: list[ToolCall] = []
    clean = True
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        written = _ACTION_INPUT.match(_AFTER_ACTION.split(text[mark.end() : end])[0])
        arguments, good = _json_object(written[1] if written else "")
        name = _OPTIONAL.sub("", mark[1]).strip("`\"' ")
        calls.extend([ToolCall(name, arguments)] if name else [])
        clean &= good and bool(name)
    return calls, clean


def _json_calls(text: str) -> _Found:
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
        found, good = _calls_of_json(value)
        calls.extend(found)
        clean &= good or not found
    if calls:
        return calls, clean
    damaged = _JSON_CALL.search(text)
    if damaged is None:
        return None
    value = CallReader(text, damaged.start()).value()
    found = _calls_of_json(value)[0] if isinstance(value, dict) else []
    return found or [ToolCall(damaged[1].strip())], False


def _python_calls(text: str) -> _Found:
    """`[f(a=1), ...]` anywhere, or an answer that is nothing but calls without brackets."""
    for start in islice(_LIST_START.finditer(text), _MAX_LISTS):
        reader = CallReader(text, start.start())
        calls = reader.call_list()
        opens_text = not text[: start.start()].strip()
        if reader.clean or (opens_text and any(call.arguments for call in calls)):
            return calls, reader.clean
    found = _bare_calls(text.strip() + "]")
    return (found[0], False) if found and found[1] else None


def _bare_calls(text: str) -> _Found:
    """Calls without the opening bracket, where the text starts with one."""
    if _BARE_CALLS.match(text) is None:
        return None
    reader = CallReader("[" + text)
    return reader.call_list(), reader.clean and reader.position == len(reader.text)


def _calls_of_json(value: Any, *, tagged: bool = False) -> tuple[list[ToolCall], bool]:
    """The calls that a JSON value describes, and whether all of it does.

    `tagged`: the surroundings already say that this is a call, so arguments may be absent.
    """
    if isinstance(value, list):
        parts = [_calls_of_json(item, tagged=tagged) for item in value]
        calls = [call for part in parts for call in part[0]]
        return calls, bool(calls) and all(good for _, good in parts)
    if not isinstance(value, dict):
        return [], False
    for wrapper in ("tool_calls", "function_call", "function"):
        if isinstance(value.get(wrapper), (dict, list)):
            return _calls_of_json(value[wrapper], tagged=tagged)
    keys = [key for key in ("arguments", "parameters") if key in value]
    name = value.get("name")
    if not isinstance(name, str) or not name.strip() or not (keys or tagged):
        return [], False
    arguments = value[keys[0]] if keys else None
    if isinstance(arguments, str):
        arguments, good = _json_object(arguments)
        return [ToolCall(name.strip(), arguments)], good
    good = isinstance(arguments, dict)
    return [ToolCall(name.strip(), dict(arguments) if good else {})], good


def _json_object(text: str) -> tuple[dict[str, Any], bool]:
    """The object that `text` spells, strictly or tolerantly, and whether it is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        reader = CallReader(text.strip())
        value = reader.value()
        return (value, reader.clean) if isinstance(value, dict) else ({}, False)
    return (value, True) if isinstance(value, dict) else ({}, False)


def _as_dict(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def _as_dicts(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    return [_as_dict(call) for call in calls]


def _golden_action(step: Mapping[str, str]) -> dict[str, Any]:
    """ToolAlpaca's step; what it marks optional is wanted like the rest."""
    name = _OPTIONAL.sub("", step["Action"]).strip()
    return {"name": name, "arguments": _json_object(step["Action_Input"])[0]}
