"""What the tests of `citi importance` share: a model and data on the disk, and the true scores."""

from __future__ import annotations

from pathlib import Path

from run_cases import write_data, write_model

from citi.base_model import load_base
from citi.importance.ability_scores import AbilityScores
from citi.importance.score_components import score_components

SUFFIXES = (".json", ".safetensors", ".png")


class Folder:
    """A tiny model and data, the words of a command, and what the Python call gives for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = write_model(path / "model")
        self.data = write_data(path / "data", num_samples=10)

    def words(self, output: Path, *options: str | Path, general=("math", "chat")) -> list:
        data = [word for name in general for word in ("--general", self.data[name])]
        return [
            *("importance", self.model, "--tool", self.data["tool"], *data),
            *("--dtype", "fp32", "--samples", "9", "--output", output, *options),
        ]

    def scores(self, *, general=("math", "chat"), **given) -> AbilityScores:
        model, tokenizer = load_base(str(self.model), dtype="fp32")
        return score_components(
            model,
            tokenizer,
            tool=self.data["tool"],
            general=[self.data[name] for name in general],
            **({"max_samples": 9} | given),
        )


def contents(output: Path) -> dict[str, bytes]:
    return {s: output.with_name(output.name + s).read_bytes() for s in SUFFIXES[:2]}


def saved(scores: AbilityScores, folder: Path) -> dict[str, bytes]:
    scores.save(folder / "wanted")
    return contents(folder / "wanted")
