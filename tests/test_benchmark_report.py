"""benchmarks/report.py: plots and tables of a record; every number of the README has one."""

from __future__ import annotations

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


def test_the_readme_holds_what_its_records_say(report: ModuleType) -> None:
    text = report.README.read_text(encoding="utf-8")
    assert text.count("<!-- benchmark ") == text.count("<!-- end -->") > 0
    assert report.filled_readme(text) == text, "run: python benchmarks/report.py --readme"


def test_a_part_is_written_anew_from_its_file(
    report: ModuleType, record: Record, tmp_path: Path
) -> None:
    record.save(tmp_path / "a.json")
    text = "before\n<!-- benchmark layer: a.json -->\nold\n<!-- end -->\nafter\n"
    filled = report.filled_readme(text, tmp_path)
    assert "| **MOLoRA** | 1.06 | 1.06 |" in filled
    assert "| time over the frozen linear | bf16 32 → 16, T 64 | bf16 16², T 64 |" in filled
    assert "`citi bench --quick` at 0123456: a CPU (avx2), 2 threads" in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")
    assert report.filled_readme(filled, tmp_path) == filled


def test_a_part_of_an_unknown_name_is_refused(report: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="benchmark layers: want one of layer"):
        report.filled_readme("<!-- benchmark layers: a.json -->\n<!-- end -->", tmp_path)


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
