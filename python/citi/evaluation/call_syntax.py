"""Reads calls written as `Name(key='value', ...)`, and the values in them, character by character.

Nothing is ever evaluated. The reader takes Python and JSON spelling side by side (both quotes, True
and true, None and null) and the slips that published data and models make: unquoted words
(`city=New York`), quotes of the same kind inside a quoted value (`who='['A', 'B']'`), names with
spaces, dots and dashes. Whatever it can only guess clears `CallReader.clean`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

# Bounds on guessing, so that a model's endless repetitions are read in linear time.
_MAX_DEPTH = 40
_MAX_QUOTES = 200
_MAX_KEYLESS = 8
_KEY = r"[\"']?[\w.$@/-][\w.$@/ -]{0,79}?[\"']?\s*=(?!=)"
_KEY_AT = re.compile(r"\s*[\"']?([\w.$@/-][\w.$@/ -]{0,79}?)[\"']?\s*=(?!=)")
_NAME_AT = re.compile(r"\s*[\"'`]?([^()\[\]{}=,'\"`\n]{1,200}?)[\"'`]?\s*\(")
_INTEGER = re.compile(r"[+-]?(?:0|[1-9]\d{0,400})")
_FLOAT = re.compile(
    r"[+-]?(?:\d{1,400}\.\d{0,400}|\.\d{1,400}|\d{1,400}(?=[eE]))(?:[eE][+-]?\d{1,3})?"
)
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", "/": "/"}
_ESCAPES |= {"'": "'", '"': '"', "\n": ""}


@dataclass(frozen=True)
class ToolCall:
    """One call: the tool's name and its arguments by key."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class UnreadableError(ValueError):
    """The text at the reader's position is not what was asked for."""


@dataclass(frozen=True)
class _Surroundings:
    """What may follow a value: after the first closing quote, and after a later, doubtful one."""

    end: re.Pattern[str]
    doubtful_end: re.Pattern[str]
    stops: str


_ARGUMENT = _Surroundings(
    end=re.compile(rf"\s*(?:,\s*(?:{_KEY}|\))|\)|$)"),
    doubtful_end=re.compile(rf"\s*(?:,\s*{_KEY}|,?\s*\)\s*(?:[\],;\n]|$))"),
    stops=")",
)
_ITEM = _Surroundings(
    end=re.compile(r"\s*(?:[,\]})]|$)"),
    doubtful_end=re.compile(r"\s*(?:[,\]})]|$)"),
    stops=",]})",
)
_DICT_KEY = _Surroundings(re.compile(r"\s*:"), re.compile(r"\s*:"), stops=":,}")


