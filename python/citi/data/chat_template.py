"""The tokenizer's chat template, made to hold every conversation that our data holds.

Templates differ in what they know. What one lacks (tools, structured calls, tool turns, a system
turn) is written as text, in the form of Hermes, by a prelude put before the template itself, so
that training, generation and a server that loads the saved tokenizer all see the same text.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from citi.data.fields import json_lines
from citi.data.sample import DataError, Message, Sample

_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, KeyError, AttributeError)
# What a JSON schema's own type says, also without arguments; BFCL writes dict.
_OBJECT_TYPES = ("object", "dict")
# System texts that announce the descriptions themselves: API-Bank's, ToolAlpaca's.
_ANNOUNCEMENTS = ("API descriptions:", "Tools:")

_HERMES_TEXT = (
    "You may call one or more of the functions whose signatures stand between <tools> and "
    "</tools>:\\n<tools>"
)
_HERMES_RULE = (
    "\\n</tools>\\nTo call a function, answer with its name and its arguments as JSON between "
    '<tool_call> and </tool_call>:\\n<tool_call>\\n{"name": <function name>, "arguments": '
    "<arguments>}\\n</tool_call>"
)
_PRELUDE = """\
{%- set citi = namespace(turns=[], text='', after_tool=false) -%}
{%- for m in messages -%}
{%- if CALLS and m.role == 'assistant' and m.tool_calls -%}
{%- set citi.text = m.content or '' -%}
{%- for call in m.tool_calls -%}
{%- set f = call.function if call.function else call -%}
{%- set citi.text = citi.text ~ ('\\n' if citi.text else '') ~ '<tool_call>\\n'
 ~ ({'name': f.name, 'arguments': f.arguments} | tojson) ~ '\\n</tool_call>' -%}
{%- endfor -%}
{%- set citi.turns = citi.turns + [{'role': 'assistant', 'content': citi.text}] -%}
{%- elif RESULTS and m.role == 'tool' -%}
{%- set citi.text = '<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' -%}
{%- if citi.after_tool -%}
{%- set citi.text = citi.turns[-1].content ~ '\\n' ~ citi.text -%}
{%- set citi.turns = citi.turns[:-1] -%}
{%- endif -%}
{%- set citi.turns = citi.turns + [{'role': 'user', 'content': citi.text}] -%}
{%- else -%}
{%- set citi.turns = citi.turns + [m] -%}
{%- endif -%}
{%- set citi.after_tool = m.role == 'tool' -%}
{%- endfor -%}
{%- if TOOLS and tools -%}
{%- set citi.text = 'HERMES_TEXT' -%}
{%- for tool in tools -%}
{%- set citi.text = citi.text ~ '\\n' ~ (tool | tojson) -%}
{%- endfor -%}
{%- set citi.text = citi.text ~ 'HERMES_RULE' -%}
{%- if citi.turns and citi.turns[0].role == 'system' -%}
{%- set citi.text = citi.turns[0].content ~ '\\n\\n' ~ citi.text -%}
{%- set citi.turns = citi.turns[1:] -%}
{%- endif -%}
{%- set citi.turns = [{'role': 'system', 'content': citi.text}] + citi.turns -%}
{%- endif -%}
{%- if SYSTEM and citi.turns | length > 1 and citi.turns[0].role == 'system' -%}
{%- set citi.text = citi.turns[0].content ~ '\\n\\n' ~ citi.turns[1].content -%}
{%- set citi.turns = [{'role': citi.turns[1].role, 'content': citi.text}] + citi.turns[2:] -%}
{%- endif -%}
{%- set messages = citi.turns -%}
"""


@dataclass(frozen=True)
class TemplateTraits:
    """What a chat template knows by itself, found out by rendering small conversations."""

    system: bool
    tools: bool
    tool_calls: bool
    tool_role: bool
    tool_role_after_text: bool
    repeated_assistant: bool


@dataclass(frozen=True)
class Turn:
    """A message as the template gets it.

    Args:
        message: role, content and structured calls.
        given: the first part of an assistant's content that is context, not answer: what an
            earlier assistant message said, where the template wants roles to alternate.
    """

    message: Message
    given: str = ""


class ChatTemplate:
    """A tokenizer's chat template with its gaps filled.

    Args:
        tokenizer: any tokenizer with a `chat_template`.
    Raises: DataError without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template; take the instruction-tuned model's tokenizer, "
                "or set tokenizer.chat_template"
            )
        self._tokenizer = tokenizer
        self.traits = _probe(tokenizer)
        self.prelude = _prelude(self.traits)

    def template(self, tools: list[dict] | None) -> str:
        """The Jinja text that renders a conversation with these tools."""
        return self.prelude + self._tokenizer.get_chat_template(None, tools)

    def turns(self, sample: Sample) -> tuple[list[Turn], list[dict] | None]:
        """The turns of `sample` in the form that the template holds, and the tools for it."""
        messages, tools = list(sample.messages), list(sample.tools)
        first = messages[0]
        announced = first.role == "system" and first.content.rstrip().endswith(_ANNOUNCEMENTS)
        if tools and announced:
            text = f"{first.content.rstrip()}\n{json_lines(tools)}"
            messages[0], tools = Message("system", text), []
        elif tools and first.role == "system" and _describes(first.content, tools):
            tools = []
        if not self.traits.tool_role_after_text and not any(m.tool_calls for m in messages):
            messages = [_as_user(m) if m.role == "tool" else m for m in messages]
        turns: list[Turn] = []
        for message in messages:
            earlier = turns[-1].message if turns else None
            alone = self.traits.repeated_assistant or message.role != "assistant"
            if alone or earlier is None or earlier.role != "assistant" or earlier.tool_calls:
                turns.append(Turn(message))
                continue
            given = f"{earlier.content}\n" if message.content else earlier.content
            merged = Message("assistant", given + message.content, message.tool_calls)
            turns[-1] = Turn(merged, given)
        return turns, [as_function(tool) for tool in tools] or None

    def text(
        self, turns: list[Turn], *, tools: list[dict] | None, add_generation_prompt: bool = False
    ) -> str:
        """The rendered conversation.

        Raises: DataError when the template refuses it.
        """
        try:
            return self._tokenizer.apply_chat_template(
                as_dicts([turn.message for turn in turns]),
                tools=tools,
                chat_template=self.template(tools),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except _TEMPLATE_FAILURES as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error


def install_tool_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Write the prelude into the tokenizer, to be saved with it; a complete template stays as is.

    Returns: True when the template was changed.
    """
    prelude = ChatTemplate(tokenizer).prelude
    if not prelude:
        return False
    if isinstance(tokenizer.chat_template, dict):
        named = tokenizer.chat_template.items()
        tokenizer.chat_template = {name: prelude + text for name, text in named}
    else:
        tokenizer.chat_template = prelude + tokenizer.chat_template
    return True


def as_function(tool: dict) -> dict:
    """A tool description in the form that templates expect: OpenAI's function with JSON schema.

    Raises: DataError for parameters that are not a JSON object.
    """
    if isinstance(tool.get("function"), dict):
        return {"type": "function", "function": tool["function"]}
    parameters = tool.get("parameters", tool.get("input_parameters")) or {}
    if not isinstance(parameters, dict):
        raise DataError(
            f"the parameters of the tool {tool.get('name', '?')!r} must be a JSON object, got "
            f"{type(parameters).__name__}"
        )
    if parameters.get("type") in _OBJECT_TYPES and not parameters.get("properties"):
        parameters = {**parameters, "properties": {}}
    elif not isinstance(parameters.get("properties"), dict):
        parameters = {"properties": parameters, "required": tool.get("required") or []}
    return {
        "type": "function",
        "function": {
            "name": str(tool.get("name", tool.get("apiCode", ""))),
            "description": str(tool.get("description", "")),
            "parameters": {**parameters, "type": "object"},
        },
    }


def as_dicts(messages: list[Message]) -> list[dict]:
    """Messages as templates read them; calls get ids (nine characters, as Mistral wants)."""
    dicts, waiting, num_calls = [], [], 0
    for message in messages:
        turn: dict = {"role": message.role, "content": message.content}
        if message.tool_calls:
            ids = [f"call{num_calls + i:05d}" for i in range(len(message.tool_calls))]
            num_calls += len(ids)
            waiting = list(ids)
            turn["tool_calls"] = [
                {"id": name, "type": "function", "function": call}
                for name, call in zip(ids, message.tool_calls, strict=True)
            ]
        if message.role == "tool":
            turn["name"] = message.name or "tool"
            turn["tool_call_id"] = waiting.pop(0) if waiting else "call00000"
        dicts.append(turn)
    return dicts


def _describes(system: str, tools: list[dict]) -> bool:
    """Whether a system text holds the descriptions of all tools already, as Hermes' rows do."""
    inside = system.partition("<tools>")[2].partition("</tools>")[0]
    names = [str(as_function(tool)["function"]["name"]) for tool in tools]
    return bool(inside) and all(name in inside for name in names)


def _as_user(result: Message) -> Message:
    return Message("user", f"<tool_response>\n{result.content}\n</tool_response>")


def _prelude(traits: TemplateTraits) -> str:
    gaps = {
        "CALLS": not traits.tool_calls,
        "RESULTS": not traits.tool_role,
        "TOOLS": not traits.tools,
        "SYSTEM": not traits.system,
    }
    if not any(gaps.values()):
        return ""
    prelude = _PRELUDE
    for name, missing in gaps.items():
        prelude = prelude.replace(f"if {name} and", f"if {str(missing).lower()} and")
    return prelude.replace("HERMES_TEXT", _HERMES_TEXT).replace("HERMES_RULE", _HERMES_RULE)


def _probe(tokenizer: PreTrainedTokenizerBase) -> TemplateTraits:
    user, reply = Message("user", "probe-user"), Message("assistant", "probe-reply")
    call = Message("assistant", "", ({"name": "probe_name", "arguments": {"key": "probe-value"}},))
    tool = as_function({"name": "probe_tool", "description": "", "parameters": {}})

    def render(messages: list[Message], **settings: object) -> str:
        try:
            return tokenizer.apply_chat_template(as_dicts(messages), tokenize=False, **settings)
        except _TEMPLATE_FAILURES:
            return ""

    def says(messages: list[Message], *words: str, **settings: object) -> bool:
        rendered = render(messages, **settings)
        return all(word in rendered for word in words)

    if not says([user], "probe-user"):
        raise DataError("the tokenizer's chat template does not render a user turn; replace it")
    calls = says([user, call], "probe_name", "probe-value")
    result = Message("tool", "probe-result", name="probe_name")
    again = Message("assistant", "probe-again")
    before = render([user, reply], add_generation_prompt=True)
    return TemplateTraits(
        system=says([Message("system", "probe-system"), user], "probe-system", "probe-user"),
        tools=says([user], "probe_tool", tools=[tool]),
        tool_calls=calls,
        tool_role=says([user, call if calls else reply, result], "probe-result"),
        tool_role_after_text=says([user, reply, result], "probe-result"),
        repeated_assistant=bool(before)
        and says([user, reply, again], "probe-reply", "probe-again")
        and render([user, reply, again]).startswith(before),
    )
