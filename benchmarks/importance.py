"""Cost of scoring a model's components: time as ratios in one process, and peak memory.

Random weights in the shape of a model, random data, all rows in turn in every round, the first
round as warm-up. A ratio is the median over the rounds of the ratio in the same round.

    frozen       forward and backward with frozen weights: the floor of any score
    full         forward and backward with all weight gradients
    token, batch, parameter, parameter by row, parameter by head     citi.component_importance
    elements fp32, elements bf16    parameter by element, a batch within a longer pass
    parameter per sequence          batches of one sequence
    naive, naive per sequence       benchmarks/peers/naive_gradient.py: the scores of `parameter`
    hooks, hooks per sequence       benchmarks/peers/hooks.py: the scores of `token`

Before anything is timed, `token` must agree with `hooks` and `parameter` with `naive`, on the first
layers of the model. Memory is that of a separate run.

    python benchmarks/importance.py [--model small] [--dtype bf16] [--json results.json]
    python benchmarks/importance.py --ops [--device cuda]      the ops alone, see importance_ops.py
    python benchmarks/importance.py --device cuda --dtype bf16 --model llama-8b --checkpointing

Other processes on the machine: --threads 1 --clock cpu counts this process's CPU time alone.
On a GPU: written for it, not yet run on one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import importance_ops
import torch
from molora_linear import CLOCKS, machine
from peers.hooks import hooks, hooks_per_sequence
from peers.naive_gradient import full_backward, naive_gradient, naive_gradient_per_sequence
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from citi.components import find_components
from citi.importance import ImportanceRecorder, component_importance
from citi.importance.scoring_pass import score_batches
from citi_kernels.backends import choose
from citi_kernels.tensor_memory import TensorMemory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# vocabulary, hidden, intermediate, layers, heads, key-value heads, tied embeddings
MODELS = {
    "small": (8192, 576, 1536, 6, 9, 3, False),
    "smollm2": (49152, 576, 1536, 30, 9, 3, True),
    "llama-8b": (128256, 4096, 14336, 32, 32, 8, False),
}
ROWS_OF_LLAMA_8B = ("frozen", "token", "batch", "parameter")
CHECKED_LAYERS = 4
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
RATIOS = {
    "token / frozen": 1.10,
    "batch / frozen": None,
    "full / frozen": None,
    "parameter / full": 1.10,
    "parameter by row / full": None,
    "parameter by head / full": None,
    "elements fp32 / full": None,
    "elements bf16 / full": None,
    "hooks / token": 2.0,
    "hooks per sequence / token": 2.0,
    "naive / token": 2.0,
    "naive / parameter": 2.0,
    "naive per sequence / parameter": 2.0,
    "naive per sequence / parameter per sequence": 2.0,
}

Cases = dict[str, Callable[[], object]]


def make_model(arguments: argparse.Namespace, max_layers: int = 1000) -> PreTrainedModel:
    vocabulary, hidden, intermediate, layers, heads, kv_heads, tied = MODELS[arguments.model]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=min(layers, max_layers),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[arguments.dtype]).eval()
    if arguments.checkpointing:
        # transformers checkpoints in train mode only; there is no dropout
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Random tokens; the last share of every sequence is its answer."""
    shape, vocabulary = (arguments.batch, arguments.tokens), MODELS[arguments.model][0]
    ids = torch.randint(0, vocabulary, shape, device=arguments.device)
    labels = ids.clone()
    labels[:, : round((1 - arguments.answers) * arguments.tokens)] = -100
    return {"input_ids": ids, "labels": labels}


