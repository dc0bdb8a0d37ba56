"""Runs rows: data, leak check, search, training, measures, one JSON a row and seed."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.method.data_sets import DataFolder, prepare_data
from benchmarks.method.kept_results import difference
from benchmarks.method.leaks import check_leaks
from benchmarks.method.measures import Measuring, measure_sets
from benchmarks.method.parallel import ParallelError, run_parallel
from benchmarks.method.rate_search import search_rates
from benchmarks.method.repeatable import make_repeatable
from benchmarks.method.row_config import ROWS, TRIALS, RowConfig, RowConfigError, load_row
from benchmarks.method.row_result import RowResult, load_results
from benchmarks.method.scale import SCALES, Scale
from benchmarks.method.train_row import Assignment, train_row
from citi.base_model import resolve_dtype
from citi.data import DataError
from citi.durable import write_json
from citi.environment_record import environment_record
from citi.observer import RunObserver
from citi.processes import this_process
from citi.saved_json import SavedFileError, read_object
from citi.trainer import TrainingError

FORMAT, VERSION = "citi.method_comparison", 2
_TYPES = {"scale": dict, "model": str, "dtype": str, "sha256": dict}
_RECORD = "comparison.json"


class ComparisonError(ValueError):
    """An output folder belongs to another comparison; the message says what differs."""


_REPORTED = (
    ComparisonError,
    DataError,
    ParallelError,
    RowConfigError,
    SavedFileError,
    TrainingError,
)


@dataclass(frozen=True)
class Comparison:
    """What all rows of an output folder share.

    Attributes:
        scale: Sizes.
        model: Name or directory of the base.
        data: Prepared files, checked for leaks.
        output: scores/, answers/, and work/ while rows are under way.
        results: Folder of the result files, and of search/.
        dtype: Of the base here; where the scale says "auto", machines differ.
        run_code: Whether generated code is run.
        keep_models: Whether work/ keeps what was trained.
        is_repeatable: Whether a GPU may use only what gives the same numbers again.
    """

    scale: Scale
    model: str
    data: DataFolder
    output: Path
    results: Path
    dtype: str
    run_code: bool = False
    keep_models: bool = False
    is_repeatable: bool = True

    @property
    def answers(self) -> Path:
        return self.output / "answers"

    @property
    def search(self) -> Path:
        """One file a candidate, with what they all belong to."""
        return self.results / "search" / self.scale.name

    def assignment(self, row: RowConfig, seed: int) -> Assignment:
        """What the row trains, its learning rates still to be chosen."""
        work = self.output / "work" / f"{row.name}_seed{seed}"
        return Assignment(
            row, self.scale, self.data, self.model, work, seed, {}, self.scale.steps, self.scores
        )

    @property
    def scores(self) -> Path:
        return self.output / "scores"

    def result_file(self, row: RowConfig, seed: int) -> Path:
        return self.results / f"{self.scale.name}_{row.name}_seed{seed}.json"


def open_comparison(
    source: Path,
    output: Path,
    scale: Scale,
    model: str,
    *,
    results: Path | None = None,
    run_code: bool = False,
    keep_models: bool = False,
    is_repeatable: bool = True,
) -> Comparison:
    """Prepare data, refuse leaks, and refuse folders that were begun otherwise.

    Args:
        source: Folder of the data sets.
        output: Folder of everything made on the way.
        scale, model, run_code, keep_models, is_repeatable: See `Comparison`.
        results: Folder of the result files and of the searches, which may hold some already, of
            this machine or of another: they are not made again. None: `output`/results.
    Raises:
        DataError: A data file cannot be used.
        LeakError: Evaluation data in training or validation data.
        ComparisonError: A folder belongs to another scale, model, dtype or data.
        SavedFileError: A result file, or what a folder was begun with, is damaged.
    """
    dtype = str(resolve_dtype(scale.dtype, this_process().device)).removeprefix("torch.")
    settings = {"scale": dataclasses.asdict(scale), "model": Path(model).name, "dtype": dtype}
    results = results or output / "results"
    folders = output, results / "search" / scale.name
    for folder in folders:
        _refuse_other(folder, settings)
    data = prepare_data(source, output / "data", scale)
    check_leaks(data.path)
    shared = settings | {"sha256": data.record()["sha256"]}
    for folder in folders:
        _refuse_other(folder, shared)
    comparison = Comparison(
        scale,
        model,
        data,
        output,
        results,
        dtype,
        run_code,
        keep_models,
        is_repeatable,
    )
    _refuse_other_results(comparison, shared)
    for folder in folders:
        write_json(folder / _RECORD, {"format": FORMAT, "version": VERSION, **shared})
    return comparison


def _refuse_other(folder: Path, shared: Mapping[str, object]) -> None:
    """Raises where the folder was begun with something else."""
    if not (folder / _RECORD).is_file():
        return
    begun = read_object(folder / _RECORD, file_format=FORMAT, version=VERSION, types=_TYPES)
    for key, value in shared.items():
        if begun[key] == value:
            continue
        what = "other data" if key == "sha256" else f"{key} {begun[key]}, got {value}"
        raise ComparisonError(
            f"{folder} was begun with {what}; give another --output or --results, or remove it"
        )


def _refuse_other_results(comparison: Comparison, shared: Mapping[str, object]) -> None:
    """Raises where the results' folder has one of another comparison at this scale."""
    for kept in load_results(comparison.results):
        if kept.scale != comparison.scale.name:
            continue
        what = difference(kept, shared)
        if what is not None:
            raise ComparisonError(
                f"{comparison.results / kept.file_name} has another {what}; give another "
                "--results, or remove the file"
            )


