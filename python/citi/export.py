"""A run's model without its routers: fixed gates make of it a plain LoRA, or plain weights.

A gate depends on the token, so no weight equals a MOLoRA. With g, a layer's mean gate over tokens,
in the gate's place

    y = W x + b + scaling * sum_i g[i] * B_i (A_i x)
      = W x + b + scaling * [g[1] B_1 ... g[E] B_E] [A_1; ...; A_E] x

is a LoRA of rank E * r, which every PEFT loads, and which can be merged. What is lost, general
tokens passing by the experts, is measured and told with the files. Paper silent; ours.

Legend: K in-features, N out-features, E experts, r rank, R = E * r, G = E + 1 gate entries.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from citi.adapters.layer import MoLoraLayer
from citi.data import Sample, read_samples
from citi.durable import (
    check_writable,
    directory_in_one_step,
    unfinished_of,
    write_json,
    write_text,
)
from citi.evaluation import answer_nll
from citi.gates import collect_gates
from citi.observer import RunObserver
from citi.recipe import Recipe
from citi.run_directory import RunDirectory, RunError
from citi.run_evaluation import SampleSets, evaluation_sets
from citi.run_model import load_run

FORMS = ("lora", "hf")
GATES = ("tool", "general", "both")
RESULT_FILE = "export.json"
_PREFIX = "base_model.model."
_MODEL_CARD = """---
base_model: {base}
tags: [citi, tool-calls]
---
{base}, tuned by CITI (arXiv 2409.13202) for tool calls, {form}.
The gates of its experts are fixed at their means over {gates}; export.json tells what that costs.
"""
_FORM_WORDS = {
    "lora": "as a LoRA for PEFT: `PeftModel.from_pretrained(base, folder)`",
    "hf": "as plain weights: `AutoModelForCausalLM.from_pretrained(folder)`",
}
_GATE_WORDS = {
    "tool": "tool data",
    "general": "general data",
    "both": "tool data and general data, each counted as much as the other",
}


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote, and what fixed gates cost.

    Attributes:
        directory: where.
        answer_nll: data set -> "base", "tuned" and "exported" -> nats a token of its answers.
        is_held_out: whether the sets are the recipe's evaluation data; else its training data.
    """

    directory: Path
    answer_nll: dict[str, dict[str, float]]
    is_held_out: bool


def export_run(
    path: str | Path,
    to: str,
    *,
    output: str | Path | None = None,
    gates: str = "tool",
    num_samples: int = 32,
    observer: RunObserver | None = None,
) -> ExportResult:
    """Write a finished run's model for programs that do not know MOLoRA: what `citi export` does.

    Args:
        path: the run directory.
        to: "lora", a PEFT directory of a LoRA and the components that were trained whole; or "hf",
            the base model's directory with all of it merged into the weights.
        output: where; None: export_lora or export_hf in the run directory. An earlier export there
            is replaced.
        gates: over which training data the mean gates are taken: "tool", "general" or "both".
        num_samples: of each data file, for the gates and for the measurement.
        observer: told of progress.
    Returns:
        The folder, which also holds the tokenizer and export.json, and the measurement.
    Raises:
        RunError: no finished run; or something else than an export is in the output's place.
        ValueError: `to`, `gates` or `num_samples` is none of these.
        DataError: a data file cannot be used.
        WriteError: the output cannot be written.
    """
    _check_choice("to", to, FORMS)
    _check_choice("gates", gates, GATES)
    if num_samples < 1:
        raise ValueError(f"num_samples: wanted at least 1, got {num_samples}")
    run, observer = RunDirectory(Path(path)), observer or RunObserver()
    recipe = run.load_recipe()
    target = Path(output) if output is not None else run.path / f"export_{to}"
    _check_target(target)
    model, tokenizer = load_run(path)
    observer.line("mean gates, and what fixing them costs")
    training = _by_title(*_training_sets(recipe, num_samples))
    means = mean_gates(
        model,
        tokenizer,
        list(itertools.chain(*training.values())),
        gates,
        max_length=recipe.max_length,
        observer=observer,
    )
    held_out = _by_title(*evaluation_sets(recipe))
    cut = {title: samples[:num_samples] for title, samples in held_out.items()}
    measure = _Measure(tokenizer, cut or training, recipe, observer)
    with model.disable_adapter():
        measure("base", model)
    measure("tuned", model)
    exported: Any = convert_to_lora(model, means)
    if to == "hf":
        exported = exported.merge_and_unload()
    measure("exported", exported.eval())
    result = ExportResult(target, measure.answer_nll, is_held_out=bool(held_out))
    _save(exported, tokenizer, result, recipe=recipe, to=to, gates=gates)
    return result


