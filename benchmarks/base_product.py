"""Every way to compute the base product of the Triton backend, beside the frozen linear.

    forward     update, extended and, up to 64 tokens, decode   / F.linear(x, weight)
    backward    update and extended; x, a, b, router trained    / dy @ weight

A time is that of the layer's whole forward or backward, 4 experts of rank 8, replayed from a CUDA
graph over enough copies of the tensors to pass the L2; all ways in turn in every round, medians.
Each way is first held to the accuracy rule at 48 tokens.

--write puts the winners into citi_kernels/triton_kernels/base_product.json, from where
`choose_base_product` takes them: a way replaces "update" where it is at least 1 % faster.

Usage: python benchmarks/base_product.py [--quick] [--dtype bf16] [--layer 4096 14336]
           [--tokens 1 --tokens 8192] [--seconds 2] [--write] [--json out.json]
Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from citi import durable
from citi.environment_record import environment_record
from citi_kernels import backends, molora_linear, use_backend
from citi_kernels.ops.molora_linear_contract import Needs, Operands, Settings
from citi_kernels.testing import check_molora_linear, random_case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LAYERS = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
TOKENS = [1, 4, 16, 64, 512, 2048, 8192]
EXPERTS = {"num_experts": 4, "scaling": 0.25}
SETTINGS = Settings(4, 0.25, None, False, None, 0, 0.0, None)
NEEDS = Needs(x=True, weight=False, bias=False, a=True, b=True, router=True)
WAYS = {"forward": ("update", "few", "extended", "decode"), "backward": ("update", "extended")}
CHECKED_TOKENS = 48
PASSED_BYTES = 150e6  # three times the L2 of an H100
LEAST_GAIN = 0.01


class Shape(NamedTuple):
    """Tokens, in-features, out-features of one layer."""

    T: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"T {self.T}, {self.K} -> {self.N}"


class Replay(NamedTuple):
    """A graph, and what keeps the tensors alive that it reads."""

    graph: torch.cuda.CUDAGraph
    calls: list[Callable[[], object]]


def possible_ways(shape: Shape, dtype: torch.dtype, direction: str) -> list[str]:
    """ "update", and the other ways that would really run if they were forced."""
    from citi_kernels.triton_kernels.base_product import choose_base_product, forced_base_product

    features = shape.K if direction == "forward" else shape.N
    x = torch.empty(shape.T, features, dtype=dtype, device="cuda")
    weight = torch.empty(shape.N, shape.K, dtype=dtype, device="cuda")
    ways = []
    for way in WAYS[direction]:
        with forced_base_product(way):
            if choose_base_product(x, weight, shape.T, 32, direction) == way:
                ways.append(way)
    return ways


def assert_accurate(K: int, N: int, dtype: torch.dtype) -> dict[str, float]:
    """Largest share of the allowance used by each way; raises above 1."""
    from citi_kernels.triton_kernels.base_product import forced_base_product

    case = random_case(
        CHECKED_TOKENS, K, N, dtype=dtype, bias=False, device="cuda", drawn_on="cuda"
    )
    used = {}
    for way in WAYS["forward"]:
        with (
            use_backend("triton"),
            forced_base_product(way),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            accuracies = check_molora_linear(molora_linear, case)
        used[way] = max(max(each) for each in accuracies.values())
    return used


def make_cases(
    shape: Shape, dtype: torch.dtype, direction: str, ways: list[str]
) -> tuple[dict[str, Replay], int]:
    """For each case a graph that runs it once on every copy of the tensors; how many copies."""
    element = torch.empty((), dtype=dtype).element_size()
    one_copy = element * (shape.T * (shape.K + shape.N) + shape.K * shape.N)
    num_copies = max(2, -(-int(PASSED_BYTES) // one_copy))
    copies = [
        random_case(
            *shape,
            dtype=dtype,
            parameter_dtype=torch.float32,
            bias=False,
            num_segments=None,
            device="cuda",
            drawn_on="cuda",
            seed=seed,
        )
        for seed in range(num_copies)
    ]
    backend = backends.find("molora_linear", "triton")
    if direction == "forward":
        calls = [lambda each=each: backend.forward(_operands(each), SETTINGS) for each in copies]
        linear = [lambda each=each: F.linear(each.x, each.weight) for each in copies]
    else:
        saved = [backend.forward(_operands(each), SETTINGS)[1] for each in copies]
        calls = [
            lambda each=each, kept=kept: backend.backward(
                each.dy, None, _operands(each), kept, SETTINGS, NEEDS
            )
            for each, kept in zip(copies, saved, strict=True)
        ]
        linear = [lambda each=each: each.dy @ each.weight for each in copies]
    cases = {"linear": captured(linear, None)}
    return cases | {way: captured(calls, way) for way in ways}, num_copies


def _operands(case: Any) -> Operands:
    return Operands(*case.operands)


def captured(calls: list[Callable[[], object]], way: str | None) -> Replay:
    """A graph of all calls in a row, computed that way; every kernel is compiled before."""
    from citi_kernels.triton_kernels.base_product import forced_base_product

    with forced_base_product(way) if way else contextlib.nullcontext():
        for _ in range(2):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    return Replay(graph, calls)


def timed(replay: Replay) -> float:
    """Milliseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    replay.graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(cases: dict[str, Replay], num_copies: int, seconds: float) -> list[dict[str, float]]:
    """Milliseconds of one call of every case, per round; 20 to 500 rounds, as time allows."""
    for _ in range(2):
        one_round = sum(timed(each) for each in cases.values()) / 1e3
    num_rounds = min(500, max(20, int(seconds / one_round)))
    return [
        {name: timed(each) / num_copies for name, each in cases.items()} for _ in range(num_rounds)
    ]


