"""A conversation with a model, line by line: what `citi chat` runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TextStreamer

from citi.data.render import render_prompt
from citi.data.sample import GENERAL, TOOL, DataError, Message, Sample
from citi.evaluation.generate import decode_answer, greedy_config, neutral_generation_config
from citi.evaluation.inference import device_of, inference, pad
from citi.positions import length_limit

HELP = "/reset forgets the conversation, /tools lists the tools, /quit (or Ctrl-D) ends"


class ChatSession:
    """A conversation that remembers its turns and streams its answers.

    Prompts are rendered as in training (`citi.data.Renderer`), answers are greedy.

    Args:
        model: a Hugging Face causal LM or a PeftModel around one.
        tokenizer: its tokenizer.
        system: the system text; None leaves it to the chat template.
        tools: JSON descriptions of tools that the model may call. Calls are shown, never run.
        max_new_tokens: the longest answer.
        max_length: the longest prompt and answer together, less where the model has fewer
            positions.
        read: takes a prompt and returns the next line, like `input`; `EOFError` ends.
        write: takes each piece of text to show; None is the standard output.

    Attributes:
        history: the turns so far, without the system text.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        system: str | None = None,
        tools: tuple[dict, ...] = (),
        max_new_tokens: int = 512,
        max_length: int = 4096,
        read: Callable[[str], str] = input,
        write: Callable[[str], None] | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.tools = tuple(tools)
        self.max_new_tokens = max_new_tokens
        self.max_length = max_length
        self.history: list[Message] = []
        self._read = read
        self._write = write or _to_standard_output

    def run(self) -> None:
        """Reads lines and answers them until `/quit` or the end of the input."""
        self._write(f"{HELP}\n")
        while True:
            try:
                line = self._read("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                return
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._write(self._command(line) + "\n")
            elif line:
                self._answer_unless_stopped(line)

    def reply(self, text: str) -> str:
        """Answers one user turn, streaming it to `write`, and remembers both.

        Returns:
            the whole answer.

        Raises:
            ValueError: no room is left for the prompt beside `max_new_tokens`.
        """
        asked = [*self.history, Message("user", text)]
        prompt = self._prompt(asked)
        config = greedy_config(self.model, self.tokenizer, max_new_tokens=self.max_new_tokens)
        input_ids, mask = pad([prompt], config.pad_token_id, side="left")
        device = device_of(self.model)
        with inference(self.model), neutral_generation_config(self.model):
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                streamer=_Streamer(self.tokenizer, self._write),
            )
        answer = decode_answer(
            self.tokenizer, output[0, len(prompt) :].tolist(), set(config.eos_token_id or [])
        )
        self.history = [*asked, Message("assistant", answer)]
        return answer

    def reset(self) -> None:
        """Forgets the turns; the system text and the tools stay."""
        self.history = []

    def _answer_unless_stopped(self, line: str) -> None:
        """Answers; Ctrl-C drops the turn and the conversation goes on."""
        try:
            self.reply(line)
            self._write("\n")
        except KeyboardInterrupt:
            self._write("\n(stopped; this turn is forgotten)\n")

    def _command(self, line: str) -> str:
        """What a line with a slash does, as the text to show."""
        if line == "/reset":
            self.reset()
            return "(a new conversation)"
        if line == "/tools":
            names = [str(_tool_name(tool)) for tool in self.tools]
            return ", ".join(names) if names else "(no tools)"
        return HELP if line == "/help" else f"unknown command {line}; {HELP}"

    def _prompt(self, turns: list[Message]) -> list[int]:
        """Tokens of the conversation up to the answer that comes next."""
        room = length_limit(self.model, self.max_length) - self.max_new_tokens
        if room < 2:
            raise ValueError(
                f"max_new_tokens: wanted less than the {room + self.max_new_tokens} tokens that "
                f"prompt and answer may have together, got {self.max_new_tokens}"
            )
        head = [Message("system", self.system)] if self.system is not None else []
        sample = Sample(
            id="chat",
            task_type=TOOL if self.tools else GENERAL,
            task="tool" if self.tools else "instruct",
            messages=(*head, *turns, Message("assistant", "")),
            tools=self.tools,
        )
        return render_prompt(sample, self.tokenizer, max_length=room)


def _to_standard_output(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class _Streamer(TextStreamer):
    """Hands each finished piece of the answer to a callable."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._write(text)


def read_tools(path: str | Path) -> tuple[dict, ...]:
    """Reads tool descriptions: a JSON list of objects, or an object with such a list in `tools`.

    Raises:
        DataError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read tools: {error}") from error
    tools = value.get("tools") if isinstance(value, dict) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{path}: wanted a JSON list of tool descriptions (or an object with one in 'tools'), "
            f"got {type(value).__name__}"
        )
    return tuple(tools)


def _tool_name(tool: dict) -> object:
    """The name of a tool in OpenAI's, API-Bank's or a flat description."""
    inner = tool.get("function")
    holder = inner if isinstance(inner, dict) else tool
    return holder.get("name") or holder.get("apiCode") or "?"
