"""The formats that people keep fine-tuning data in, told apart by the keys of each row.

A format is one entry of FORMATS: a name, the keys a row must have, and a converter from the row to
one or more conversations. The first entry that fits is taken, so narrower formats stand first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from citi.data.benchmark_formats import (
    from_api_bank,
    from_bfcl,
    from_tool_alpaca,
    from_xlam,
    is_api_bank,
)
from citi.data.fields import Conversation, exchange, messages_of, text_of, tools_of
from citi.data.sample import Message

_RESULT = re.compile(r"(?:####|[Tt]he answer is:)\s*(\S[^\n]*)\s*\Z")
_SCORING_KEYS = ("answer", "answers", "gold_calls", "possible_answer", "golden_answer")


@dataclass(frozen=True)
class Format:
    """One way of writing a conversation.

    Args:
        name: shown by `citi data check`.
        keys: a row of this format has all of them.
        convert: row -> conversations; raises RowError for a row that is to be dropped.
        fits: a further condition, for formats that share their keys.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[dict], list[Conversation]]
    fits: Callable[[dict], bool] = lambda row: True


@dataclass(frozen=True)
class FormatVerdict:
    """A format found in a file: its name, the keys that decided, the number of rows."""

    name: str
    keys: tuple[str, ...]
    num_rows: int


def detect(row: dict) -> Format | None:
    """The first format that `row` fits, None when there is none."""
    for candidate in FORMATS:
        if all(key in row for key in candidate.keys) and candidate.fits(row):
            return candidate
    return None


def _meta(row: dict) -> dict:
    meta = row.get("meta")
    scoring = {key: row[key] for key in _SCORING_KEYS if row.get(key) is not None}
    return {**scoring, **(meta if isinstance(meta, dict) else {})}


def _from_messages(row: dict) -> list[Conversation]:
    messages = messages_of(row["messages"], system=row.get("system"))
    tools = tools_of(row.get("tools") or row.get("functions"))
    return [Conversation(messages, tools, _meta(row))]


def _from_conversations(row: dict) -> list[Conversation]:
    messages = messages_of(row["conversations"], system=row.get("system"))
    return [Conversation(messages, tools_of(row.get("tools")), _meta(row))]


def _from_alpaca(row: dict) -> list[Conversation]:
    parts = [text_of(row.get(key), key) for key in ("instruction", "input")]
    earlier = tuple(
        Message(role, text_of(text, "history"))
        for pair in row.get("history") or []
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    system = text_of(row.get("system"), "system")
    head = (Message("system", system),) if system else ()
    last = exchange("\n".join(part for part in parts if part), text_of(row["output"], "output"))
    return [Conversation(head + earlier + last, tools_of(row.get("tools")), _meta(row))]


def _from_prompt(row: dict) -> list[Conversation]:
    system = text_of(row.get("system"), "system")
    messages = [Message("system", system)] if system and not _has_system(row["prompt"]) else []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[key]
        turns = isinstance(value, list)
        messages += messages_of(value) if turns else [Message(role, text_of(value, key))]
    return [Conversation(tuple(messages), tools_of(row.get("tools")), _meta(row))]


def _has_system(prompt: object) -> bool:
    return isinstance(prompt, list) and bool(prompt) and messages_of(prompt[:1])[0].role == "system"


def _from_pair(asked: str, answered: str) -> Callable[[dict], list[Conversation]]:
    """A converter of rows of one question, with an optional `context`, and one answer.

    Where the answer marks its result, as GSM8K (`####`) and MetaMathQA ("The answer is:") do, that
    is what judges a generated answer.
    """

    def convert(row: dict) -> list[Conversation]:
        parts = [text_of(row.get(key), key) for key in (asked, "context")]
        answer = text_of(row[answered], answered)
        system = text_of(row.get("system"), "system")
        messages = exchange("\n".join(part for part in parts if part), answer, system=system)
        meta = row.get("meta")
        result = _RESULT.search(answer)
        marked = {"answer": result.group(1)} if result else {}
        return [Conversation(messages, (), marked | (meta if isinstance(meta, dict) else {}))]

    return convert


FORMATS: tuple[Format, ...] = (
    Format("chat record", ("id", "task", "messages"), _from_messages),
    Format("OpenAI messages", ("messages",), _from_messages),
    Format("ShareGPT conversations", ("conversations",), _from_conversations),
    Format("xLAM query-answers", ("query", "tools", "answers"), from_xlam),
    Format("API-Bank", ("instruction", "input", "expected_output"), from_api_bank, is_api_bank),
    Format("API-Bank", ("instruction", "input", "output"), from_api_bank, is_api_bank),
    Format("ToolAlpaca", ("Function_Description", "Instances"), from_tool_alpaca),
    Format("ToolAlpaca", ("Function_Description", "Instructions"), from_tool_alpaca),
    Format("BFCL question-function", ("question", "function"), from_bfcl),
    Format("Alpaca", ("instruction", "output"), _from_alpaca),
    Format("prompt-completion", ("prompt", "completion"), _from_prompt),
    Format("Dolly", ("instruction", "response"), _from_pair("instruction", "response")),
    Format("query-response", ("query", "response"), _from_pair("query", "response")),
    Format("question-answer", ("question", "answer"), _from_pair("question", "answer")),
)
