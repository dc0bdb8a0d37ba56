"""benchmarks/report.py: plots and tables of a record; every number of a page has one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from citi.benchmark.group import Result, Row
from citi.benchmark.record import Record

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {
    "device": "cpu",
    "device_name": "a CPU",
    "cpu_flags": ["avx2"],
    "num_threads": 2,
    "versions": {"torch": "2.13.0", "peft": "0.21.2"},
    "date": "2026-11-24",
    "commit": "0123456789",
}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import report

    return report


def a_result(suite: str, settings: dict, ratios: dict[str, float], **numbers: float) -> Result:
    rows = tuple(
        Row(
            name,
            "what it is",
            dict.fromkeys(("forward", "backward", "both"), 0.25 * ratio),
            dict.fromkeys(("forward", "backward", "both"), ratio),
            2**20,
            2**21,
        )
        for name, ratio in ratios.items()
    )
    title = ", ".join(f"{name} {value}" for name, value in settings.items())
    counted = {"flops": 0.0, "bytes": 0.0} | numbers
    return Result(
        suite=suite,
        settings=settings,
        title=title,
        baseline=next(iter(ratios)),
        tokens=64,
        rounds=5,
        accuracy_used=0.5,
        rows=rows,
        skipped={},
        **counted,
    )


@pytest.fixture
def record() -> Record:
    ratios = {"frozen linear": 1.0, "MOLoRA": 1.0625, "expert loop": 2.5}
    shape = {"T": 64, "K": 32, "N": 16, "dtype": "bf16"}
    scaled = [
        a_result("scaling", {**shape, "E": e, "r": r, "axis": axis}, ratios)
        for axis, e, r in (("T", 4, 8), ("experts", 2, 8), ("rank", 4, 16))
    ]
    return Record(
        MACHINE,
        "citi bench --quick",
        (
            a_result("layer", shape, ratios, flops=1e9, bytes=1e6),
            a_result("layer", shape | {"K": 16}, ratios, flops=1e9, bytes=2e6),
            *scaled,
            a_result("ceilings", {"what": "copy", "dtype": "bf16"}, {"copy": 1.0}, bytes=1e9),
            a_result(
                "ceilings", {"what": "product", "dtype": "bf16"}, {"product": 1.0}, flops=1e12
            ),
        ),
    )


def test_the_pages_hold_what_their_records_say(report: ModuleType) -> None:
    for page in report.PAGES:
        text = page.read_text(encoding="utf-8")
        tables = text.count("<!-- ratios ") + text.count("<!-- benchmark ")
        assert tables == text.count("<!-- end -->") > 0
        assert report.filled(text) == text, "run: python benchmarks/report.py --pages"


def test_every_link_and_picture_of_a_page_is_in_the_tree() -> None:
    pages = [path for folder in ("benchmarks", "python") for path in (ROOT / folder).rglob("*.md")]
    for page in [*ROOT.glob("*.md"), *pages]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
            link = target[0] or target[1]
            if not re.match(r"https?:|#", link):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_suite_of_a_committed_record_is_on_the_page_of_measurements(
    report: ModuleType,
) -> None:
    text = (report.RESULTS / "README.md").read_text(encoding="utf-8")
    for table in re.findall(r"<!-- benchmark (.+): (.+) -->", text):
        for file in table[1].split():
            assert Record.load(report.RESULTS / file).of(table[0]), table
    shown = {suite for suite, _ in re.findall(r"<!-- benchmark (.+): (.+) -->", text)}
    assert shown == set(report.SUITES)


def test_ratios_are_a_column_for_each_group_and_name_machine_and_file(
    report: ModuleType, record: Record, tmp_path: Path
) -> None:
    record.save(tmp_path / "a.json")
    text = "before\n<!-- ratios layer: a.json -->\nold\n<!-- end -->\nafter\n"
    filled = report.filled(text, tmp_path)
    assert "| **MOLoRA** | 1.06 | 1.06 |" in filled
    assert "| time over the frozen linear | bf16 32 → 16, T 64 | bf16 16², T 64 |" in filled
    assert "[a.json](benchmarks/results/a.json): a CPU (avx2), 2 threads" in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")
    assert report.filled(filled, tmp_path) == filled


def test_two_files_stand_side_by_side_under_the_models_that_they_are_of(
    report: ModuleType, tmp_path: Path
) -> None:
    for model, ratios in (("tiny", {"frozen": 1.0, "ours": 1.5}), ("large", {"frozen": 1.0})):
        settings = {"model": model, "batch": 4, "tokens": 128, "answers": 0.2, "dtype": "bf16"}
        result = a_result("importance", settings | {"recomputes": True}, ratios)
        Record(MACHINE, f"citi bench {model}", (result,)).save(tmp_path / f"{model}.json")
    files = "tiny.json large.json -->"
    ratios = report.filled(f"<!-- ratios importance: {files}\n<!-- end -->", tmp_path)
    heads = [
        f"bf16 {model}, 4 of 128 tokens, 20% answers, recomputed" for model in ("tiny", "large")
    ]
    assert f"| time over the frozen | {' | '.join(heads)} |" in ratios
    assert "| ours | 1.50 | not yet measured |" in ratios
    assert "[tiny.json](benchmarks/results/tiny.json), [large.json]" in ratios
    full = report.filled(f"<!-- benchmark importance: {files}\n<!-- end -->", tmp_path)
    assert "| ours: what it is | 1.50 | 1.50 | 1.50 | 375 (171 tokens/s) | 1.0; 2.0 |" in full
    assert "`citi bench tiny` at 0123456: a CPU (avx2), 2 threads" in full
    assert "`citi bench large` at 0123456" in full


def test_a_suite_without_a_row_is_not_yet_measured_and_an_unknown_one_refused(
    report: ModuleType, record: Record, tmp_path: Path
) -> None:
    record.save(tmp_path / "a.json")
    text = report.filled("<!-- ratios decode: a.json -->\n<!-- end -->", tmp_path)
    assert "decode: not yet measured" in text
    with pytest.raises(ValueError, match="ratios layers: want one of layer"):
        report.filled("<!-- ratios layers: a.json -->\n<!-- end -->", tmp_path)


def test_every_plot_is_drawn_and_the_same_record_gives_the_same_bytes(
    report: ModuleType, record: Record, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths = report.draw(record, tmp_path / folder)
        assert [path.stem for path in paths] == [
            "layer_bf16",
            "memory_bf16",
            "roofline_bf16",
            "scaling",
        ]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()


def test_what_moved_is_told_time_from_five_percent_memory_from_a_byte(
    report: ModuleType, record: Record
) -> None:
    assert report.moved(record, record) == []
    layer, *others = record.results
    frozen, ours, loop = layer.rows
    rows = (
        replace(frozen, saved_bytes=frozen.saved_bytes + 1),
        replace(ours, ratio={"both": ours.ratio["both"] * 1.1}),
        replace(loop, ratio={"both": loop.ratio["both"] * 1.04}),
    )
    changed = replace(record, results=(replace(layer, rows=rows), *others))
    kept, time = report.moved(changed, record)
    assert kept.endswith(
        "1.000 -> 1.000 (+0%); bytes kept 1048576 -> 1048577, peak 2097152 -> 2097152"
    )
    assert time == f"layer, {layer.title}, MOLoRA: 1.062 -> 1.169 (+10%)"


def test_the_report_has_every_group(report: ModuleType, record: Record) -> None:
    text = "\n".join(report.report(record))
    for result in record.results:
        assert result.title in text
    assert (
        "| expert loop: what it is | 2.50 | 2.50 | 2.50 | 625 (102 tokens/s) | 1.0; 2.0 |" in text
    )
