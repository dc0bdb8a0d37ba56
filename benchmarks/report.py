"""Tables and plots from the files that `citi bench --json` writes.

    python benchmarks/report.py results.json --output folder     report.md and its pictures
    python benchmarks/report.py --pages                          the pages' tables, written anew
    python benchmarks/report.py results.json --against old.json  which ratios moved

The README and benchmarks/results/README.md hold tables between `<!-- ratios SUITE: FILES -->`, or
`<!-- benchmark SUITE: FILES -->`, and `<!-- end -->`: what each row costs over the first one, a
column for each group, or all that was measured, a table for each group. They are written anew from
these files of benchmarks/results, so that every number has a record behind it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import figures

from citi.benchmark.group import Result
from citi.benchmark.record import Record, machine_line
from citi.benchmark.tables import NOT_MEASURED, as_markdown, by_shape

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", RESULTS / "README.md")
SUITES = (
    "layer",
    "linears",
    "top-k",
    "decode",
    "training",
    "generation",
    "importance",
    "importance ops",
)
_TABLES = re.compile(
    r"(<!-- (ratios|benchmark) ([^:\n]+): ([^>\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL
)


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with every table written anew.

    Raises:
        ValueError: a suite that is not in SUITES, or a file that cannot be used.
    """

    def write(found: re.Match) -> str:
        opening, kind, suite, files, closing = found.groups()
        if suite not in SUITES:
            raise ValueError(f"{kind} {suite}: want one of {', '.join(SUITES)}")
        records = {file: Record.load(results / file) for file in files.split()}
        chosen = [result for record in records.values() for result in record.of(suite)]
        if not chosen:
            lines = [f"{suite}: {NOT_MEASURED}", ""]
        elif kind == "ratios":
            lines = [*_ratios(chosen), *_sources(records)]
        else:
            tables = (line for result in chosen for line in [*as_markdown(result), ""])
            lines = [*tables, *map(_how, records.values())]
        return f"{opening}\n" + "\n".join(lines).rstrip() + f"\n\n{closing}"

    return _TABLES.sub(write, text)


def _ratios(results: list[Result]) -> list[str]:
    """A table for each dtype, a column for each group."""
    lines = []
    for dtype in dict.fromkeys(result.settings["dtype"] for result in results):
        chosen = [result for result in results if result.settings["dtype"] == dtype]
        lines += [*by_shape(chosen, [_column(result) for result in chosen]), ""]
    return lines


def _sources(records: dict[str, Record]) -> list[str]:
    """The machine and the files, which tell the command."""
    machines: dict[str, list[str]] = {}
    for file, record in records.items():
        link = f"[{file}](benchmarks/results/{file})"
        machines.setdefault(machine_line(record.machine), []).append(link)
    return [f"{', '.join(links)}: {machine}." for machine, links in machines.items()]


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
        heads = [_column(result) for result in chosen]
        save(f"layer_{dtype}", figures.cost_by_shape(chosen, heads, machine))
        save(f"memory_{dtype}", figures.memory_bars(chosen[-1], machine))
        if record.of("ceilings", dtype=dtype):
            save(f"roofline_{dtype}", figures.roofline(record, dtype, machine))
    if scaled := record.of("scaling"):
        save("scaling", figures.scaling(scaled, machine))
    return drawn


def _column(result: Result) -> str:
    """The settings of a group: the model or the sizes, the tokens, what else there is."""
    settings = dict(result.settings)
    words = [str(settings.pop("dtype"))]
    if "model" in settings:
        words.append(str(settings.pop("model")))
    if "K" in settings:
        words.append(_size(settings.pop("K"), settings.pop("N")))
    if "batch" in settings:
        words.append(f"{settings.pop('batch')} of {settings.pop('tokens')} tokens")
    if settings.pop("answers", 1.0) != 1.0:
        words.append(f"{result.settings['answers']:.0%} answers")
    if settings.pop("recomputes", False):
        words.append("recomputed")
    words += [
        f"{name} {value}" if len(name) == 1 else f"{value} {name}"
        for name, value in settings.items()
    ]
    return " ".join(words[:2]) + "".join(f", {word}" for word in words[2:])


def _size(K: int, N: int) -> str:
    return f"{K}²" if K == N else f"{K} → {N}"


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
    parser.add_argument("--pages", action="store_true", help="write the pages' tables anew")
    arguments = parser.parse_args()
    if arguments.pages:
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    if arguments.record is None:
        if not arguments.pages:
            parser.error("want a record, or --pages")
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