class CallReader:
    """A position in a text and the calls and values that can be read from there.

    Args:
        text: the whole text.
        position: where reading starts.

    Attributes:
        position: the first character not yet read.
        clean: False once something had to be guessed (cut text, a missing bracket, no key).
    """

    def __init__(self, text: str, position: int = 0) -> None:
        self.text = text
        self.position = position
        self.clean = True

    def call_list(self) -> list[ToolCall]:
        """Reads `[f(a=1), g()]`; a missing closing bracket clears `clean`.

        Raises:
            UnreadableError: no `[` with a call in it stands here.
        """
        self._skip_space()
        if self._peek() != "[":
            raise UnreadableError("no '['")
        self.position += 1
        calls = [self.call()]
        while True:
            self._skip_space(", \t\r\n;")
            if self._peek() == "]":
                self.position += 1
                return calls
            try:
                calls.append(self.call())
            except UnreadableError:
                self.clean = False
                return calls

    def call(self) -> ToolCall:
        """Reads `Name(key=value, ...)`; an argument without a key is skipped and clears `clean`.

        Raises:
            UnreadableError: no name with an opening parenthesis stands here.
        """
        match = _NAME_AT.match(self.text, self.position)
        if match is None or not match[1].strip():
            raise UnreadableError("no name with '('")
        self.position = match.end()
        arguments: dict[str, Any] = {}
        num_keyless = 0
        while True:
            self._skip_space(", \t\r\n")
            if self._peek() in ("", ")") or num_keyless > _MAX_KEYLESS:
                self.clean &= self._peek() == ")"
                self.position = min(self.position + 1, len(self.text))
                return ToolCall(match[1].strip(), arguments)
            key = _KEY_AT.match(self.text, self.position)
            if key is None:
                self.clean = False
                self._skip_argument()
                num_keyless += 1
                continue
            self.position = key.end()
            arguments[key[1].strip()] = self._value(_ARGUMENT)

    def value(self) -> Any:
        """Reads one JSON or Python value: string, number, word, list or dict."""
        return self._value(_ITEM)

    def object(self) -> dict[str, Any]:
        """Reads `{key: value, ...}`, whatever stands behind it.

        Raises:
            UnreadableError: no object stands here.
        """
        self._skip_space()
        if self._peek() != "{":
            raise UnreadableError("no '{'")
        return self._bracketed(depth=1)

    def _skip_argument(self) -> None:
        """Moves past an argument without a key, at least one character."""
        start = self.position
        self._value(_ARGUMENT)
        self.position = max(self.position, start + 1)

    def _value(self, around: _Surroundings, depth: int = 0) -> Any:
        self._skip_space()
        start, clean, first = self.position, self.clean, self._peek()
        if first and first in "'\"":
            return self._quoted(around)
        if first and first in "[{(":
            try:
                value = self._bracketed(depth + 1)
                if around.end.match(self.text, self.position):
                    return value
            except UnreadableError:
                if depth:
                    raise
            self.position, self.clean = start, clean
        return self._word(around)

    def _quoted(self, around: _Surroundings) -> str:
        """A quoted string; a quote that nothing fitting follows belongs to the content."""
        quote, start = self.text[self.position], self.position + 1
        closing = None
        quotes = re.finditer(rf"\\.|{quote}", self.text[start:], re.DOTALL)
        for match in islice((found for found in quotes if found[0] == quote), _MAX_QUOTES):
            position = start + match.start()
            pattern = around.end if closing is None else around.doubtful_end
            closing = position if closing is None else closing
            if pattern.match(self.text, position + 1):
                self.position = position + 1
                return _unescape(self.text[start:position])
        self.clean = False
        end = len(self.text) if closing is None else closing
        self.position = min(end + 1, len(self.text))
        return _unescape(self.text[start:end])

    def _bracketed(self, depth: int) -> list | dict:
        """A list, tuple (as a list) or dict."""
        if depth > _MAX_DEPTH:
            raise UnreadableError("nested too deeply")
        opening = self._peek()
        self.position += 1
        closing = {"[": "]", "(": ")", "{": "}"}[opening]
        items: list = []
        pairs: dict[str, Any] = {}
        while True:
            self._skip_space()
            if self._peek() == closing:
                self.position += 1
                return pairs if opening == "{" else items
            if opening == "{":
                key = self._value(_DICT_KEY, depth)
                self._expect(":")
                pairs[str(key)] = self._value(_ITEM, depth)
            else:
                items.append(self._value(_ITEM, depth))
            self._skip_space()
            if self._peek() != closing:
                self._expect(",")

    def _word(self, around: _Surroundings) -> Any:
        """Unquoted text up to what may follow a value, as a number or constant where it is one."""
        start, depth = self.position, 0
        while self.position < len(self.text):
            character = self._peek()
            if depth == 0 and (character in around.stops or character == "\n"):
                break
            if depth == 0 and character == "," and around.end.match(self.text, self.position):
                break
            depth += (character in "([{") - (character in ")]}" and depth > 0)
            self.position += 1
        word = self.text[start : self.position].strip()
        self.clean &= bool(word)
        return _constant(word)

    def _peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def _skip_space(self, characters: str = " \t\r\n") -> None:
        while self._peek() and self._peek() in characters:
            self.position += 1

    def _expect(self, character: str) -> None:
        self._skip_space()
        if self._peek() != character:
            raise UnreadableError(f"no {character!r}")
        self.position += 1


def _constant(word: str) -> Any:
    """The number or constant that an unquoted word spells, else the word."""
    if word in _WORDS:
        return _WORDS[word]
    if _INTEGER.fullmatch(word):
        return int(word)
    return float(word) if _FLOAT.fullmatch(word) else word


def _unescape(raw: str) -> str:
    """Resolves the escapes that Python and JSON share; an unknown one stays as written."""
    if "\\" not in raw:
        return raw

    def resolve(match: re.Match[str]) -> str:
        code = match[1]
        if len(code) > 1:
            return chr(int(code[1:], 16))
        return _ESCAPES.get(code, match[0])

    text = _ESCAPE.sub(resolve, raw)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
