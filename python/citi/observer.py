"""What a run tells whoever watches it; the command line turns it into bars and lines."""

from __future__ import annotations

from collections.abc import Mapping


class RunObserver:
    """Watches a run; override what is wanted, the rest stays silent.

    Phases come one after the other: `phase_started`, any number of `progress`, `metrics` and
    `line`, then `phase_finished`; or `phase_skipped` alone. On several processes only the first one
    is watched.
    """

    def phase_started(self, phase: str, title: str) -> None:
        """A phase begins; `phase` is its name in the manifest, `title` what a person reads."""

    def phase_finished(self, phase: str, seconds: float) -> None:
        """Its results are on the disk."""

    def phase_skipped(self, phase: str, title: str, reason: str) -> None:
        """It has been done earlier, or there is nothing to do."""

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        """`done` of `total` units of the running phase; total None when it is not known."""

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """A log line of a training stage, as it stands in metrics.jsonl."""

    def line(self, text: str) -> None:
        """Something worth a line of its own."""