def make_cases(model: PreTrainedModel, batch: dict[str, Tensor]) -> Cases:
    names = [component.name for component in find_components(model)[0]]
    sequences = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]

    def frozen() -> None:
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        model(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss.backward()

    def full() -> None:
        model.requires_grad_(True)
        full_backward(model, batch)
        model.zero_grad(set_to_none=True)

    def scored(estimator: str, granularity: str = "component") -> Callable[[], object]:
        return partial(
            component_importance, model, [batch], estimator=estimator, granularity=granularity
        )

    def peer(function: Callable) -> Callable[[], object]:
        return lambda: function(model.requires_grad_(True), batch, names)

    return {
        "frozen": frozen,
        "full": full,
        "token": scored("token"),
        "batch": scored("batch"),
        "parameter": scored("parameter"),
        "parameter by row": scored("parameter", "row"),
        "parameter by head": scored("parameter", "head"),
        "elements fp32": elements(model, batch, torch.float32),
        "elements bf16": elements(model, batch, torch.bfloat16),
        "parameter per sequence": partial(
            component_importance, model, sequences, estimator="parameter"
        ),
        "naive": peer(naive_gradient),
        "naive per sequence": peer(naive_gradient_per_sequence),
        "hooks": peer(hooks),
        "hooks per sequence": peer(hooks_per_sequence),
    }


def elements(
    model: PreTrainedModel, batch: dict[str, Tensor], dtype: torch.dtype
) -> Callable[[], None]:
    """One more batch of the same pass at every call; the first makes the buffers."""
    recorder = ImportanceRecorder(
        model, estimator="parameter", granularity="element", element_dtype=dtype
    )
    return lambda: score_batches(recorder, [batch])


def check(arguments: argparse.Namespace) -> dict[str, float]:
    """Largest relative differences between us and peers that compute the same; exits if large."""
    model, batch = make_model(arguments, max_layers=CHECKED_LAYERS), make_batch(arguments)
    names = [component.name for component in find_components(model)[0]]
    ours = component_importance(model, [batch], estimator="token").by_batch[0].tolist()
    # the loss of `token` is the sum of the sequences' means, here that of equal sequences
    theirs = hooks(model.requires_grad_(True), batch, names)
    differences = {"token to hooks": difference(ours, theirs, arguments.batch)}
    ours = component_importance(model, [batch], estimator="parameter")
    theirs = naive_gradient(model.requires_grad_(True), batch, names)
    differences["parameter to naive"] = difference(list(ours.values()), theirs, 1)
    for name, value in differences.items():
        if not value <= TOLERANCE[arguments.dtype]:
            sys.exit(f"{name}: scores differ by {value:.2g}, want {TOLERANCE[arguments.dtype]:g}")
    return differences


def difference(ours: list[float], theirs: dict[str, float], factor: int) -> float:
    """The largest over the components, relative."""
    pairs = zip(ours, theirs.values(), strict=True)
    return max(abs(mine / (factor * other) - 1) for mine, other in pairs)


def timed(case: Callable[[], object], arguments: argparse.Namespace) -> float:
    """Seconds of one call, the device's work included."""
    is_cpu, clock = arguments.device == "cpu", CLOCKS[arguments.clock]
    if not is_cpu:
        torch.accelerator.synchronize()
    start = clock()
    case()
    if not is_cpu:
        torch.accelerator.synchronize()
    return clock() - start


def peak_memory(cases: Cases, device: str) -> dict[str, int]:
    """Most bytes of tensors alive at once, over the model's, in each."""
    peaks = {}
    for name, case in cases.items():
        # the buffers of elements are made in the first backward, after its peak
        num_calls = 2 if name.startswith("elements") else 1
        with TensorMemory(device) as memory:
            for _ in range(num_calls):
                case()
        peaks[name] = memory.peak
    return peaks


def measure(cases: Cases, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of every case, per round."""
    rounds = []
    for number in range(arguments.rounds + 1):
        rounds.append({name: timed(case, arguments) for name, case in cases.items()})
        what = f"round {number}" if number else "warm-up"
        print(f"{what}: {sum(rounds[-1].values()):.0f} s", file=sys.stderr, flush=True)
    return rounds[1:]


def ratios_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    ratios = {}
    for name in RATIOS:
        above, below = name.split(" / ")
        if above in rounds[0] and below in rounds[0]:
            ratios[name] = statistics.median(each[above] / each[below] for each in rounds)
    return ratios


def run(arguments: argparse.Namespace) -> dict:
    """Check, measure memory and then time."""
    differences = check(arguments)
    model, batch = make_model(arguments), make_batch(arguments)
    # made anew for each, so that the first call makes the buffers of elements in both
    peaks = peak_memory(chosen(make_cases(model, batch), arguments), arguments.device)
    rounds = measure(chosen(make_cases(model, batch), arguments), arguments)
    return {
        "ratios": ratios_of(rounds),
        "seconds": {name: statistics.median(each[name] for each in rounds) for name in rounds[0]},
        "weight_bytes": sum(each.nbytes for each in model.parameters()),
        "peak_bytes_over_weights": peaks,
        "largest_difference": differences,
        "rounds": rounds,
    }


def chosen(cases: Cases, arguments: argparse.Namespace) -> Cases:
    rows = arguments.rows or list(cases)
    if unknown := [name for name in rows if name not in cases]:
        sys.exit(f"--rows: no {', '.join(unknown)}; there are: {', '.join(cases)}")
    return {name: cases[name] for name in rows}


def print_results(record: dict, num_tokens: int) -> None:
    for name, value in record["ratios"].items():
        wanted = RATIOS[name]
        sign = "at least" if wanted == 2.0 else "at most"
        aim = "" if wanted is None else f"   wanted {sign} {wanted:.2f}"
        print(f"{name:44} {value:7.3f}{aim}")
    weights = record["weight_bytes"] / 2**30
    print(f"\npeak memory: {weights:.2f} GiB of weights and")
    for name, value in record["seconds"].items():
        over = record["peak_bytes_over_weights"][name] / 2**30
        speed = f"{1000 * value:9.1f} ms {num_tokens / value:8.0f} tokens/s"
        print(f"{name:24} {speed} {over:8.2f} GiB, together {weights + over:6.2f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", action="store_true", help="the ops alone, not a model")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--answers", type=float, default=1.0, help="share of tokens in answers")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, in all rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=lambda text: text.split(","), help="these, with commas")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: own CPU time")
    parser.add_argument("--seconds", type=float, default=2.0, help="per shape, with --ops")
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    arguments = parser.parse_args()
    if arguments.model == "llama-8b" and arguments.rows is None:
        arguments.rows = list(ROWS_OF_LLAMA_8B)
    if not 0 < arguments.answers <= 1:
        parser.error(f"--answers must be over 0 and at most 1, got {arguments.answers}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    backend = choose("accumulate_row_dots_", torch.empty(1, device=arguments.device))
    info = machine(arguments.device) | {"backend": backend}
    print(f"{info['device_name']}, {info['num_threads']} threads, torch {torch.__version__}")
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    if arguments.ops:
        record = {"rows": importance_ops.run(arguments)}
    else:
        record = run(arguments)
        print_results(record, arguments.batch * arguments.tokens)
    if arguments.json:
        record = {"machine": info, "settings": settings} | record
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
