"""Equality of argument values, and the pairing of made calls with wanted ones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from citi.evaluation.call_syntax import CallReader, ToolCall

_NUMBER = re.compile(
    r"[+-]?(?:(?:0|[1-9]\d{0,400})(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?"
)
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True)
class WantedCall:
    """A call that the answer should make.

    Attributes:
        name: the tool's name.
        arguments: the accepted values of each argument.
        optional: the arguments that may be left out.
        listed: whether objects among the values list, by key, what they accept (BFCL).
    """

    name: str
    arguments: Mapping[str, Sequence[Any]]
    optional: frozenset[str] = frozenset()
    listed: bool = False

    @classmethod
    def from_gold(cls, entry: Mapping[str, Any]) -> WantedCall:
        """Reads `{"name": ..., "arguments": {...}}` or BFCL's `{name: {argument: [values]}}`.

        Raises:
            ValueError: `entry` has neither form.
        """
        if isinstance(entry.get("name"), str) and isinstance(entry.get("arguments"), Mapping):
            return cls(entry["name"], {key: (v,) for key, v in entry["arguments"].items()})
        if len(entry) == 1:
            name, arguments = next(iter(entry.items()))
            if isinstance(arguments, Mapping) and all(
                isinstance(values, list) for values in arguments.values()
            ):
                optional = frozenset(k for k, vs in arguments.items() if not vs or "" in vs)
                return cls(name, arguments, optional, listed=True)
        raise ValueError(
            "gold: wanted {'name': str, 'arguments': dict} or BFCL's {name: {argument: [values]}}, "
            f"got {str(entry)[:200]}"
        )

    def num_right(self, call: ToolCall) -> int:
        """How many of the wanted arguments `call` gives with an accepted value."""
        right = accepts if self.listed else equal
        return sum(
            key in call.arguments and any(right(value, call.arguments[key]) for value in values)
            for key, values in self.arguments.items()
        )

    def num_asked(self, call: ToolCall | None) -> int:
        """How many arguments are wanted: the optional ones only where `call` gives them."""
        given = call.arguments if call else {}
        return sum(key not in self.optional or key in given for key in self.arguments)

    def is_met_by(self, call: ToolCall) -> bool:
        """Whether `call` is right in every argument and gives none besides."""
        return (
            call.name == self.name
            and all(key in self.arguments for key in call.arguments)
            and self.num_right(call) == self.num_asked(call)
        )


def canonical(value: Any) -> tuple:
    """A value in the form in which two spellings of it are equal (see `score_tool_calls`)."""
    if value is None or isinstance(value, bool):
        return ("constant", value)
    if isinstance(value, float):
        # By its decimal spelling: 0.1 is the number that '0.1' says, not the double next to it.
        written = repr(float(value))
        return ("number", Fraction(written)) if math.isfinite(value) else ("text", written)
    if isinstance(value, int):
        return ("number", Fraction(value))
    if isinstance(value, Mapping):
        pairs = {str(key): canonical(item) for key, item in value.items()}
        return ("object", tuple(sorted(pairs.items(), key=lambda pair: pair[0])))
    if isinstance(value, (list, tuple)):
        return ("list", tuple(canonical(item) for item in value))
    return _canonical_text(" ".join(str(value).split()))


def equal(wanted: Any, given: Any) -> bool:
    """Whether two values are one value in two spellings."""
    return canonical(wanted) == canonical(given)


def accepts(wanted: Any, given: Any) -> bool:
    """Whether `given` is what BFCL's `wanted` describes.

    In an object each key lists its accepted values, and `""` among them says that the key may be
    left out. The listing itself is not a right value.
    """
    if not _holds_object(wanted):
        return equal(wanted, given)
    given = _structure(given)
    if isinstance(wanted, list):
        return (
            isinstance(given, list)
            and len(wanted) == len(given)
            and all(map(accepts, wanted, given))
        )
    if not isinstance(given, Mapping):
        return False
    lists = {
        key: values if isinstance(values, list) else [values] for key, values in wanted.items()
    }
    return all(key in lists for key in given) and all(
        any(accepts(value, given[key]) for value in values)
        if key in given
        else not values or "" in values
        for key, values in lists.items()
    )


def _holds_object(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and any(map(_holds_object, value))
    )


def names_agree(calls: Sequence[ToolCall], wanted: Sequence[WantedCall]) -> bool:
    """Whether the names are the wanted ones, each as often as wanted, in any order."""
    return sorted(call.name for call in calls) == sorted(want.name for want in wanted)


def matched_arguments(calls: Sequence[ToolCall], wanted: Sequence[WantedCall]) -> tuple[int, int]:
    """Right and wanted arguments over pairs of the same name, the best pairs taken first."""
    pairs = [
        (-want.is_met_by(call), -want.num_right(call), i, j)
        for i, want in enumerate(wanted)
        for j, call in enumerate(calls)
        if call.name == want.name
    ]
    partner: dict[int, int] = {}
    for _, _, i, j in sorted(pairs):
        if i not in partner and j not in partner.values():
            partner[i] = j
    right = sum(wanted[i].num_right(calls[j]) for i, j in partner.items())
    asked = sum(
        want.num_asked(calls[partner[i]] if i in partner else None) for i, want in enumerate(wanted)
    )
    return right, asked


def all_pair_up(calls: Sequence[ToolCall], wanted: Sequence[WantedCall]) -> bool:
    """Whether calls and wanted ones pair up one to one, each met (augmenting paths)."""
    if len(calls) != len(wanted):
        return False
    owner: dict[int, int] = {}

    def place(i: int, seen: set[int]) -> bool:
        for j, call in enumerate(calls):
            if j not in seen and wanted[i].is_met_by(call):
                seen.add(j)
                if j not in owner or place(owner[j], seen):
                    owner[j] = i
                    return True
        return False

    return all(place(i, set()) for i in range(len(wanted)))


def _canonical_text(text: str) -> tuple:
    """Text that spells a number, a constant, a list or an object is that; else itself."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].strip()
    if text.lower() in _CONSTANTS:
        return ("constant", _CONSTANTS[text.lower()])
    if _NUMBER.fullmatch(text):
        return ("number", Fraction(text))
    structure = _structure(text)
    return ("text", text) if isinstance(structure, str) else canonical(structure)


def _structure(value: Any) -> Any:
    """The list or object that a text spells from end to end; anything else unchanged."""
    if not isinstance(value, str) or not value.strip().startswith(("[", "{")):
        return value
    reader = CallReader(value.strip())
    read = reader.value()
    whole = reader.clean and reader.position == len(reader.text)
    return read if whole and isinstance(read, (list, dict)) else value
