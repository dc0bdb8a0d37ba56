"""Tables and plots from the files that `citi bench --json` writes.

    python benchmarks/report.py results.json --output folder     report.md and its pictures
    python benchmarks/report.py --readme                         the README's parts, written anew
    python benchmarks/report.py results.json --against old.json  which ratios moved

The README holds parts between `<!-- benchmark NAME: FILE -->` and `<!-- end -->`; each is written
anew from that file of benchmarks/results, so that every number in it has a record behind it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import figures

from citi.benchmark.group import Result
from citi.benchmark.record import Record, machine_line
from citi.benchmark.tables import NOT_MEASURED, as_markdown, by_shape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
_PART = re.compile(r"(<!-- benchmark ([^:\n]+): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def layer_part(record: Record) -> list[str]:
    """The cost of a layer, a column for each shape."""
    results = record.of("layer")
    lines = []
    for dtype in dict.fromkeys(result.settings["dtype"] for result in results):
        chosen = [result for result in results if result.settings["dtype"] == dtype]
        lines += [*by_shape(chosen, [_shape(result) for result in chosen]), ""]
    return [*lines, _how(record)]


def _suite_part(suite: str) -> Callable[[Record], list[str]]:
    def part(record: Record) -> list[str]:
        lines = [line for result in record.of(suite) for line in [*as_markdown(result), ""]]
        return [*(lines or [f"{suite}: {NOT_MEASURED}", ""]), _how(record)]

    return part


PARTS: dict[str, Callable[[Record], list[str]]] = {
    "layer": layer_part,
    **{
        name: _suite_part(name)
        for name in (
            "importance",
            "importance ops",
            "training",
            "generation",
            "top-k",
            "decode",
            "linears",
        )
    },
}


def filled_readme(text: str, results: Path = RESULTS) -> str:
    """The README with every part written anew.

    Raises:
        ValueError: a part has a name that is not in PARTS, or its file cannot be used.
    """

    def write(found: re.Match) -> str:
        opening, name, file, closing = found.groups()
        if name not in PARTS:
            raise ValueError(f"README: benchmark {name}: want one of {', '.join(PARTS)}")
        lines = PARTS[name](Record.load(results / file))
        return f"{opening}\n" + "\n".join(lines) + f"\n\n{closing}"

    return _PART.sub(write, text)


def report(record: Record) -> list[str]:
    """All groups of a record, one table each."""
    lines = [f"# {machine_line(record.machine)}", "", _how(record), ""]
    for suite in dict.fromkeys(result.suite for result in record.results):
        lines += [f"## {suite}", ""]
        for result in record.of(suite):
            lines += [*as_markdown(result), ""]
    return lines


def moved(record: Record, other: Record, *, least: float = 0.05) -> list[str]:
    """A line for every row of both whose ratio, or memory, is not what it was.

    Times are told, not judged: machines drift. Memory is counted, so that any change is one.
    """
    before = {
        (result.suite, result.title, row.name): row
        for result in other.results
        for row in result.rows
    }
    lines = []
    for result in record.results:
        for row in result.rows:
            old = before.get((result.suite, result.title, row.name))
            if old is None:
                continue
            change = row.ratio["both"] / old.ratio["both"] - 1
            memory = (row.saved_bytes, row.peak_bytes) != (old.saved_bytes, old.peak_bytes)
            if abs(change) < least and not memory:
                continue
            line = f"{result.suite}, {result.title}, {row.name}: {old.ratio['both']:.3f} -> "
            line += f"{row.ratio['both']:.3f} ({change:+.0%})"
            if memory:
                line += f"; bytes kept {old.saved_bytes} -> {row.saved_bytes}"
                line += f", peak {old.peak_bytes} -> {row.peak_bytes}"
            lines.append(line)
    return lines


def draw(record: Record, folder: Path) -> list[Path]:
    """The plots that the record has the suites for."""
    machine = machine_line(record.machine, names=("torch",))
    drawn = []

    def save(name: str, figure: object) -> None:
        drawn.append(folder / f"{name}.png")
        figures.save(figure, drawn[-1])

    layers = record.of("layer")
    for dtype in dict.fromkeys(result.settings["dtype"] for result in layers):
        chosen = [result for result in layers if result.settings["dtype"] == dtype]
        heads = [_shape(result) for result in chosen]
        save(f"layer_{dtype}", figures.cost_by_shape(chosen, heads, machine))
        save(f"memory_{dtype}", figures.memory_bars(chosen[-1], machine))
        if record.of("ceilings", dtype=dtype):
            save(f"roofline_{dtype}", figures.roofline(record, dtype, machine))
    if scaled := record.of("scaling"):
        save("scaling", figures.scaling(scaled, machine))
    return drawn


def _shape(result: Result) -> str:
    T, K, N = (result.settings[name] for name in "TKN")
    size = f"{K}²" if K == N else f"{K} → {N}"
    return f"{result.settings['dtype']} {size}, T {T}"


def _how(record: Record) -> str:
    """Where the numbers come from, and how to make them anew."""
    commit = record.machine.get("commit")
    at = f" at {commit[:7]}" if commit else ""
    return f"`{record.command}`{at}: {machine_line(record.machine)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?", help="a file of citi bench --json")
    parser.add_argument("--output", type=Path, default=Path("bench_report"), help="a folder")
    parser.add_argument("--against", type=Path, help="an older file to compare with")
    parser.add_argument("--readme", action="store_true", help="write the README's parts anew")
    arguments = parser.parse_args()
    if arguments.readme:
        README.write_text(filled_readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    if arguments.record is None:
        if not arguments.readme:
            parser.error("want a record, or --readme")
        return
    record = Record.load(arguments.record)
    if arguments.against is not None:
        lines = moved(record, Record.load(arguments.against))
        print("\n".join(lines or ["no row of both moved by 5 % or more"]))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    pictures = draw(record, arguments.output)
    lines = report(record) + [f"![{path.stem}]({path.name})" for path in pictures]
    (arguments.output / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(arguments.output / "report.md")


if __name__ == "__main__":
    main()