def winner(milliseconds: dict[str, float]) -> str:
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    is_worth_it = milliseconds[fastest] <= (1 - LEAST_GAIN) * milliseconds["update"]
    return fastest if is_worth_it else "update"


def run_shape(shape: Shape, dtype: torch.dtype, direction: str, seconds: float) -> dict[str, Any]:
    """One row of the table, with what is printed beside it."""
    from citi_kernels.triton_kernels.base_product import dtype_name

    ways = possible_ways(shape, dtype, direction)
    cases, num_copies = make_cases(shape, dtype, direction, ways)
    rounds = measure(cases, num_copies, seconds)
    milliseconds = {name: statistics.median(each[name] for each in rounds) for name in cases}
    of_ways = {way: milliseconds[way] for way in ways}
    return {
        "gpu": torch.cuda.get_device_name(),
        "dtype": dtype_name(dtype),
        "out_features": shape.N,
        "in_features": shape.K,
        "tokens": shape.T,
        "direction": direction,
        "milliseconds": of_ways,
        "winner": winner(of_ways),
        "linear_milliseconds": milliseconds["linear"],
        "ratio_to_linear": {
            way: statistics.median(each[way] / each["linear"] for each in rounds) for way in ways
        },
        "rounds": len(rounds),
    }


def print_row(row: dict[str, Any]) -> None:
    shape = Shape(row["tokens"], row["in_features"], row["out_features"])
    linear = 1e3 * row["linear_milliseconds"]
    print(f"\n{shape}, {row['dtype']}, {row['direction']}: linear {linear:.1f} us")
    for way, milliseconds in row["milliseconds"].items():
        mark = "   chosen" if way == row["winner"] else ""
        ratio = row["ratio_to_linear"][way]
        print(f"  {way:9} {1e3 * milliseconds:10.1f} us   {ratio:6.3f} x linear{mark}", flush=True)


def write_table(rows: list[dict[str, Any]], versions: dict[str, str], path: Path) -> None:
    """Put `rows` in the place of the rows of the same keys and tokens; others stay."""
    from citi_kernels.triton_kernels.base_product import key_of, read_rows

    columns = ("gpu", "dtype", "out_features", "in_features", "tokens", "direction")
    columns += ("milliseconds", "winner")
    measured_with = {name: versions[name] for name in ("torch", "triton") if name in versions}
    table = {(key_of(row), row["tokens"]): row for row in read_rows(path)}
    for row in rows:
        kept = {name: row[name] for name in columns}
        kept["milliseconds"] = {way: round(ms, 5) for way, ms in row["milliseconds"].items()}
        table[key_of(row), row["tokens"]] = kept | measured_with
    note = "Written by benchmarks/base_product.py --write: 4 experts of rank 8."
    durable.write_json(path, {"note": note, "rows": [table[key] for key in sorted(table)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4096 -> 4096 at 1 and 8192 tokens")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: bf16")
    parser.add_argument("--layer", type=int, nargs=2, action="append", metavar=("K", "N"))
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured per row")
    parser.add_argument("--write", action="store_true", help="merge the winners into the table")
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("base_product.py times CUDA kernels and needs a CUDA GPU; this machine shows none")
    layers = arguments.layer or (LAYERS[:1] if arguments.quick else LAYERS)
    tokens = arguments.tokens or ([1, 8192] if arguments.quick else TOKENS)
    info = environment_record() | {"date": datetime.date.today().isoformat()}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = []
    for dtype in arguments.dtype or ["bf16"]:
        for K, N in layers:
            used = assert_accurate(K, N, DTYPES[dtype])
            shares = ", ".join(f"{way} {share:.2f}" for way, share in used.items())
            print(f"\n{K} -> {N}, {dtype}: accuracy used, of 1: {shares}")
            for T in tokens:
                for direction in WAYS:
                    shape = Shape(T, K, N)
                    rows.append(run_shape(shape, DTYPES[dtype], direction, arguments.seconds))
                    print_row(rows[-1])
                    torch.cuda.empty_cache()
    if arguments.write:
        from citi_kernels.triton_kernels.base_product import TABLE

        write_table(rows, info["versions"], TABLE)
    if arguments.json:
        durable.write_json(arguments.json, {"machine": info, "rows": rows})


if __name__ == "__main__":
    main()
