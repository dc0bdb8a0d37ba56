"""`citi importance`: which components of a model matter for which data, and how sure that is."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from citi.command_line.as_given import command_as_given
from citi.command_line.failures import set_less_memory, set_resume

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from citi.command_line.progress import Watcher
    from citi.data import Sample
    from citi.importance.ability_scores import AbilityScores

# What the help lists; a test compares them with the package's own, which cost an import of torch.
Estimator = StrEnum("Estimator", ["token", "batch", "parameter"])
Granularity = StrEnum("Granularity", ["component", "row", "column", "head", "element"])
Dtype = StrEnum("Dtype", ["auto", "fp32", "bf16", "fp16"])
ElementDtype = StrEnum("ElementDtype", ["fp32", "bf16"])

_LESS_MEMORY = "lower --batch-size or --max-length, add --checkpointing, or give --device-map auto"


def importance(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model: hub name or directory.")],
    tool: Annotated[Path, typer.Option("--tool", help="Tool-call data.", metavar="FILE")],
    general: Annotated[
        list[Path] | None,
        typer.Option(
            "--general", help="General data, one file for each ability; repeat.", metavar="FILE"
        ),
    ] = None,
    estimator: Annotated[
        Estimator,
        typer.Option(
            help="token: |x · dx| of every token; batch: | Σ x · dx | of every batch; parameter: "
            "|W · dW| of every parameter; all summed up."
        ),
    ] = Estimator.token,
    granularity: Annotated[
        Granularity,
        typer.Option(help="What is scored: whole components, or parts of them too."),
    ] = Granularity.component,
    samples: Annotated[int, typer.Option(min=1, help="Most samples of each file.")] = 256,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Samples in a batch; part of what batch and parameter mean.")
    ] = 1,
    max_length: Annotated[int, typer.Option(min=8, help="Longest sample in tokens.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of samples.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the model.")] = Dtype.auto,
    element_dtype: Annotated[
        ElementDtype, typer.Option(help="Precision of element scores; bf16 halves their memory.")
    ] = ElementDtype.fp32,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Where the layers go: auto spreads them over all devices, cpu or cuda:1 names "
            "one. Without it: the first accelerator, or the CPU.",
            metavar="MAP",
            show_default=False,
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations: less memory, slower.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PREFIX", help="Writes PREFIX.json, .safetensors and .png."
        ),
    ] = Path("importance"),
) -> None:
    """Score every linear component of a model on your data. Run it again to resume.

    Prints the most and the least important components, how far abilities share them, and whether
    the samples were enough to tell.

    Several GPUs: accelerate launch -m citi importance …
    """
    _check_request(output, [tool, *(general or [])], granularity, element_dtype)
    set_less_memory(context, _LESS_MEMORY)
    from citi.base_model import DTYPES
    from citi.command_line.importance_summary import print_summary
    from citi.command_line.progress import Watcher
    from citi.importance.progress_file import remove_progress
    from citi.importance.score_components import score_components
    from citi.processes import process_group, this_process

    group, processes = process_group(), this_process()
    if group is None:
        set_resume(context, command_as_given(context))
    tool_samples, general_samples = _read(tool, general or [], samples, seed)
    progress_file = _with_suffix(output, ".progress")
    console = Console(quiet=not processes.is_main_process)
    with Watcher(console) as watcher:
        _say_where_it_goes_on(watcher, progress_file)
        base, tokenizer = _load(watcher, model, dtype, device_map, checkpointing)
        scores = score_components(
            base,
            tokenizer,
            tool=tool_samples,
            general=general_samples,
            max_samples=None,
            estimator=estimator.value,
            granularity=granularity.value,
            element_dtype=DTYPES[element_dtype.value],
            batch_size=batch_size,
            max_length=max_length,
            progress=watcher,
            progress_file=progress_file,
            group=group,
        )
        if processes.is_main_process:
            _write(watcher, scores, output)
        processes.wait_for_everyone()
        remove_progress(progress_file)
    print_summary(console, scores)
    _print_files(console, output)


def _check_request(
    output: Path, data: list[Path], granularity: Granularity, element_dtype: ElementDtype
) -> None:
    """Refuse what cannot end well before anything is imported or loaded."""
    from citi.durable import check_writable

    if element_dtype != ElementDtype.fp32 and granularity != Granularity.element:
        raise typer.BadParameter("--element-dtype needs --granularity element")
    if output.name in ("", ".."):
        raise typer.BadParameter(f"--output must end in a file name, such as {output}/importance")
    for file in data:
        if not file.is_file():
            raise FileNotFoundError(f"no such data file: {file}")
    for suffix in (".json", ".safetensors", ".png", ".progress"):
        check_writable(_with_suffix(output, suffix))


def _read(
    tool: Path, general: list[Path], samples: int, seed: int
) -> tuple[list[Sample], dict[str, list[Sample]]]:
    """The samples, before the model is loaded: broken data must not come to light minutes later."""
    from citi.data import read_samples
    from citi.importance.score_components import named_abilities

    choice = {"max_samples": samples, "seed": seed}
    named = named_abilities(general)
    return read_samples(tool, task_type=1, **choice), {
        name: read_samples(path, task_type=0, **choice) for name, path in named.items()
    }


def _load(
    watcher: Watcher, model: str, dtype: Dtype, device_map: str | None, checkpointing: bool
) -> tuple[PreTrainedModel, Any]:
    from citi.base_model import load_base

    watcher.line(f"loading {model}")
    base, tokenizer = load_base(model, dtype=dtype.value, device_map=device_map)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base, tokenizer


def _say_where_it_goes_on(watcher: Watcher, progress_file: Path) -> None:
    from citi.importance.progress_file import batches_done
    from citi.importance.score_components import progress_path
    from citi.processes import process_group

    path = progress_path(progress_file, process_group())
    if path.exists():
        done = ", ".join(f"{name} {number}" for name, number in batches_done(path).items())
        watcher.line(f"going on from {path}; batches done: {done}")


def _write(watcher: Watcher, scores: AbilityScores, output: Path) -> None:
    scores.save(output)
    try:
        scores.plot(_with_suffix(output, ".png"))
    except ImportError as error:
        watcher.line(f"no {_with_suffix(output, '.png')}: {error}")


def _print_files(console: Console, output: Path) -> None:
    from citi.command_line.comparison import print_path

    for label, suffix in (("scores", ".json"), ("numbers", ".safetensors"), ("picture", ".png")):
        path = _with_suffix(output, suffix)
        if path.is_file():
            print_path(console, label, path)


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