def mean_gates(
    model: PeftModel,
    tokenizer: Any,
    samples: Sequence[Sample],
    kind: str,
    *,
    max_length: int = 4096,
    observer: RunObserver | None = None,
) -> dict[str, tuple[float, ...]]:
    """Each MOLoRA layer's mean gate.

    Args:
        model: with a MOLoRA adapter.
        tokenizer: its tokenizer.
        samples: of the kinds that are asked for; all their tokens count.
        kind: "tool", "general", or "both", the mean of the two.
        max_length: tokens at which a sample is cut.
        observer: told of progress.
    Returns:
        Component name -> G means, which sum to 1 (without top_k).
    Raises:
        ValueError: another kind, or no token of one that is asked for.
    """
    _check_choice("kind", kind, GATES)
    progress = None if observer is None else observer.progress
    summary = collect_gates(model, tokenizer, samples, max_length=max_length, progress=progress)
    kinds = ("tool", "general") if kind == "both" else (kind,)
    absent = [each for each in kinds if not summary.num_tokens[each]]
    if absent:
        raise ValueError(f"samples: wanted some of {' and '.join(absent)} data, got none")
    means = {}
    for name, by_kind in summary.layers.items():
        chosen = [by_kind[each] for each in kinds]
        means[name] = tuple(sum(gate) / len(kinds) for gate in zip(*chosen, strict=True))
    return means


def convert_to_lora(model: PeftModel, gates: Mapping[str, Sequence[float]]) -> PeftModel:
    """A LoRA around the same base, equal to the MOLoRA where its gates are those given.

    Args:
        model: with one MOLoRA adapter, which is taken off its base: the model is used up.
        gates: component name -> G gate entries, entry 0 the backbone neuron's; of every component
            that has MOLoRA.
    Returns:
        A PEFT model of rank R = E * r and scaling alpha / r, and with the same `modules_to_save`.
    Raises:
        ValueError: no MOLoRA adapter; gates that are absent or not E + 1.
    """
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    if config.peft_type != "MOLORA":
        raise ValueError(f"model: wanted one with a MOLoRA adapter, got {config.peft_type}")
    factors = {
        name: _lora_factors(name, layer, adapter, gates)
        for name, layer in _modules(model, MoLoraLayer).items()
    }
    whole = {
        name: wrapper.modules_to_save[adapter].state_dict()
        for name, wrapper in _modules(model, ModulesToSaveWrapper).items()
    }
    base = model.unload()
    lora = get_peft_model(
        base,
        LoraConfig(
            r=config.num_experts * config.r,
            lora_alpha=config.lora_alpha * config.num_experts,
            target_modules=list(factors),
            modules_to_save=list(whole) or None,
            fan_in_fan_out=any(isinstance(base.get_submodule(name), Conv1D) for name in factors),
            task_type=config.task_type,
        ),
    )
    with torch.no_grad():
        for name, (a_RK, b_NR) in factors.items():
            layer = lora.get_submodule(_PREFIX + name)
            layer.lora_A["default"].weight.copy_(a_RK)
            layer.lora_B["default"].weight.copy_(b_NR)
    for name, state in whole.items():
        wrapper = lora.get_submodule(_PREFIX + name)
        wrapper.modules_to_save["default"].load_state_dict(state)
    return lora