def run_row(
    comparison: Comparison, row: RowConfig, seed: int, *, observer: RunObserver | None = None
) -> RowResult:
    """Train and measure a row with one seed, go on with it, or read its finished result.

    Raises:
        SavedFileError: Its result file is damaged.
        TrainingError: The training stopped itself.
    """
    observer = observer or RunObserver()
    file = comparison.result_file(row, seed)
    if file.is_file():
        observer.line(f"{row.title}, seed {seed}: done earlier")
        return RowResult.load(file)
    observer.line(f"{row.title}, seed {seed}")
    scale, data = comparison.scale, comparison.data
    pattern = comparison.assignment(row, seed)
    work = pattern.folder
    rates, search = search_rates(row, pattern, comparison.search, observer=observer)
    trained = train_row(dataclasses.replace(pattern, rates=rates), observer=observer)
    measuring = Measuring(
        trained.model,
        trained.tokenizer,
        scale,
        run_code=comparison.run_code,
        answers=comparison.answers / file.stem,
        observer=observer,
    )
    samples, seconds = measure_sets(measuring, data, work / "measures")
    result = RowResult(
        row=row.name,
        title=row.title,
        description=row.description,
        scale=scale.name,
        seed=seed,
        settings={
            "row": dataclasses.asdict(row) | {"rates": list(row.rates)},
            "scale": dataclasses.asdict(scale),
            "dtype": comparison.dtype,
            "run_code": comparison.run_code,
        },
        rates=rates,
        search=search,
        model=Path(comparison.model).name,
        data_sha256=data.record()["sha256"],
        machine=environment_record(),
        steps=trained.steps,
        num_tokens=trained.num_tokens,
        num_answer_tokens=trained.num_answer_tokens,
        train_seconds=trained.seconds,
        measure_seconds=seconds,
        samples=samples,
    )
    result.save(comparison.results)
    if not comparison.keep_models:
        shutil.rmtree(work, ignore_errors=True)
    return result


def run_rows(
    comparison: Comparison,
    names: Sequence[str] = ROWS,
    *,
    num_seeds: int | None = None,
    observer: RunObserver | None = None,
) -> list[RowResult]:
    """Run rows one after the other, each with seeds 0, 1, …

    Args:
        comparison: What they share.
        names: Of the rows.
        num_seeds: At most so many of each row; None: what its config says.
        observer: Told of progress.
    """
    results = []
    for row in map(load_row, names):
        seeds = row.seed_range(num_seeds)
        results += [run_row(comparison, row, seed, observer=observer) for seed in seeds]
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    from rich.console import Console

    from citi.command_line.progress import Watcher

    scale = SCALES[options.scale]
    output = options.output or Path("runs", "method", scale.name)
    try:
        with Watcher(Console()) as watcher:
            comparison = open_comparison(
                options.data,
                output,
                scale,
                options.model or _demo_model(),
                results=options.results,
                run_code=options.run_code,
                keep_models=options.keep_models,
                is_repeatable=not options.fast,
            )
            shared = {"num_seeds": options.seeds, "observer": watcher}
            if options.jobs > 1:
                run_parallel(comparison, options.rows, jobs=options.jobs, **shared)
            else:
                if comparison.is_repeatable:
                    make_repeatable()
                run_rows(comparison, options.rows, **shared)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
    except _REPORTED as error:
        sys.exit(str(error))
    print(f"results: {comparison.results}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method", description=__doc__)
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS + TRIALS, default=ROWS, metavar="ROW")
    parser.add_argument("--seeds", type=int, help="at most so many of each row")
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time (default: 1)")
    parser.add_argument(
        "--fast", action="store_true", help="on a GPU: numbers may differ from run to run"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--output", type=Path, help="default: runs/method/SCALE")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of result files; rows and searches found there are not run again "
        "(default: OUTPUT/results)",
    )
    parser.add_argument("--model", help="default: the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--run-code", action="store_true", help="run generated code, sandboxed")
    parser.add_argument("--keep-models", action="store_true", help="keep what was trained")
    return parser


def _demo_model() -> str:
    from citi.demo.model import demo_model_directory

    return str(demo_model_directory())


if __name__ == "__main__":
    main()
