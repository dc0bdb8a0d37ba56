"""Results as lines of a terminal and as Markdown: ratios first, absolute numbers second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from citi.benchmark.group import NOT_ASKED, Result, Row

NOT_MEASURED = "not yet measured"
_PART_TITLES = {"forward": "forward", "backward": "backward", "both": "together"}


def as_lines(result: Result) -> list[str]:
    """A group for a terminal."""
    parts = _parts(result)
    head = f"{result.suite} · {result.title}"
    lines = [f"{head}   ({result.rounds} rounds, accuracy used {result.accuracy_used:.2f} of 1)"]
    width = max(len(row.name) for row in result.rows)
    over = "over " + result.baseline
    titles = [_PART_TITLES[part] for part in parts]
    columns = "".join(f"{title:>10}" for title in titles)
    lines.append(f"  {'':{width}}{columns}   {over}")
    for row in result.rows:
        ratios = "".join(f"{row.ratio[part]:10.3f}" for part in parts)
        once = "   timed once" if row.rounds == 1 else ""
        lines.append(f"  {row.name:{width}}{ratios}   {_absolute(row, result)}{verdict(row)}{once}")
    lines += [f"  {name:{width}}   skipped: {reason}" for name, reason in result.skipped.items()]
    return lines


def as_markdown(result: Result) -> list[str]:
    """A group as a table of its own."""
    parts = _parts(result)
    titles = [_PART_TITLES[part] for part in parts]
    absolute = "ms" if result.tokens == 0 else "ms (tokens/s)"
    keeps = len(parts) > 1
    memory = "MiB kept; peak" if keeps else "peak MiB"
    heads = [f"{result.title}: time over {result.baseline}", *titles, absolute, memory]
    lines = [table_line(heads), table_line(["---"] * len(heads))]
    for row in result.rows:
        name = f"**{row.name}**" if row.name.startswith("MOLoRA") else row.name
        speed = f" ({_speed(row, result)})" if result.tokens else ""
        lines.append(
            table_line(
                [
                    f"{name}: {row.stands_for}" + (" (timed once)" if row.rounds == 1 else ""),
                    *(f"{row.ratio[part]:.2f}" for part in parts),
                    f"{1e3 * row.seconds['both']:.3g}{speed}",
                    (f"{_mib(row.saved_bytes)}; " if keeps else "") + _mib(row.peak_bytes),
                ]
            )
        )
    lines += [
        table_line([f"{name}: {NOT_MEASURED}, {reason}", *[""] * (len(heads) - 1)])
        for name, reason in result.skipped.items()
    ]
    return lines


def by_shape(results: Sequence[Result], heads: Sequence[str], part: str = "both") -> list[str]:
    """One table of several groups side by side: rows by name, a column for each group."""
    base = results[0].baseline
    lines = [table_line([f"time over the {base}", *heads])]
    lines.append(table_line(["---"] * (len(heads) + 1)))
    for name in names_of(results):
        cells = []
        for result in results:
            row = next((row for row in result.rows if row.name == name), None)
            once = " (timed once)" if row is not None and row.rounds == 1 else ""
            cells.append(_why_not(name, result) if row is None else f"{row.ratio[part]:.2f}{once}")
        bold = name.startswith("MOLoRA")
        lines.append(table_line([f"**{name}**" if bold else name, *cells]))
    return lines


def table_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def verdict(row: Row) -> str:
    """Whether the project's gate and goal for this row are met; "" where there are none."""
    if row.limit is None:
        return ""
    gate, goal = row.limit
    value = row.ratio["both"]
    word = "goal met" if value <= goal else "gate met" if value <= gate else "GATE MISSED"
    return f"   gate {gate:g}, goal {goal:g}: {word}"


def _why_not(name: str, result: Result) -> str:
    reason = result.skipped.get(name, NOT_ASKED)
    return NOT_MEASURED if reason == NOT_ASKED else f"no: {reason}"


def _parts(result: Result) -> list[str]:
    """Forward, backward and both; both alone where there is no backward."""
    has_backward = all("backward" in row.ratio for row in result.rows)
    return ["forward", "backward", "both"] if has_backward else ["both"]


def _absolute(row: Row, result: Result) -> str:
    speed = f"{_speed(row, result):>18}" if result.tokens else ""
    rates = [
        f"{count / row.seconds['both'] / scale:8.3g} {unit}"
        for count, scale, unit in ((result.flops, 1e12, "TFLOP/s"), (result.bytes, 1e9, "GB/s"))
        if count and row.name == result.baseline
    ]
    kept = f"{_mib(row.saved_bytes):>7} MiB kept" if len(_parts(result)) > 1 else ""
    memory = f"{kept}{_mib(row.peak_bytes):>8} MiB peak"
    return f"{1e3 * row.seconds['both']:10.3f} ms{speed}  {memory}{''.join(rates)}"


def _speed(row: Row, result: Result) -> str:
    return f"{result.tokens / row.seconds['both']:,.0f} tokens/s".replace(",", " ")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f}" if num_bytes < 100 * 2**20 else f"{num_bytes / 2**20:.0f}"


def names_of(results: Sequence[Result]) -> list[str]:
    """Of all their rows, each once, in order."""
    return list(dict.fromkeys(row.name for result in results for row in result.rows))
