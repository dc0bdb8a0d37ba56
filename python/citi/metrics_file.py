"""metrics.jsonl: one JSON object per log line of every training stage."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerCallback

from citi.durable import write_text
from citi.observer import RunObserver


def rewind_metrics(path: Path, stage: str, *, step: int) -> None:
    """Drop the stage's rows after `step`, and a last row that a kill cut off.

    Training goes on from a checkpoint at `step`, so later rows will be written again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("stage") != stage or row.get("step", 0) <= step:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))


class MetricsWriter(TrainerCallback):
    """Appends log lines to metrics.jsonl, and tells the observer of them and of every step."""

    def __init__(self, path: Path, stage: str, observer: RunObserver) -> None:
        self.path = path
        self.stage = stage
        self.observer = observer
        self._note = ""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        row = {"stage": self.stage, "step": state.global_step, **logs}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if "loss" in logs:
            self._note = f"loss {logs['loss']:.3f}"
        self.observer.metrics(self.stage, state.global_step, logs)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._report(state)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._report(state)

    def _report(self, state) -> None:
        if state.is_world_process_zero:
            self.observer.progress(state.global_step, state.max_steps, self._note)
