"""Reads calls between the tags that chat templates put around them.

<tool_call> holds JSON (Hermes, Qwen2.5, Qwen3), XML (Qwen3.5, Qwen3-Coder, Nemotron 3) or keys and
values (GLM-4.5). Tags that are special tokens of a tokenizer are gone from a decoded answer: Gemma
4's and gpt-oss's are read with them and without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from citi.evaluation.call_syntax import CallReader, ToolCall, UnreadableError
from citi.evaluation.json_calls import Found, calls_of_json, json_object

_TAG = "<tool_call>"
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_END_OF_TAGGED = re.compile(r"\s*(</tool_call>|(?=<tool_call>)|\Z)")
_SEPARATOR = re.compile(r"[\s,]*")
_PYTHON_OBJECT = re.compile(r"\{\s*'")

_XML_CALL = re.compile(r"\s*<function=([^<>\n]{1,200})>\s*")
_XML_ARGUMENT = re.compile(
    r"<parameter=([^<>\n]{1,200})>\n?(.*?)\n?</parameter>\s*"
    r"(?=<parameter=|</function>|</tool_call>|\Z)",
    re.DOTALL,
)
_XML_END = re.compile(r"</function>")
# A name alone must stand on its line: `<tool_call>later</tool_call>` is no call.
_GLM_CALL = re.compile(r"\s*([\w./ -]{1,200}?)\s*(?=<arg_key>|\n\s*</tool_call>)")
_GLM_ARGUMENT = re.compile(
    r"<arg_key>\s*([^<>\n]{1,200}?)\s*</arg_key>\s*<arg_value>(.*?)</arg_value>\s*"
    r"(?=<arg_key>|</tool_call>|\Z)",
    re.DOTALL,
)

_GLAIVE = re.compile(
    r"<functioncall>\s*(.*?)\s*(?:</functioncall>|<\|endoftext\|>|(?=<functioncall>)|\Z)",
    re.DOTALL,
)
_QUOTED_ARGUMENTS = re.compile(
    r"\{\s*\"name\"\s*:\s*\"([^\"\n]+)\"\s*,\s*\"arguments\"\s*:\s*'(.*)'\s*\}", re.DOTALL
)
_GEMMA = re.compile(r"(?:<\|tool_call>\s*|(?<![\w.]))call:([\w.-]{1,200})(?=\{)")
_GEMMA_STRING = re.compile(r"<\|\"\|>(.*?)<\|\"\|>", re.DOTALL)
_HARMONY = re.compile(
    r"(commentary\s+)?to=functions\.([\w.-]{1,200}?)\s*(?(1)|(?:<\|channel\|>)?(?:commentary)?)"
    r"\s*(?:<\|constrain\|>)?\s*(?:json)?\s*(?:<\|message\|>)?\s*(?=\{)"
)


def tagged_calls(text: str) -> Found:
    """Calls in <tool_call>; one without a closing tag is not well-formed."""
    calls: list[ToolCall] = []
    clean, position = True, 0
    while (position := text.find(_TAG, position)) >= 0:
        found, good, position = _tagged_block(text, position + len(_TAG))
        calls.extend(found)
        clean &= good and bool(found)
    return calls, clean


def glaive_calls(text: str) -> Found:
    """`<functioncall> {"name": "f", "arguments": '{"a": 1}'}`; Glaive closes no tag."""
    calls: list[ToolCall] = []
    clean = True
    for block in _GLAIVE.finditer(text):
        quoted = _QUOTED_ARGUMENTS.fullmatch(block[1])
        if quoted is not None:
            arguments, good = json_object(quoted[2])
            found = [ToolCall(quoted[1].strip(), arguments)]
        else:
            value, good = json_object(block[1])
            found, whole = calls_of_json(value, tagged=True)
            good &= whole
        calls.extend(found)
        clean &= good
    return calls, clean


def gemma_calls(text: str) -> Found:
    """`call:f{a:<|"|>x<|"|>,n:2}` of Gemma 4."""
    calls: list[ToolCall] = []
    clean, position = True, 0
    text = _GEMMA_STRING.sub(lambda match: json.dumps(match[1], ensure_ascii=False), text)
    while (mark := _GEMMA.search(text, position)) is not None:
        reader = CallReader(text, mark.end())
        try:
            calls.append(ToolCall(mark[1], reader.object()))
        except UnreadableError:
            return calls, False
        clean &= reader.clean
        position = reader.position
    return calls, clean


def harmony_calls(text: str) -> Found:
    """`to=functions.f<|channel|>commentary json<|message|>{"a": 1}` of gpt-oss."""
    calls: list[ToolCall] = []
    position = 0
    decoder = json.JSONDecoder()
    while (mark := _HARMONY.search(text, position)) is not None:
        try:
            arguments, position = decoder.raw_decode(text, mark.end())
        except (ValueError, RecursionError):
            return [*calls, ToolCall(mark[2], json_object(text[mark.end() :])[0])], False
        calls.append(ToolCall(mark[2], arguments))
    return calls, True


_Block = tuple[list[ToolCall], bool, int]


def _tagged_block(text: str, start: int) -> _Block:
    """The calls from behind an opening tag, whether they are whole, and where they end."""
    readers: tuple[Callable[[str, int], _Block | None], ...] = (_json_block, _xml_block, _glm_block)
    for read in readers:
        block = read(text, start)
        if block is not None:
            return block
    tagged = _TAGGED.match(text, start - len(_TAG))
    reader = CallReader(tagged[1])
    found, good = calls_of_json(reader.value(), tagged=True)
    # Hermes' first data writes Python's dicts.
    good &= _PYTHON_OBJECT.match(tagged[1]) is not None and reader.clean
    good &= reader.position == len(tagged[1]) and tagged[2] == "</tool_call>"
    return found, good, tagged.end()


def _json_block(text: str, position: int) -> _Block | None:
    """JSON values up to the closing tag; None where something else stands there.

    Read before the tags are looked for: a string in it may hold one.
    """
    calls: list[ToolCall] = []
    clean = True
    decoder = json.JSONDecoder()
    while True:
        position = _SEPARATOR.match(text, position).end()
        end = _END_OF_TAGGED.match(text, position)
        if end is not None:
            return calls, clean and end[1] == "</tool_call>", end.end()
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return None
        found, good = calls_of_json(value, tagged=True)
        calls.extend(found)
        clean &= good


def _xml_block(text: str, position: int) -> _Block | None:
    """`<function=f>` with `<parameter=a>` lines, up to the closing tag."""
    calls: list[ToolCall] = []
    clean = True
    while (opening := _XML_CALL.match(text, position)) is not None:
        arguments, position = _written_arguments(_XML_ARGUMENT, text, opening.end())
        calls.append(ToolCall(opening[1].strip(), arguments))
        closing = _XML_END.match(text, position)
        if closing is None:
            clean = False
            break
        position = closing.end()
    return _closed(calls, clean, text, position) if calls else None


def _glm_block(text: str, position: int) -> _Block | None:
    """A name, then `<arg_key>` and `<arg_value>` in turn, up to the closing tag."""
    opening = _GLM_CALL.match(text, position)
    if opening is None or not opening[1].strip():
        return None
    arguments, position = _written_arguments(_GLM_ARGUMENT, text, opening.end())
    return _closed([ToolCall(opening[1].strip(), arguments)], True, text, position)


def _written_arguments(
    pattern: re.Pattern[str], text: str, position: int
) -> tuple[dict[str, str], int]:
    """Arguments whose values stand as text, and where they end; comparison reads their types."""
    arguments: dict[str, str] = {}
    while (argument := pattern.match(text, position)) is not None:
        arguments[argument[1].strip()] = argument[2]
        position = argument.end()
    return arguments, position


def _closed(calls: list[ToolCall], clean: bool, text: str, position: int) -> _Block:
    """The block up to its closing tag; anything else before that is not well-formed."""
    end = _END_OF_TAGGED.match(text, position)
    if end is not None:
        return calls, clean and end[1] == "</tool_call>", end.end()
    return calls, False, _TAGGED.match(_TAG + text[position:]).end() - len(_TAG) + position