def _modules(model: PeftModel, kind: type) -> dict[str, Any]:
    return {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, kind)
    }


def _lora_factors(
    name: str, layer: MoLoraLayer, adapter: str, gates: Mapping[str, Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """(R, K), and (N, R) with the gates in it; fp32."""
    settings = layer.molora_settings[adapter]
    gate_G = gates.get(name)
    if gate_G is None or len(gate_G) != settings.num_experts + 1:
        got = "none" if gate_G is None else str(len(gate_G))
        raise ValueError(f"gates: wanted {settings.num_experts + 1} of {name}, got {got}")
    a_RK, b_NR = (getattr(layer, part)[adapter].detach() for part in ("molora_A", "molora_B"))
    gate_R = torch.tensor(gate_G[1:], dtype=torch.float32, device=b_NR.device)
    return a_RK.float(), b_NR.float() * gate_R.repeat_interleave(settings.r)


class _Measure:
    """The NLL of each set's answers, by the name of a model."""

    def __init__(
        self,
        tokenizer: Any,
        sets: Mapping[str, Sequence[Sample]],
        recipe: Recipe,
        observer: RunObserver,
    ) -> None:
        self.answer_nll: dict[str, dict[str, float]] = {name: {} for name in sets}
        self._tokenizer, self._sets = tokenizer, sets
        self._recipe, self._observer = recipe, observer

    def __call__(self, name: str, model: Any) -> None:
        for title, samples in self._sets.items():

            def progress(done: int, total: int | None, note: str, title: str = title) -> None:
                self._observer.progress(done, total, f"{name} {title}: {note}")

            likelihood = answer_nll(
                model,
                self._tokenizer,
                samples,
                batch_size=self._recipe.eval_batch_size,
                max_length=self._recipe.max_length,
                progress=progress,
            )
            self.answer_nll[title][name] = likelihood.mean


def _training_sets(recipe: Recipe, num_samples: int) -> tuple[SampleSets, SampleSets]:
    """Tool sets and general sets by name, so many samples of each file."""
    limit = {"max_samples": num_samples, "seed": recipe.seed}
    return (
        {name: read_samples(file, task_type=1, **limit) for name, file in recipe.tool.items()},
        {name: read_samples(file, task_type=0, **limit) for name, file in recipe.general.items()},
    )


def _by_title(tool: SampleSets, general: SampleSets) -> dict[str, Sequence[Sample]]:
    """All sets; a name that stands in both lists says which."""
    both = tool.keys() & general.keys()
    return {
        f"{name} ({kind})" if name in both else name: samples
        for kind, sets in (("tool", tool), ("general", general))
        for name, samples in sets.items()
    }


def _save(
    exported: Any, tokenizer: Any, result: ExportResult, *, recipe: Recipe, to: str, gates: str
) -> None:
    """Model, tokenizer, card and measurement, in one step."""
    options = {"save_embedding_layers": False} if to == "lora" else {}
    card = _MODEL_CARD.format(base=recipe.model, form=_FORM_WORDS[to], gates=_GATE_WORDS[gates])
    content = {"format": 1, "to": to, "gates": gates, "is_held_out": result.is_held_out}
    with directory_in_one_step(result.directory) as unfinished:
        exported.save_pretrained(str(unfinished), **options)
        tokenizer.save_pretrained(str(unfinished))
        write_text(unfinished / "README.md", card)
        write_json(unfinished / RESULT_FILE, content | {"answer_nll": result.answer_nll})


def _check_target(target: Path) -> None:
    """A folder of somebody else's is not replaced."""
    if target.is_dir() and any(target.iterdir()) and not (target / RESULT_FILE).is_file():
        raise RunError(
            f"output: {target} holds something else than an export; give another folder, or remove "
            "this one"
        )
    check_writable(unfinished_of(target))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: wanted one of {', '.join(choices)}, got {value!r}")
