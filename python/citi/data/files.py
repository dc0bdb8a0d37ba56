"""Data files into samples: JSON lines, a JSON list, either of them gzipped.

Rows stay plain dicts until they become samples: a table would merge their structs and plant `None`
arguments into tool calls.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

from citi.data.fields import Conversation, RowError, wanted_calls
from citi.data.formats import FORMATS, Format, detect
from citi.data.report import DataReport, Findings
from citi.data.sample import GENERAL, TOOL, DataError, Sample

_TASK_TYPES = {0: GENERAL, 1: TOOL, "0": GENERAL, "1": TOOL, "general": GENERAL, "tool": TOOL}


def read_samples(
    path: str | Path,
    *,
    task_type: int | None = None,
    max_samples: int | None = None,
    seed: int | None = None,
) -> list[Sample]:
    """The samples of `read_data`, without its report."""
    return read_data(path, task_type=task_type, max_samples=max_samples, seed=seed)[0]


def read_data(
    path: str | Path,
    *,
    task_type: int | None = None,
    max_samples: int | None = None,
    seed: int | None = None,
) -> tuple[list[Sample], DataReport]:
    """Read .jsonl or .json, plain or .gz; the format is detected row by row.

    Args:
        path: the file.
        task_type: 1 = tool, 0 = general: the list of the recipe that the file stands in. A row's
            own `task_type` wins over it; without both, a row whose `task` is "tool", or one that
            names no task but has tools, is a tool sample.
        max_samples: at most so many, the first ones, or with `seed` a random choice in file order.
        seed: see `max_samples`.
    Returns: the samples and the report.
    Raises: DataError naming file and line: no such file, not JSON, cut short, no known format,
        gold calls that nothing can be compared with, nothing usable in it.
    """
    path = Path(path)
    if task_type not in (None, GENERAL, TOOL):
        raise ValueError(f"task_type must be 1 (tool), 0 (general) or None, got {task_type!r}")
    findings, samples = Findings(), []
    for place, row in _rows(path):
        found = detect(row)
        if found is None:
            raise DataError(_unknown_format(place, row))
        findings.row(found)
        try:
            made = _samples_of(
                row, found, place=place, number=findings.num_rows, task_type=task_type
            )
        except RowError as error:
            findings.drop(str(error), place)
            continue
        for sample in made:
            findings.sample(sample)
        samples += made
    if not samples:
        reasons = "; ".join(findings.dropped)
        raise DataError(f"{path}: none of the {findings.num_rows} rows is usable: {reasons}")
    return _choose(samples, max_samples, seed), findings.report(str(path))


def _choose(samples: list[Sample], max_samples: int | None, seed: int | None) -> list[Sample]:
    if max_samples is None or max_samples >= len(samples):
        return samples
    if seed is None:
        return samples[:max_samples]
    chosen = random.Random(seed).sample(range(len(samples)), max_samples)
    return [samples[i] for i in sorted(chosen)]


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row."""
    data = _read_bytes(path)
    if not data.strip():
        raise DataError(f"{path} is empty; wanted a JSON object a line, or one JSON list")
    if data.lstrip()[:1] == b"[":
        rows = _parse(data, str(path))
        rows = enumerate(rows if isinstance(rows, list) else [rows], start=1)
        places = ((f"{path}:row {number}", row) for number, row in rows)
    else:
        lines = enumerate(data.split(b"\n"), start=1)
        places = (
            (place, _parse(line, place))
            for place, line in ((f"{path}:{number}", line) for number, line in lines)
            if line.strip()
        )
    for place, row in places:
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be a JSON object, got {type(row).__name__}")
        yield place, row


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).removeprefix(
            b"\xef\xbb\xbf"
        )
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such data file; check the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip file is cut short or damaged ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(data: bytes, place: str) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        shown = data[:60].decode("utf-8", errors="replace")
        raise DataError(
            f"{place}: not valid JSON ({error}): {shown!r}; wanted an object a line, or a list"
        ) from error


def _unknown_format(place: str, row: dict) -> str:
    known = "; ".join(f"{f.name} ({', '.join(f.keys)})" for f in FORMATS)
    return f"{place}: no known format has the keys {sorted(row)}. Known formats: {known}"


def _samples_of(
    row: dict, found: Format, *, place: str, number: int, task_type: int | None
) -> list[Sample]:
    try:
        conversations = found.convert(row)
    except RowError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise RowError(f"malformed {found.name} row ({type(error).__name__})") from error
    if not conversations:
        raise RowError(f"the {found.name} row has no conversation in it")
    name = str(row.get("id", f"{Path(place).name.split('.')[0]}-{number}"))
    if "file" in row:
        name = f"{row['file']}-{name}"
    many = len(conversations) > 1
    return [
        _sample(row, each, name=f"{name}-{i}" if many else name, place=place, task_type=task_type)
        for i, each in enumerate(conversations)
    ]


def _sample(
    row: dict, conversation: Conversation, *, name: str, place: str, task_type: int | None
) -> Sample:
    messages, meta = conversation.messages, dict(conversation.meta)
    if not any(m.content.strip() or m.tool_calls for m in messages if m.role != "system"):
        raise RowError("the conversation is empty")
    last = messages[-1]
    if last.role == "assistant" and not (last.content.strip() or last.tool_calls):
        raise RowError("the answer is empty")
    for key in ("gold_calls", "possible_answer"):
        if meta.get(key) is not None:
            meta[key] = _wanted_calls(meta[key], f"{place}: {key}")
    if last.tool_calls and not {"gold_calls", "possible_answer"} & meta.keys():
        meta["gold_calls"] = list(last.tool_calls)
    kind = _task_type(row, conversation, task_type=task_type, place=place)
    task = row.get("task")
    return Sample(
        id=name,
        task_type=kind,
        task=task if isinstance(task, str) else ("tool" if kind == TOOL else "general"),
        messages=messages,
        tools=conversation.tools,
        meta=meta,
        source=place,
    )


def _wanted_calls(value: object, place: str) -> list[dict]:
    try:
        return wanted_calls(value)
    except RowError as error:
        raise DataError(
            f"{place}: {error}; wanted a list of "
            f"{{'name': str, 'arguments': dict}}, got {str(value)[:100]}"
        ) from error


def _task_type(row: dict, conversation: Conversation, *, task_type: int | None, place: str) -> int:
    own = row.get("task_type")
    if own is not None:
        if not isinstance(own, int | str) or own not in _TASK_TYPES:
            raise DataError(f"{place}: task_type must be 1 or 'tool', 0 or 'general', got {own!r}")
        return _TASK_TYPES[own]
    if task_type is not None:
        return task_type
    if isinstance(row.get("task"), str):
        return TOOL if row["task"] == "tool" else GENERAL
    calls = any(message.tool_calls for message in conversation.messages)
    return TOOL if conversation.tools or calls else GENERAL
