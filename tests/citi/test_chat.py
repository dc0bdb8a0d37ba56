"""The conversation, driven by lists of lines instead of a terminal."""

from __future__ import annotations

import json

import pytest

import tiny
from citi.chat import ChatSession, read_tools
from citi.data.sample import DataError, Message, Sample
from citi.evaluation import generate_answers


class Terminal:
    """Hands out lines, then the end of the input; keeps what was written."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.pieces: list[str] = []

    def read(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text):
        self.pieces.append(text)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def make_session(terminal, **settings) -> ChatSession:
    return ChatSession(
        tiny.tiny_model(),
        tiny.tiny_tokenizer(),
        max_new_tokens=12,
        read=terminal.read,
        write=terminal.write,
        **settings,
    )


def answer_to(*turns: Message) -> str:
    sample = Sample("1", 0, "instruct", (*turns, Message("assistant", "")))
    model, tokenizer = tiny.tiny_model(), tiny.tiny_tokenizer()
    return generate_answers(model, tokenizer, [sample], max_new_tokens=12)[0]


def test_answers_are_those_of_the_evaluation_and_the_history_grows():
    terminal = Terminal()
    session = make_session(terminal, system="be brief")
    system, asked = Message("system", "be brief"), Message("user", "hello")
    first = session.reply("hello")
    assert first == answer_to(system, asked)
    turns = (asked, Message("assistant", first))
    assert session.history == list(turns)
    second = session.reply("again")
    assert second == answer_to(system, *turns, Message("user", "again"))
    assert len(session.history) == 4


def test_the_answer_is_streamed_in_pieces_that_make_it_up():
    terminal = Terminal()
    answer = make_session(terminal).reply("hello")
    assert answer
    assert terminal.text.strip() == answer


def test_a_conversation_runs_until_the_input_ends():
    terminal = Terminal("hello", "", "/tools", "/nonsense", "/reset", "hello")
    session = make_session(terminal, tools=({"function": {"name": "f"}}, {"apiCode": "G"}))
    session.run()
    assert len(session.history) == 2
    assert "f, G" in terminal.text
    assert "unknown command /nonsense" in terminal.text


def test_quit_ends_and_leaves_later_lines_unread():
    terminal = Terminal("/quit", "hello")
    make_session(terminal).run()
    assert terminal.lines == ["hello"]


def test_ctrl_c_in_an_answer_forgets_the_turn_and_goes_on(monkeypatch):
    terminal = Terminal("hello", "/quit")
    session = make_session(terminal)
    session.model.train()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(session.model, "generate", interrupt)
    session.run()
    assert session.history == []
    assert "forgotten" in terminal.text
    assert session.model.training


def test_ctrl_c_at_the_prompt_ends():
    terminal = Terminal(KeyboardInterrupt())
    make_session(terminal).run()
    assert terminal.text.endswith("\n")


def test_a_prompt_without_room_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens: wanted less than the 8 tokens"):
        make_session(Terminal(), max_length=8).reply("hello")


def test_tools_are_read_from_a_list_or_an_object(tmp_path):
    tools = [{"name": "f"}, {"name": "g"}]
    for value in (tools, {"tools": tools}):
        path = tmp_path / "tools.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        assert read_tools(path) == tuple(tools)


@pytest.mark.parametrize("text", ["{", "[1]", '{"tools": 3}', "3"])
def test_other_tool_files_are_refused_by_their_path(tmp_path, text):
    path = tmp_path / "tools.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"tools\.json"):
        read_tools(path)
    with pytest.raises(DataError, match=r"none\.json"):
        read_tools(tmp_path / "none.json")
