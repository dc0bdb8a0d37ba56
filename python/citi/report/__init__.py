"""One self-contained HTML page about a run: `build_report(run_directory)`."""

from __future__ import annotations

from pathlib import Path

from citi.durable import write_text
from citi.report import html, sections, tradeoff
from citi.report.drawing import require_matplotlib
from citi.report.run_files import RunFiles, read_results, read_run

__all__ = ["build_report", "read_results"]

REPORT_FILE = "report.html"


def build_report(directory: str | Path) -> Path:
    """Write `directory`/report.html from what the run has written so far.

    A partial run gives a partial report that names what is missing. The same files give the same
    bytes: no clock is read.

    Args:
        directory: a run directory, see `citi.run`.
    Returns:
        The path of the report.
    Raises:
        FileNotFoundError: no such directory, or nothing of a run in it.
        ValueError: a file of the run is broken; the message has its path.
        ImportError: matplotlib is missing; the message has the pip line.
    """
    require_matplotlib()
    run = read_run(directory)
    path = run.directory / REPORT_FILE
    write_text(path, _render(run))
    return path


def _render(run: RunFiles) -> str:
    parts = [
        tradeoff.section(run.results) if run.results else None,
        sections.importance(run.scores, run.plan) if run.scores else None,
        sections.overlap(run.scores) if run.scores else None,
        sections.curves(run.metrics),
        sections.gates(run.gates) if run.gates else None,
        sections.settings(run),
        sections.missing(run),
    ]
    return html.page(
        title=_model_name(run),
        facts=_facts(run),
        cards=html.cards([*tradeoff.headline(run.results), *_plan_cards(run)]),
        sections=[part for part in parts if part is not None],
    )


def _plan_cards(run: RunFiles) -> list[tuple[str, str, str]]:
    if run.plan is None:
        return []
    return [
        (
            "Components with MOLoRA",
            str(len(run.plan.important)),
            f"of {run.plan.num_components}; {len(run.plan.unimportant)} more unfrozen in UCO",
        )
    ]


def _model_name(run: RunFiles) -> str:
    """The recipe's model: a hub name whole, of a path the last part."""
    model = str(run.recipe.get("model") or run.directory.resolve().name)
    return Path(model).name if Path(model).is_absolute() else model


def _facts(run: RunFiles) -> str:
    versions = run.environment.get("versions", {})
    shown = ("citi-kernels", "torch", "transformers", "peft")
    facts = [f"{name} {versions[name]}" for name in shown if name in versions]
    finished, started = run.manifest.get("finished"), run.manifest.get("started")
    if finished or started:
        when = finished or f"{started}, not finished"
        facts.insert(0, when.replace("T", " ").replace("+00:00", " UTC"))
    return " · ".join(facts)
