"""Rows of the tool-call benchmarks as their authors publish them."""

from __future__ import annotations

from citi.data.fields import (
    Conversation,
    RowError,
    calls_of,
    exchange,
    is_listing,
    messages_of,
    parse_json,
    text_of,
    tools_of,
)
from citi.data.sample import Message

API_DESCRIPTIONS = "API descriptions:"
_API_BANK_ROLES = {"User:": "user", "AI:": "assistant", "API-Request:": "assistant"}
_API_BANK_CUES = ("Generate API Request:", "Generate AI Response:")


def is_api_bank(row: dict) -> bool:
    """API-Bank and Alpaca share their keys; the instruction tells them apart."""
    return API_DESCRIPTIONS in str(row["instruction"])


def from_api_bank(row: dict) -> list[Conversation]:
    """`instruction, input, expected_output | output`: a transcript to be continued.

    The descriptions stand behind the instruction or before the first turn of the input; turns begin
    with `User:`, `AI:` or `API-Request: [call]->result`.
    """
    head, _, behind = text_of(row["instruction"], "instruction").partition(API_DESCRIPTIONS)
    lines = [*behind.split("\n"), *text_of(row["input"], "input").split("\n")]
    lines = [line for line in lines if line.strip() and line.strip() not in _API_BANK_CUES]
    num_tools = next((i for i, line in enumerate(lines) if not line.startswith("{")), len(lines))
    answer = text_of(row.get("expected_output", row.get("output")), "output")
    messages = [
        Message("system", f"{head}{API_DESCRIPTIONS}\n"),
        *_api_bank_turns(lines[num_tools:]),
        Message("assistant", answer),
    ]
    return [Conversation(tuple(messages), tools_of(lines[:num_tools]), dict(row.get("meta") or {}))]


def _api_bank_turns(lines: list[str]) -> list[Message]:
    turns: list[list[str]] = []
    for line in lines:
        mark = next((mark for mark in _API_BANK_ROLES if line.startswith(mark)), None)
        if mark is None:
            if not turns:
                raise RowError("the API-Bank transcript does not begin with a turn")
            turns[-1][1] += f"\n{line}"
            continue
        said = line if mark == "API-Request:" else line.removeprefix(mark).strip()
        request, arrow, result = said.partition("]->") if mark == "API-Request:" else (said, "", "")
        turns.append([_API_BANK_ROLES[mark], request + arrow.removesuffix("->")])
        if arrow:
            turns.append(["tool", result])
    return [Message(role, text.strip()) for role, text in turns]


def from_tool_alpaca(row: dict) -> list[Conversation]:
    """One API a row, many instances: trained dialogues, or instructions with golden answers."""
    functions = parse_json(row["Function_Description"], "Function_Description")
    components = functions.get("components")
    system = (
        f"You can use the tools of the API {row.get('Name', '')} ({row.get('Description', '')}). "
        "To use one, answer with\nAction: <function name>\nAction Input: <JSON arguments>\n"
        + (f"{components}\n" if components else "")
        + "Tools:\n"
    )
    tools = tuple(
        {"name": name, "description": text_of(description, "description")}
        for name, description in functions.items()
        if name != "components"
    )
    meta = {"api": row.get("Name", "")}
    if row.get("Instances"):
        dialogues = [_tool_alpaca_dialogue(instance) for instance in row["Instances"]]
        return [
            Conversation((Message("system", system), *dialogue), tools, meta)
            for dialogue in dialogues
            if dialogue
        ]
    conversations = []
    golden = row.get("Golden_Answers") or [None] * len(row.get("Instructions") or [])
    for user, steps in zip(row.get("Instructions") or [], golden, strict=True):
        answer = None if steps is None else "\n".join(_action(step) for step in steps)
        conversations.append(
            Conversation(
                exchange(user, answer, system=system), tools, {**meta, "golden_answer": steps}
            )
        )
    return conversations


def _action(step: dict) -> str:
    return f"Action: {step['Action']}\nAction Input: {step['Action_Input']}"


def _tool_alpaca_dialogue(instance: dict) -> tuple[Message, ...]:
    """Empty for an instance that its own generation run gave up."""
    if not instance.get("output") or not instance.get("input"):
        return ()
    messages = [Message("user", text_of(instance["input"], "input"))]
    for (action, action_input, *_), observation in instance.get("intermediate_steps") or []:
        step = {"Action": action, "Action_Input": action_input}
        messages += [Message("assistant", _action(step)), Message("tool", str(observation))]
    return (*messages, Message("assistant", text_of(instance["output"], "output")))


def from_bfcl(row: dict) -> list[Conversation]:
    """`question, function` (+ `ground_truth`): single-turn questions of the Berkeley leaderboard.

    The reference takes the first accepted value of each argument, and of each key of the objects
    among them; what is optional (what accepts "" or lists nothing) is left out.
    `meta.possible_answer` keeps all accepted values.
    """
    question = parse_json(row["question"], "question")
    turns = question if question and isinstance(question[0], list) else [question]
    if len(turns) != 1:
        raise RowError("multi-turn BFCL rows have no reference turns")
    messages = messages_of(turns[0])
    meta = dict(row.get("meta") or {})
    truth = parse_json(row.get("ground_truth", row.get("possible_answer")), "ground_truth")
    if truth:
        if not all(map(is_listing, truth)):
            raise RowError("ground_truth is not a list of {name: {argument: [values]}}")
        meta["possible_answer"] = truth
        calls = tuple(
            {"name": name, "arguments": _first_accepted(accepted)}
            for call in truth
            for name, accepted in call.items()
        )
        messages = (*messages, Message("assistant", "", calls))
    return [Conversation(messages, tools_of(row["function"]), meta)]


def _first_accepted(value: object) -> object:
    """A value with the first accepted value under each key of its objects."""
    if isinstance(value, list):
        return [_first_accepted(item) for item in value]
    if not isinstance(value, dict):
        return value
    lists = {key: v if isinstance(v, list) else [v] for key, v in value.items()}
    return {key: _first_accepted(v[0]) for key, v in lists.items() if v and "" not in v}


def from_xlam(row: dict) -> list[Conversation]:
    """`query, tools, answers` of xLAM, APIGen and Hammer; the answers are structured calls."""
    answers = parse_json(row["answers"], "answers")
    if not isinstance(answers, list):
        raise RowError("answers is not a list of calls")
    if not answers:
        raise RowError("answers holds no call")
    user = Message("user", text_of(row["query"], "query"))
    reply = Message("assistant", "", calls_of(answers))
    return [Conversation((user, reply), tools_of(row["tools"]), dict(row.get("meta") or {}))]
