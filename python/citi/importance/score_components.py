"""From data files to ability scores: read, render, score, ability by ability."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from citi.fingerprint import model_fingerprint
from citi.importance.ability_scores import AbilityScores
from citi.importance.component_scores import ComponentScores
from citi.importance.progress_file import ScoringProgress, content_of
from citi.importance.recorder import ImportanceRecorder
from citi.importance.scoring_pass import Progress, score_batches
from citi.positions import length_limit

if TYPE_CHECKING:
    from citi.data import RenderedDataset, Sample


def score_components(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tool: str | Path | Sequence[Sample],
    general: Mapping[str, str | Path | Sequence[Sample]] | Iterable[str | Path],
    max_samples: int | None = 256,
    estimator: str = "token",
    granularity: str = "component",
    element_dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    max_length: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
    progress_file: str | Path | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> AbilityScores:
    """Score a model's components for the tool ability and for general ones.

    Args:
        model: a `transformers` causal LM without PEFT adapters.
        tokenizer: its tokenizer, with a chat template.
        tool: data file (any format that `citi.read_samples` knows), or samples.
        general: ability name -> data file or samples; or data files, which name the abilities.
        max_samples: at most so many per ability, chosen by `seed`; None takes all.
        estimator, granularity, element_dtype: see `citi.component_importance`.
        batch_size: sequences per micro-batch; changes `batch` and `parameter` scores.
        max_length: tokens per sample, less where the model has fewer positions; longer prompts are
            cut at the front.
        seed: of the choice of samples.
        progress: called as `progress(done, total, "ability: ...")` after every batch.
        progress_file: where the accumulators are kept once a minute, and when the scoring is
            interrupted or done: a second call with the same arguments goes on from there, to the
            same scores, bitwise. It is yours to remove.
        group: processes that share the batches of every ability; all get the same scores.

    Returns:
        the scores with the model's fingerprint. The loss is on each sample's last assistant turn.

    Raises:
        ValueError: unknown estimator, two abilities of one name, a `progress_file` of another
            scoring, or as `component_importance`.
        citi.data.DataError: a data file cannot be read, or holds nothing to score.
        citi.saved_json.SavedFileError: `progress_file` is damaged.
    """
    abilities = {"tool": tool, **named_abilities(general)}
    recorders = {
        name: ImportanceRecorder(
            model, estimator=estimator, granularity=granularity, element_dtype=element_dtype
        )
        for name in abilities
    }
    fingerprint = model_fingerprint(recorders["tool"].model)
    datasets = {
        name: _rendered(
            tokenizer,
            data,
            task_type=int(name == "tool"),
            max_samples=max_samples,
            seed=seed,
            max_length=length_limit(model, max_length),
        )
        for name, data in abilities.items()
    }
    kept = None
    if progress_file is not None:
        settings = {
            "fingerprint": fingerprint,
            "estimator": estimator,
            "granularity": granularity,
            "element_dtype": str(element_dtype),
            "batch_size": batch_size,
            "data": {name: content_of(dataset) for name, dataset in datasets.items()},
            "process": _place(group),
        }
        path = progress_path(progress_file, group)
        kept = ScoringProgress(path, settings, {n: r.totals for n, r in recorders.items()})
        kept.restore()
    padding = _padding_id(tokenizer)
    scores: dict[str, ComponentScores] = {}
    try:
        for name, recorder in recorders.items():
            batches = _batches(datasets[name], recorder, batch_size, padding, group)
            score_batches(
                recorder,
                batches,
                progress=_prefixed(progress, name),
                after_batch=None if kept is None else kept.save_now_and_then,
            )
    finally:
        if kept is not None:
            kept.save()
    for name, recorder in recorders.items():
        if group is not None:
            recorder.totals = recorder.totals.joined(group)
        scores[name] = recorder.scores()
    return AbilityScores(scores.pop("tool"), scores, fingerprint)


def progress_path(progress_file: str | Path, group: torch.distributed.ProcessGroup | None) -> Path:
    """Where `score_components` keeps this process's progress: of several, each has a file."""
    path, (rank, world_size) = Path(progress_file), _place(group)
    return path if world_size == 1 else path.with_name(f"{path.name}.{rank}-of-{world_size}")


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Sequence[Sample],
    *,
    task_type: int,
    max_samples: int | None,
    seed: int,
    max_length: int,
) -> RenderedDataset:
    from citi.data import RenderedDataset, read_samples

    if isinstance(data, (str, Path)):
        data = read_samples(data, task_type=task_type, max_samples=max_samples, seed=seed)
    elif max_samples is not None and max_samples < len(data):
        chosen = random.Random(seed).sample(range(len(data)), max_samples)
        data = [data[index] for index in sorted(chosen)]
    return RenderedDataset(data, tokenizer, max_length=max_length)


def _batches(
    dataset: RenderedDataset,
    recorder: ImportanceRecorder,
    batch_size: int,
    padding: int,
    group: torch.distributed.ProcessGroup | None,
) -> DataLoader:
    """Batches of this process that the recorder has not seen; the same however many share them."""
    from citi.data import Collator

    rank, world_size = _place(group)
    starts = range(0, len(dataset), batch_size)[rank::world_size][recorder.totals.num_seen :]
    indices = [list(range(s, min(s + batch_size, len(dataset)))) for s in starts]
    return DataLoader(
        dataset,
        batch_sampler=indices,
        collate_fn=Collator(padding),
        generator=torch.Generator(),  # the global random state is the caller's
    )


def _place(group: torch.distributed.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in the group, and the group's size."""
    if group is None:
        return 0, 1
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def _prefixed(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, note: progress(done, total, f"{name}: {note}")


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id does: padding is known by the mask."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def named_abilities(
    general: Mapping[str, str | Path | Sequence[Sample]] | Iterable[str | Path],
) -> dict[str, str | Path | Sequence[Sample]]:
    """The general abilities by name; a file names its ability up to the first dot.

    Raises: ValueError for a lone file, a name given twice, or the name "tool".
    """
    if isinstance(general, (str, Path)):
        raise ValueError(
            f"general must be a list or a mapping, got {general!r}; write [{general!r}]"
        )
    named: dict[str, str | Path | Sequence[Sample]] = {}
    items = general.items() if isinstance(general, Mapping) else _by_file_name(general)
    for name, data in items:
        if name == "tool":
            raise ValueError(
                "general must not name an ability 'tool', which is the tool data's name, got "
                f"{data if isinstance(data, (str, Path)) else 'samples'}; give another name"
            )
        if name in named:
            raise ValueError(
                f"general must name every ability once, got {named[name]} and {data}; give a "
                "mapping from ability name to file"
            )
        named[name] = data
    return named


def _by_file_name(paths: Iterable[str | Path]) -> Iterable[tuple[str, str | Path]]:
    return ((Path(path).name.split(".")[0], path) for path in paths)
