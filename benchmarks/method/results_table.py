"""RESULTS.md, the README's table and the picture of each scale, from committed result files.

`python -m benchmarks.method.results_table` writes all of them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.figures import save
from benchmarks.method.bootstrap import Estimate
from benchmarks.method.data_sets import EVALUATION
from benchmarks.method.paper import MODEL, PAPER
from benchmarks.method.row_config import CONTROL, ROWS, TRIALS, load_row
from benchmarks.method.row_result import load_results
from benchmarks.method.scale import SCALES
from benchmarks.method.search_table import HEADER as SEARCH_HEADER
from benchmarks.method.search_table import search_cells
from benchmarks.method.summary import (
    API_BANK,
    EVERY_GENERAL,
    GENERAL,
    RESPONSES,
    UNSEEN,
    RowSummary,
    summarise,
)
from benchmarks.method.trade_off_figure import trade_off
from benchmarks.method.verdicts import NOT_MEASURED, verdicts
from citi.durable import write_text
from citi.evaluation.tool_calls import SCORES

RESULTS = Path(__file__).parents[1] / "results" / "method"
TARGET = Path(__file__).with_name("RESULTS.md")
README = Path(__file__).parents[2] / "README.md"
# one file a scale: what its results say, and why we think so, written by hand
READINGS = Path(__file__).with_name("readings")
_NOTHING = "-"
_IRRELEVANCE = "no call where no tool fits"
_HEADER = """# The method against what it is compared with

Written by `python -m benchmarks.method.results_table` from benchmarks/results/method; how to run a
row: `python -m benchmarks.method --help`. The paper is arXiv 2409.13202.

