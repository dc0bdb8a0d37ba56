"""The data of the comparison, cut once: training, validation and evaluation files.

Evaluation files stay as published, but for a seeded choice where a scale takes less. Validation and
the held-out sets of abilities without an evaluation file are cut from training files, by a fixed
seed and whole conversations at a time: samples whose user turns are equal stay on one side. A
training sample that an evaluation set knows (`citi` would be asked what it was told) is left out.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.method.leaks import EvaluationKeys, question_key
from benchmarks.method.scale import Scale
from citi.data import DataError, Sample, read_samples
from citi.durable import write_json, write_text
from citi.manifest import digest_files
from citi.saved_json import read_object

SPLIT_SEED = 13
FORMAT, VERSION = "citi.method_data", 1
_TYPES = {"source_sha256": dict, "sha256": dict, "counts": dict, "left_out": dict}

TRAINING = {
    "api_bank": ("tool", "api_bank/train_lv3.jsonl.gz"),
    "math": ("general", "gsm8k/train.jsonl.gz"),
    "knowledge": ("general", "triviaqa/train.jsonl.gz"),
    "code": ("general", "nc_codealpaca/train.jsonl.gz"),
    "instruct": ("general", "nc_alpaca/train.jsonl.gz"),
}


@dataclass(frozen=True)
class EvaluationSet:
    """One set that every row is measured on.

    Attributes:
        name: Of its file and its lines in the tables.
        task: "tool" or "general".
        group: Of tool sets "trained" tools or "unseen" ones; of general sets whether their ability
            is in the mix ("trained") or "untrained".
        file: As published; None: cut from the training file of the same name.
    """

    name: str
    task: str
    group: str
    file: str | None = None


EVALUATION = (
    EvaluationSet("api_bank_lv1", "tool", "trained", "api_bank/eval_lv1_api.jsonl.gz"),
    EvaluationSet("api_bank_lv3", "tool", "trained", "api_bank/eval_lv3_api.jsonl.gz"),
    EvaluationSet("responses_lv1", "tool", "trained", "api_bank/eval_lv1_response.jsonl.gz"),
    EvaluationSet("responses_lv3", "tool", "trained", "api_bank/eval_lv3_response.jsonl.gz"),
    EvaluationSet("seal_tools", "tool", "unseen", "seal_tools/eval_out_domain.jsonl.gz"),
    EvaluationSet("bfcl", "tool", "unseen", "bfcl/eval.jsonl.gz"),
    EvaluationSet("math", "general", "trained", "gsm8k/eval.jsonl.gz"),
    EvaluationSet("knowledge", "general", "trained", "triviaqa/eval.jsonl.gz"),
    EvaluationSet("code", "general", "trained"),
    EvaluationSet("instruct", "general", "trained"),
    EvaluationSet("nq_open", "general", "untrained", "nq_open/eval.jsonl.gz"),
    EvaluationSet("mbpp", "general", "untrained", "mbpp/eval.jsonl.gz"),
    EvaluationSet("humaneval", "general", "untrained", "humaneval/eval.jsonl.gz"),
    EvaluationSet("dolly", "general", "untrained", "dolly/train.jsonl.gz"),
)


@dataclass(frozen=True)
class DataFolder:
    """Prepared files: train/, validation/ and evaluation/, one file a set; data.json, written last.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def record_file(self) -> Path:
        return self.path / "data.json"

    def training(self, task: str | None = None) -> dict[str, Path]:
        """Name → training file, of one task or of both."""
        return self._training_files("train", task)

    def validation(self, task: str | None = None) -> dict[str, Path]:
        """Name → validation file."""
        return self._training_files("validation", task)

    def evaluation(self, group: str | None = None) -> dict[str, Path]:
        """Name → evaluation file, of one group or of all."""
        chosen = [each for each in EVALUATION if group in (None, each.group)]
        return {each.name: self.path / "evaluation" / f"{each.name}.jsonl" for each in chosen}

    def files(self) -> dict[str, Path]:
        """`folder/name` → every prepared file."""
        parts = {
            "train": self.training(),
            "validation": self.validation(),
            "evaluation": self.evaluation(),
        }
        return {f"{part}/{name}": f for part, files in parts.items() for name, f in files.items()}

    def record(self) -> dict[str, object]:
        """Counts and digests of what was prepared.

        Raises:
            SavedFileError: Not prepared, or damaged.
            DataError: A file is gone or was changed since.
        """
        record = read_object(self.record_file, file_format=FORMAT, version=VERSION, types=_TYPES)
        files = self.files()
        missing = [str(path) for path in files.values() if not path.is_file()]
        found = {} if missing else digest_files(files)
        changed = [str(files[name]) for name in found if found[name] != record["sha256"][name]]
        if missing or changed:
            raise DataError(
                f"{self.path}: {', '.join(missing or changed)} "
                f"{'missing' if missing else 'changed'} since it was prepared; remove the folder"
            )
        return record

    def _training_files(self, part: str, task: str | None) -> dict[str, Path]:
        names = [name for name, (its_task, _) in TRAINING.items() if task in (None, its_task)]
        return {name: self.path / part / f"{name}.jsonl" for name in names}


