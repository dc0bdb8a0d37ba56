"""`run_demo` on a tiny model: interrupted anywhere, it ends with LoRA in the report."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_cases import tiny_recipe

import citi.demo
import citi.report
from citi.importance.ability_scores import AbilityScores
from citi.observer import RunObserver


class Lines(RunObserver):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch) -> Path:
    """The run directory of a demo without real model; no stage but MI trains."""
    short = {"epochs_rp": 0.0, "epochs_mi": 0.34, "epochs_uco": 0.0, "eval_samples": 1}
    files = {"tool": str(tmp_path / "data" / "tool.jsonl")}
    recipe = tiny_recipe(tmp_path, eval_tool=files, judged_samples=0, **short)
    monkeypatch.setattr(citi.demo, "demo_recipe", lambda **_: recipe)
    monkeypatch.setattr(citi.report, "build_report", lambda path: None)
    monkeypatch.setattr(AbilityScores, "plot", lambda scores, path: None)
    return Path(recipe.output)


def test_a_kill_between_lora_and_the_report_leaves_no_report_without_lora(
    demo: Path, monkeypatch
) -> None:
    saw_lora = []

    def build_report(path: Path) -> None:
        saw_lora.append((path / "eval" / "lora.json").is_file())
        if len(saw_lora) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(citi.report, "build_report", build_report)
    with pytest.raises(KeyboardInterrupt):
        citi.demo.run_demo(output=demo)
    citi.demo.run_demo(output=demo)
    assert saw_lora == [False, True, True]


def test_a_demo_without_matplotlib_says_so_and_is_whole(demo: Path, monkeypatch) -> None:
    def refuse(path: Path) -> None:
        raise ImportError("figures need matplotlib: pip install 'citi-kernels[report]'")

    monkeypatch.setattr(citi.report, "build_report", refuse)
    observer = Lines()
    citi.demo.run_demo(output=demo, observer=observer)
    assert (demo / "eval" / "lora.json").is_file()
    assert observer.lines[-1].startswith("no report: figures need matplotlib")