Every trained row takes the same optimizer steps and, within one sample, the same tokens; rows on
the mix see the same samples. Learning rates are chosen by the answer NLL on validation data cut
from the training files. Intervals: 95 %, bootstrap over samples, paired between rows; rows of
several seeds are averaged over them. An interval of no width, such as that of 0 right calls, says
that all samples agree, not that the figure is sure. Answer NLL: nats a token of the reference
answer.
"""
Cells = Callable[[str, RowSummary], list[str]]
# <!-- method SCALE --> … <!-- method end -->
_README_PART = re.compile(r"(<!-- method (\w+) -->\n).*?(<!-- method end -->)", re.DOTALL)


def results_markdown(folder: Path) -> str:
    """The text of RESULTS.md.

    Args:
        folder: Result files of any scale.
    Raises:
        SavedFileError: A file is damaged.
        MixedResultsError: Results of one scale do not belong together.
    """
    results = load_results(folder)
    parts = [_HEADER, _rows_section()]
    for scale in SCALES:
        chosen = [each for each in results if each.scale == scale]
        parts.append(_scale_section(scale, summarise(chosen) if chosen else {}))
    return "\n".join(parts)


def draw_pictures(folder: Path) -> list[Path]:
    """Writes the picture of each scale that has more rows than vanilla; errors as above."""
    results, drawn = load_results(folder), []
    for scale in SCALES:
        rows = summarise([each for each in results if each.scale == scale])
        if _has_picture(rows):
            drawn.append(folder / _picture(scale))
            save(trade_off(rows), drawn[-1])
    return drawn


def _picture(scale: str) -> str:
    return f"trade_off_{scale}.png"


def _has_picture(rows: Mapping[str, RowSummary]) -> bool:
    return "vanilla" in rows and len(rows) > 1


def filled_readme(text: str, folder: Path) -> str:
    """The README with its table of measured rows written anew; errors as `results_markdown`."""
    results = load_results(folder)

    def write(found: re.Match) -> str:
        opening, scale, closing = found.groups()
        rows = summarise([each for each in results if each.scale == scale])
        lines = ["", *_short_lines(rows), "", _setting(rows)] if rows else [NOT_MEASURED]
        return "\n".join([opening.rstrip(), *lines, "", closing])

    return _README_PART.sub(write, text)


def _short_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    """The rows that are measured: tool calls, and what became of the rest."""
    lines = []
    for name in filter(rows.__contains__, ROWS + TRIALS):
        row, change = rows[name], _general_change(rows, rows[name])
        calls = [_share(row.calls(sets)) for sets in (API_BANK, UNSEEN)]
        calls.append(_irrelevance(row))
        calls.append(_NOTHING if change is None else _signed(change))
        lines.append([load_row(name).title, str(len(row.results)), *calls])
    header = ["row", "seeds", "exact calls, API-Bank", "exact calls, unseen tools", _IRRELEVANCE]
    return _table([*header, "general answer NLL, against vanilla"], lines)


def _rows_section() -> str:
    lines = ["## Rows", "", *_table(["row", "seeds", "what it is"], [])]
    for row in map(load_row, ROWS + TRIALS):
        lines.append(_line([row.title, str(row.seeds), row.description]))
    return "\n".join([*lines, ""])


def _scale_section(scale: str, rows: Mapping[str, RowSummary]) -> str:
    lines = [f"## Scale {scale}", ""]
    if not rows:
        return "\n".join([*lines, NOT_MEASURED, ""])
    lines += [_setting(rows), "", *_missing_lines(rows)]
    if _has_picture(rows):
        alt = "Exact calls of API-Bank against the change of the general answers' NLL, by row"
        lines += [f"![{alt}](../results/method/{_picture(scale)})", ""]
    sections = (
        ("Does it reproduce?", _verdict_lines(rows)),
        ("What we think it says", _reading_lines(scale)),
        ("Beside the paper", _paper_lines(rows)),
        ("Tool calls", _tool_lines(rows)),
        ("General ability", _change_lines(rows)),
        ("Every tool set", _score_lines(rows)),
        ("Every general set", _nll_lines(rows)),
        ("Learning rates", _search_lines(rows)),
        ("What it took", _cost_lines(rows)),
    )
    for title, content in filter(lambda section: section[1], sections):
        lines += [f"### {title}", "", *content, ""]
    return "\n".join(lines)


def _missing_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    """The rows without a result, which no table has."""
    titles = [load_row(name).title for name in ROWS if name not in rows]
    if not titles:
        return []
    return [f"{NOT_MEASURED.capitalize()} at this scale: {', '.join(titles)}.", ""]


def _setting(rows: Mapping[str, RowSummary]) -> str:
    """One paragraph: model, machine, budget."""
    first = next(iter(rows.values())).first
    scale = first.settings["scale"]
    machines = sorted({s.first.machine["device_name"] for s in rows.values()})
    tokens = scale["steps"] * scale["accumulation"] * scale["batch_tokens"]
    return (
        f"{first.model} on {', '.join(machines)}; {scale['steps']} steps, {tokens:,} tokens a row; "
        f"rank {scale['r']}, CITI's alpha {scale['lora_alpha']:g}, at most "
        f"{scale['eval_samples']} samples of each evaluation set."
    )


def _reading_lines(scale: str) -> list[str]:
    reading = READINGS / f"{scale}.md"
    return reading.read_text(encoding="utf-8").splitlines() if reading.is_file() else []


def _verdict_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    found = verdicts(rows)
    return _table(["target", "answer", "figures"], [[v.claim, v.answer, v.figures] for v in found])


def _paper_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    """Exact calls, ROUGE-L and the mean relative loss, the paper's and ours."""
    header = ["row", f"paper ({MODEL}): C", "R", "general loss", "ours: C", "R", "general loss"]
    lines = []
    for name, paper in PAPER.items():
        loss = paper.general_loss(PAPER["vanilla"])
        cells = [f"{paper.calls:.2f}%", f"{paper.rouge_l:.2f}", f"{loss:+.1%}"]
        lines.append([load_row(name).title, *cells, *_ours(rows, name)])
    notes = [
        "",
        "C: API calls that are right, R: ROUGE-L of responses. The paper's C comes from running "
        "the calls; ours compares names and arguments. General loss: the paper's is the mean over "
        "GSM8K, HumanEval, TriviaQA and MT-Bench of the share of the score that is gone; ours the "
        "mean relative rise of the answer NLL over all general sets.",
    ]
    return [*_table(header, lines), *notes]


def _ours(rows: Mapping[str, RowSummary], name: str) -> list[str]:
    if name not in rows:
        return [NOT_MEASURED, _NOTHING, _NOTHING]
    row = rows[name]
    change = _general_change(rows, row)
    loss = _NOTHING if change is None else f"{change.value:+.1%}"
    calls, rouge = row.calls(API_BANK), row.pooled(RESPONSES, "rouge_l")
    return [f"{calls.value:.2%}", f"{100 * rouge.value:.2f}", loss]


def _general_change(rows: Mapping[str, RowSummary], row: RowSummary) -> Estimate | None:
    """Of the answer NLL of all general sets, against vanilla; None where that is not measured."""
    return row.change(rows["vanilla"], EVERY_GENERAL) if "vanilla" in rows else None