def prepare_data(source: Path, target: Path, scale: Scale) -> DataFolder:
    """Cut the files of `source` for one scale; a folder that is prepared is checked, not made.

    Args:
        source: Holds the files named in TRAINING and EVALUATION.
        target: Gets the prepared files.
        scale: How many samples of each.
    Raises:
        DataError: A file of `source` is missing or unusable, or a prepared one was changed.
    """
    folder = DataFolder(target)
    if not folder.record_file.is_file():
        _Preparation(source, folder, scale).go()
    folder.record()
    return folder


class _Preparation:
    """The files of a data folder under way."""

    def __init__(self, source: Path, folder: DataFolder, scale: Scale) -> None:
        self.source = source
        self.folder = folder
        self.scale = scale
        self.counts: dict[str, int] = {}
        self.left_out: dict[str, int] = {}

    def go(self) -> None:
        held_out = {each.name for each in EVALUATION if each.file is None}
        parts = {name: self._split(name, name in held_out) for name in TRAINING}
        unseen, known = EvaluationKeys(), EvaluationKeys()
        for each in EVALUATION:
            samples = self._evaluation_samples(each, parts)
            (unseen if each.group == "unseen" else known).add(samples)
            self._write(f"evaluation/{each.name}", samples)
        for name, (_, train, validation) in parts.items():
            kept = {}
            for part, samples in (("train", train), ("validation", validation)):
                kept[part] = [s for s in samples if not (known.knows(s) or unseen.knows_tool(s))]
                self.left_out[f"{part}/{name}"] = len(samples) - len(kept[part])
            limit = self._limit(name)
            self._write(f"train/{name}", _some(kept["train"], limit, f"{SPLIT_SEED}/{name}/train"))
            self._write(f"validation/{name}", kept["validation"])
        self._record()

    def _limit(self, name: str) -> int | None:
        is_tool = TRAINING[name][0] == "tool"
        return self.scale.tool_samples if is_tool else self.scale.general_samples

    def _read(self, file: str, task: str) -> list[Sample]:
        return read_samples(self.source / file, task_type=int(task == "tool"))

    def _split(self, name: str, is_held_out: bool) -> tuple[list[Sample], ...]:
        """Held-out evaluation, training and validation samples of a training file."""
        task, file = TRAINING[name]
        groups: dict[str, list[Sample]] = {}
        for sample in self._read(file, task):
            groups.setdefault(question_key(sample), []).append(sample)
        order = sorted(groups)
        random.Random(f"{SPLIT_SEED}/{name}").shuffle(order)
        validation = _take(order, groups, self.scale.validation_samples)
        num_held_out = (self.scale.eval_samples or 500) if is_held_out else 0
        held_out = _take(order, groups, num_held_out)
        train = [sample for key in order for sample in groups[key]]
        if not train:
            raise DataError(f"{self.source / file}: nothing is left to train on after validation")
        return held_out, sorted(train, key=_line), validation

    def _evaluation_samples(self, each: EvaluationSet, parts: dict) -> list[Sample]:
        if each.file is None:
            return parts[each.name][0]
        samples = self._read(each.file, each.task)
        return _some(samples, self.scale.eval_samples, f"{SPLIT_SEED}/{each.name}")

    def _write(self, name: str, samples: Sequence[Sample]) -> None:
        """The samples' own lines, as they stand in their source."""
        if not samples:
            raise DataError(f"{name}: no sample is left")
        lines = _source_lines(samples)
        write_text(self.folder.path / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
        self.counts[name] = len(samples)

    def _record(self) -> None:
        files = [file for _, file in TRAINING.values()]
        files += [each.file for each in EVALUATION if each.file]
        sources = {file: self.source / file for file in files}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "source_sha256": digest_files(sources),
            "sha256": digest_files(self.folder.files()),
            "counts": self.counts,
            "left_out": self.left_out,
        }
        write_json(self.folder.record_file, record)


def _take(order: list[str], groups: dict[str, list[Sample]], count: int) -> list[Sample]:
    """Whole groups off the end of `order`, until there are `count` samples."""
    taken: list[Sample] = []
    while order and len(taken) < count:
        taken += groups[order.pop()]
    return taken


def _some(samples: Sequence[Sample], limit: int | None, seed: str) -> list[Sample]:
    """`limit` of the samples, in their order."""
    if limit is None or len(samples) <= limit:
        return list(samples)
    chosen = random.Random(seed).sample(range(len(samples)), limit)
    return [samples[index] for index in sorted(chosen)]


def _line(sample: Sample) -> int:
    return int(sample.source.rpartition(":")[2])


def _source_lines(samples: Iterable[Sample]) -> list[str]:
    """The line that each sample was read from."""
    texts: dict[str, list[str]] = {}
    lines = []
    for sample in samples:
        path = sample.source.rpartition(":")[0]
        if path not in texts:
            texts[path] = _read_text(Path(path)).split("\n")
        lines.append(texts[path][_line(sample) - 1])
    return lines


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
