"""Finds tool calls in generated text and compares them with the wanted ones.

Formats, tried in this order, after thoughts (`<think>...</think>`) are left out:
    alone       an answer that is one call list or one JSON value from end to end
    tagged      <tool_call> with JSON {"name": "f", "arguments": {"a": 1}} (Hermes), with
                <function=f><parameter=a> (Qwen3.5) or with f<arg_key>a</arg_key> (GLM-4.5)
    Glaive      <functioncall> {"name": "f", "arguments": '{"a": 1}'}
    Gemma 4     call:f{a:1}
    gpt-oss     to=functions.f<|channel|>commentary json<|message|>{"a": 1}
    API-Bank    API-Request: [f(a='1'), g()]
    ToolAlpaca  Action: f / Action Input: {"a": 1}
    JSON        {"name": "f", "arguments": {...}}, a list of them, OpenAI's `tool_calls`
    Python      [f(a=1), g()] (BFCL, ToolACE)
The first format in which a call is found is taken.

Calls are read, never run: neither `eval` nor any model code is executed here (RELIABILITY case 58
is about evaluations that do). Text before and after the calls is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from citi.data.sample import Sample
from citi.evaluation.call_matching import (
    WantedCall,
    all_pair_up,
    matched_arguments,
    names_agree,
)
from citi.evaluation.call_syntax import ToolCall
from citi.evaluation.json_calls import calls_of_json, json_calls, json_object
from citi.evaluation.tagged_calls import gemma_calls, glaive_calls, harmony_calls, tagged_calls
from citi.evaluation.text_calls import (
    action_name,
    actions,
    api_requests,
    calls_alone,
    python_calls,
)
from citi.evaluation.thoughts import without_thoughts

SCORES = ("format", "name", "arguments", "exact")

_READERS = (
    tagged_calls,
    glaive_calls,
    gemma_calls,
    harmony_calls,
    api_requests,
    actions,
    json_calls,
    python_calls,
)


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
    calls, clean = calls_alone(text)
    if calls:
        return ParsedCalls(tuple(calls), clean)
    answer = without_thoughts(text)
    for read in _READERS:
        calls, clean = read(answer)
        if calls:
            return ParsedCalls(tuple(calls), clean)
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
        return _as_dicts(calls_of_json(list(last.tool_calls))[0])
    written = parse_tool_calls(last.content).calls
    stated = meta.get("gold_calls")
    if written:
        return list(stated) if stated and len(stated) == len(written) else _as_dicts(written)
    return [] if stated == [] else None


def _as_dict(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def _as_dicts(calls: Iterable[ToolCall]) -> list[dict[str, Any]]:
    return [_as_dict(call) for call in calls]


def _golden_action(step: Mapping[str, str]) -> dict[str, Any]:
    """ToolAlpaca's step; what it marks optional is wanted like the rest."""
    name = action_name(step["Action"])
    return {"name": name, "arguments": json_object(step["Action_Input"])[0]}