def _tool_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    vanilla = rows.get("vanilla")

    def cells(name: str, row: RowSummary) -> list[str]:
        exact = row.calls(API_BANK)
        gain = _signed(exact - vanilla.calls(API_BANK)) if vanilla else _NOTHING
        spread = row.seed_range(API_BANK)
        seeds = _NOTHING if spread is None else f"{spread[0]:.1%} to {spread[1]:.1%}"
        unseen, responses = _share(row.calls(UNSEEN)), _share(row.pooled(RESPONSES, "rouge_l"))
        return [_share(exact), gain, seeds, unseen, _irrelevance(row), responses]

    header = ["exact calls, API-Bank", "against vanilla", "single seeds"]
    header += ["exact calls, unseen tools", _IRRELEVANCE, "ROUGE-L of responses"]
    return _row_table(header, rows, cells)


def _irrelevance(row: RowSummary) -> str:
    found = row.irrelevance(UNSEEN)
    return _NOTHING if found is None else _share(found)


def _change_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    bases = {"vanilla": "vanilla", "control": CONTROL, "LoRA + DM": "lora_dm"}

    def cells(_: str, row: RowSummary) -> list[str]:
        return [
            _signed(row.change(rows[base], GENERAL[group])) if base in rows else _NOTHING
            for base in bases.values()
            for group in GENERAL
        ]

    header = [f"{group} abilities, against {base}" for base in bases for group in GENERAL]
    notes = ["", "Mean relative change of the answer NLL; above zero is forgetting."]
    notes[1] += " Trained abilities are in the mix, untrained ones in no training data."
    return [*_row_table(header, rows, cells), *notes]


def _score_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    names = [each.name for each in EVALUATION if each.task == "tool" and each.name not in RESPONSES]

    def cells(_: str, row: RowSummary) -> list[str]:
        return [
            " / ".join(f"{row.calls([name], score).value:.0%}" for score in SCORES)
            for name in names
        ]

    header = [f"{name}: {' / '.join(SCORES)}" for name in names]
    return _row_table(header, rows, cells)


def _nll_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    names = list(EVERY_GENERAL)

    def cells(_: str, row: RowSummary) -> list[str]:
        return [_general_cell(row, rows.get("vanilla"), name) for name in names]

    notes = ["", "Answer NLL and its change against vanilla; then the share of right answers,"]
    notes[1] += " or of generated code that passed its tests, where it was judged."
    return [*_row_table(names, rows, cells), *notes]


def _general_cell(row: RowSummary, vanilla: RowSummary | None, name: str) -> str:
    text = f"{row.nll(name).value:.3f}"
    if vanilla is not None:
        text += f" {_signed(row.change(vanilla, [name]))}"
    for column in ("right", "passes"):
        if row.has(name, column):
            text += f"; {column} {_share(row.share(name, column))}"
    return text


def _search_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    cells = search_cells(rows)
    return _table(SEARCH_HEADER, cells) if cells else []


def _cost_lines(rows: Mapping[str, RowSummary]) -> list[str]:
    def cells(name: str, row: RowSummary) -> list[str]:
        first = row.first
        seeds = f"{len(row.results)} of {load_row(name).seeds}"
        rates = ", ".join(f"{key} {value:g}" for key, value in first.rates.items()) or _NOTHING
        seconds = [round(sum(each) / len(row.results)) for each in _seconds(row)]
        tokens = f"{first.num_tokens:,} ({first.num_answer_tokens:,})"
        stages = ", ".join(f"{stage} {steps}" for stage, steps in first.steps.items())
        return [seeds, stages or _NOTHING, tokens, rates, f"{seconds[0]} s", f"{seconds[1]} s"]

    header = ["seeds", "steps", "tokens (of answers)", "rates", "training", "measuring"]
    return _row_table(header, rows, cells)


def _seconds(row: RowSummary) -> tuple[list[float], list[float]]:
    results = row.results
    return [each.train_seconds for each in results], [each.measure_seconds for each in results]


def _row_table(header: list[str], rows: Mapping[str, RowSummary], cells: Cells) -> list[str]:
    """One line for each row that is measured."""
    measured = filter(rows.__contains__, ROWS + TRIALS)
    lines = [[load_row(name).title, *cells(name, rows[name])] for name in measured]
    return _table(["row", *header], lines)


def _share(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.value:.1%} [{low:.1%}, {high:.1%}]"


def _signed(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.value:+.1%} [{low:+.1%}, {high:+.1%}]"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [_line(header), _line(["---"] * len(header)), *map(_line, lines)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="result files")
    parser.add_argument("--target", type=Path, default=TARGET, help="file to write")
    options = parser.parse_args()
    write_text(options.target, results_markdown(options.folder))
    if options.folder == RESULTS:  # the README tells of the committed results alone
        draw_pictures(RESULTS)
        write_text(README, filled_readme(README.read_text(encoding="utf-8"), RESULTS))


if __name__ == "__main__":
    main()
