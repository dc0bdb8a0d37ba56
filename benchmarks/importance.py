"""Cost of scoring a model's components, as ratios in one process.

Random Llama-like model, random data, every token an answer, so that all rows run the same head.

    frozen      forward and backward with frozen weights (the floor of any score)
    full        forward and backward with all weight gradients
    naive       full, then |p * p.grad| summed per component
    token, batch, parameter    citi.component_importance

Usage: python benchmarks/importance.py [--dtype bf16] [--json results.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from citi.components import find_components
from citi.environment_record import environment_record
from citi.importance import ESTIMATORS, component_importance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATIOS = {
    "token / frozen": ("token", "frozen"),
    "batch / frozen": ("batch", "frozen"),
    "parameter / full": ("parameter", "full"),
    "naive / token": ("naive", "token"),
    "naive / parameter": ("naive", "parameter"),
}


def make_model(arguments: argparse.Namespace) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 192),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return model.to(arguments.device, DTYPES[arguments.dtype]).eval()


def make_cases(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    weights = [model.get_submodule(c.name).weight for c in find_components(model)[0]]

    def frozen() -> None:
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss.backward()

    def full() -> None:
        model.requires_grad_(True)
        model.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()

    def naive() -> None:
        full()
        _ = [(weight * weight.grad).abs().sum().item() for weight in weights]
        model.zero_grad(set_to_none=True)

    def scored(estimator: str) -> Callable[[], None]:
        return lambda: component_importance(model, [batch], estimator=estimator)

    cases = {"frozen": frozen, "full": full, "naive": naive}
    return cases | {estimator: scored(estimator) for estimator in ESTIMATORS}


def measure(cases: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of every case, all cases in turn in every round; the first is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if device != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    arguments = parser.parse_args()
    model = make_model(arguments)
    shape = (arguments.batch, arguments.tokens)
    ids = torch.randint(0, arguments.vocabulary, shape, device=arguments.device)
    seconds = measure(
        make_cases(model, {"input_ids": ids, "labels": ids}), arguments.rounds, arguments.device
    )
    ratios = {name: seconds[above] / seconds[below] for name, (above, below) in RATIOS.items()}
    for name, value in seconds.items():
        print(f"{name:18} {1000 * value:9.1f} ms   {ids.numel() / value:9.0f} tokens/s")
    for name, value in ratios.items():
        print(f"{name:18} {value:9.3f}")
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        info = environment_record() | {"date": datetime.date.today().isoformat()}
        record = {"machine": info, "settings": settings, "seconds": seconds, "ratios": ratios}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
