"""Progress of long work: bars on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from citi.observer import RunObserver

SECONDS_BETWEEN_LINES = 5.0


class Watcher(RunObserver):
    """Shows a run, and any function that takes a `progress(done, total, note)` callable.

    ::

        with Watcher(Console()) as watcher:
            train(recipe, observer=watcher)
            evaluate(model, tokenizer, progress=watcher)

    Calls with one total and a growing `done` belong to one piece of work, which has one bar.
    """

    def __init__(self, console: Console, *, seconds_between_lines: float = SECONDS_BETWEEN_LINES):
        self.console = console
        self._seconds_between_lines = seconds_between_lines
        self._bars = _bars(console) if console.is_terminal else None
        self._task: TaskID | None = None
        self._phase = ""
        self._hides_others = False
        self._piece: tuple[int | None] | None = None  # its total; None before the first
        self._done = 0
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Watcher:
        from transformers.utils import logging

        # Loading weights draws a bar of its own, into ours or into a log file.
        self._hides_others = logging.is_progress_bar_enabled()
        if self._hides_others:
            logging.disable_progress_bar()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        from transformers.utils import logging

        if self._bars is not None:
            self._bars.stop()
        if self._hides_others:
            logging.enable_progress_bar()

    def __call__(self, done: int, total: int | None, note: str) -> None:
        """The plain callable that functions outside a run report to."""
        self.progress(done, total, note)

    def phase_started(self, phase: str, title: str) -> None:
        self._end_piece()
        self._phase = title
        if self._bars is None:
            self.line(f"{title} …")
        else:
            self._task = self._bars.add_task(title, total=None)

    def phase_finished(self, phase: str, seconds: float) -> None:
        self._end_piece()
        self.line(f"{self._phase}: done in {clock(seconds)}")
        self._phase = ""

    def phase_skipped(self, phase: str, title: str, reason: str) -> None:
        self.line(f"{title}: skipped, {reason}")

    def progress(self, done: int, total: int | None, note: str = "") -> None:
        finished = total is not None and self._done == total
        starts = self._piece != (total,) or done < self._done or finished
        self._piece, self._done = (total,), done
        text = ": ".join(part for part in (self._phase, note) if part)
        if self._bars is None:
            self._show_line(done, total, text, starts=starts)
        else:
            self._show_bar(done, total, text, starts=starts)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _end_piece(self) -> None:
        self._piece, self._done = None, 0
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None

    def _show_bar(self, done: int, total: int | None, text: str, *, starts: bool) -> None:
        assert self._bars is not None
        if starts:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(text, total=total)
        assert self._task is not None
        self._bars.update(self._task, completed=done, description=text)

    def _show_line(self, done: int, total: int | None, text: str, *, starts: bool) -> None:
        now = time.monotonic()
        if starts:
            self._began = now
        elif done != total and now - self._last_line < self._seconds_between_lines:
            return
        self._last_line = now
        self.line(f"  {text} {_count(done, total)}{_times(done, total, now - self._began)}")


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def _count(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done}/{total}"


def _times(done: int, total: int | None, seconds: float) -> str:
    if seconds < 1:
        return ""
    words = f", {clock(seconds)}"
    if total is not None and 0 < done < total:
        words += f", about {clock(seconds * (total - done) / done)} left"
    return words


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
